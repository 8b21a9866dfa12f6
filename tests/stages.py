"""One decoder layer of each family through every pass, as text; computed once per process, on the meta device."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from qerl_compile.graphdiff import diff
from qerl_compile.inspection import layer_stages
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout.cache import CacheShape, DecodeView, PagedCache, paged_attention
from qerl_compile.stacked_adapters import attach_stacked_adapters
from tests.models import tiny_mixture, tiny_model
from tests.pages import Pages

MIXTURE = "qwen3moe"


@functools.cache
def stages(family: str) -> dict[str, str]:
    """`{stage: graph text}` of layer 0 in bf16 under the recipe of the paper, from "capture" to "recompute"."""
    with torch.device("meta"):
        model = tiny_model(family, layers=1, dtype=torch.bfloat16)
    return dict(layer_stages(model, Recipe.named("qerl-nvfp4-aqn"), recompute=True))


@functools.cache
def mixture_stages(family: str) -> dict[str, str]:
    """The same of a mixture of experts, to "experts"."""
    assert family == MIXTURE
    with torch.device("meta"):
        model = tiny_mixture(torch.bfloat16, num_hidden_layers=1)
    return dict(layer_stages(model, Recipe.named("qerl-nvfp4-aqn")))


@functools.cache
def trained_norm_stages(family: str) -> dict[str, str]:
    """The same where the norms are trained too, which adds the stage "trainednorms" after "capture"."""
    with torch.device("meta"):
        model = tiny_model(family, layers=1, dtype=torch.bfloat16)
    recipe = Recipe.named("qerl-nvfp4-aqn").model_copy(update={"trainable_norms": ".*"})
    return dict(layer_stages(model, recipe))


@functools.cache
def trained_weight_stages(family: str) -> dict[str, str]:
    """The same where full weights are trained and 2:4 sparse: "fakequantize" and "sparsify" come after "quantize"."""
    with torch.device("meta"):
        model = tiny_model(family, layers=1, dtype=torch.bfloat16)
    linears = r".*layers\.\d+\..*_proj"
    recipe = {"quantize": [{"match": linears, "weights": "trained"}], "sparsify": [{"match": linears}]}
    return dict(layer_stages(model, Recipe.resolve(recipe)))


def rollout_stages(family: str) -> dict[str, str]:
    """The same for rollout graphs over whole sequences, from "capture" to "adapt"."""
    return _rollout_stages(family, _prefill)


def decode_stages(family: str) -> dict[str, str]:
    """The same for a decode step over pages, from "capture" to "rotary"."""
    return _rollout_stages(family, _decode)


@functools.cache
def _rollout_stages(family: str, run: Callable[[Any], None]) -> dict[str, str]:
    with torch.device("meta"):
        model = tiny_model(family, layers=1, dtype=torch.bfloat16)
    layer_stages(model, Recipe.named("qerl-nvfp4-aqn"))
    attach_stacked_adapters(model)
    _ = model.get_submodule("model.layers.0")._compiled_call_impl.graphs.rollout  # makes the last of the compilers
    texts: dict[str, str] = {}
    model.qerl.compilers[-1].record = texts.__setitem__
    run(model)
    return texts


def _prefill(model: Any) -> None:
    ids_BT, mask = torch.zeros(2, 8, dtype=torch.long, device="meta"), torch.ones(2, 1, 8, 8, device="meta").bool()
    model(input_ids=ids_BT, attention_mask=mask, use_cache=False, qerl_cache=Pages(2, device="meta"))


def _decode(model: Any) -> None:
    zeros = functools.partial(torch.zeros, device="meta")
    cache = PagedCache(CacheShape.of(model, page_tokens=4), 5, torch.device("meta"))
    view = DecodeView(cache, zeros(2, 3, dtype=torch.int32), zeros(2, dtype=torch.int32))
    with paged_attention(model):
        ids_B1 = zeros(2, 1, dtype=torch.long)
        model(input_ids=ids_B1, position_ids=ids_B1, use_cache=False, qerl_cache=view, logits_to_keep=1)


def pass_diff(family: str, name: str) -> str:
    """The unified diff of what one pass did to the layer, without context and line numbers, or "nothing"."""
    chosen = {"adapt": rollout_stages, "trainednorms": trained_norm_stages, "experts": mixture_stages}
    chosen |= dict.fromkeys(("residual", "rotary"), decode_stages)
    chosen |= dict.fromkeys(("fakequantize", "sparsify"), trained_weight_stages)
    texts = chosen.get(name, stages)(family)
    before = list(texts)[list(texts).index(name) - 1]
    lines = diff(texts[before], texts[name])
    return "".join(f"{'@@' if line.startswith('@@') else line}\n" for line in lines) or "nothing\n"
