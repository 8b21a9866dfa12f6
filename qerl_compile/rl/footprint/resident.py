"""A transformed model without weights, and the bytes that it will hold on a device.

The model is built on meta and goes through the very code that `load` and the rollout engine use (attach.py,
stacked_adapters.py). What it would hold is then counted, storage by storage, as CUDA's allocator rounds it, so no
formula for packed weights, ghosts, fused storage or stacked adapters is kept a second time here.

    packed     codes and block scales of 4-bit linears
    dense      embeddings, head, norms, biases, noise, and linears that stay in 16 bits
    adapters   lora_A, lora_B and trained norms, float32
    stacked    what rollouts add: the adapters again, stacked and in the model's dtype
    scratch    the largest packed matrix in the model's dtype, which stays once many tokens were multiplied with it; a
               stack of experts is decoded as a whole and for one call, which operator_scratch.py counts
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qerl_compile.adapter_reading import adapter_norms
from qerl_compile.attach import attach_shapes
from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.errors import ModelError
from qerl_compile.kernels.grouped_cuda import decodes_whole
from qerl_compile.layouts import Layout
from qerl_compile.loading import adapter_sites, refuse_uncalled
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.plan import Plan, make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.regions import kind
from qerl_compile.rl.footprint.layer_graphs import LayerCall, layer_calls
from qerl_compile.rl.footprint.liveness import rounded
from qerl_compile.stacked_adapters import attach_stacked_adapters

WEIGHTS = (".safetensors", ".gguf")
"""Files whose presence says that weights are meant to be there: then they must be such as `load` reads."""

PACKED = (torch.uint8, torch.float8_e4m3fn)  # codes and block scales, whatever they are called


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike, and what the plan does to each.

    Args:
        first: module path of the first.
        count: how many there are.
        quantized: linears and stacks of experts that are packed, in each.
        adapted: linears with an adapter.
        noisy: norms with noise.
        held_bytes: what one holds on the device, adapters included.
        call: how the model calls it.
    """

    first: str
    count: int
    quantized: int
    adapted: int
    noisy: int
    held_bytes: int
    call: LayerCall


@dataclass(frozen=True)
class Held:
    """What a model holds, in bytes; see the module's essay.

    Args:
        packed, dense, adapters, stacked, scratch: as there.
        trained: elements that the optimizer moves.
        captured: what captured decode steps keep from everybody else: the largest stack of experts, decoded, in the
            graphs' own pool. torch counts it as free; it is 0 without packed experts.
    """

    packed: int
    dense: int
    adapters: int
    stacked: int
    trained: int
    scratch: int
    captured: int

    @property
    def after_load(self) -> int:
        """What is there before anything runs."""
        return self.packed + self.dense + self.adapters


@dataclass
class Skeleton:
    """A transformed model on meta.

    Args:
        model: with what rollouts attach.
        state: recipe and plan.
        kinds: its layers.
        held: its bytes.
    """

    model: Any
    state: TransformState
    kinds: tuple[LayerKind, ...]
    held: Held


@dataclass(frozen=True)
class Source:
    """What a prediction is about.

    Args:
        model: a causal LM on meta.
        checkpoint: the judged directory of its weights; None if there is none, or only a config.
        layout: what of that is packed.
        lacks_weights: a local directory without any, from which `load` would not get a model.
    """

    model: Any
    checkpoint: CheckpointDirectory | None = None
    layout: Layout = field(default_factory=lambda: Layout("dense"))
    lacks_weights: bool = False


def source_of(model_or_config: Any, *, trust_remote_code: bool = False) -> Source:
    """Return a causal LM on meta, and what its directory says of its weights.

    Args:
        model_or_config: a model directory, which may lack the weights, hub id or "smollm2"; a transformers config; or
            a causal LM on meta, which is changed.
        trust_remote_code: as for `load`.

    Raises:
        CheckpointError: as `load` of this directory; of a hub id whose weights were not fetched, as far as its config
            and its index show.
        ModelError: a model with weights in memory.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    if isinstance(model_or_config, (str, PathLike)):
        source = _from_directory(model_or_config, trust_remote_code=trust_remote_code)
        source.model.to("meta").eval()
        return source
    if isinstance(model_or_config, PreTrainedConfig):
        with init_empty_weights(include_buffers=False):
            dtype = model_or_config.dtype or torch.bfloat16
            model = AutoModelForCausalLM.from_config(model_or_config, dtype=dtype)
    else:
        model = model_or_config
        if any(parameter.device.type != "meta" for parameter in model.parameters()):
            raise ModelError(
                where=type(model).__name__,
                expected="a path, a config, or a model on the meta device, since a prediction changes what it is given",
                got="a model with weights",
                do="Pass model.config.",
            )
    model.tie_weights()
    return Source(model.to("meta").eval())


def _from_directory(path_or_id: str | PathLike[str], *, trust_remote_code: bool) -> Source:
    """Judge a directory as `load` does, as far as it is there: weights need not be."""
    from qerl_compile.checkpoint_config import read_config
    from qerl_compile.checkpoint_dir import INDEX, listed_tensors, open_checkpoint
    from qerl_compile.checkpoint_entries import checked_entries
    from qerl_compile.layouts import layout_of
    from qerl_compile.layouts.modelopt import BESIDE
    from qerl_compile.loading import check_names, check_tensors, meta_model, model_directory

    root = model_directory(path_or_id, weights=False)
    local = Path(path_or_id).is_dir()
    files = checked_entries(root, trust_remote_code=trust_remote_code)
    config = read_config(root, files, trust_remote_code=trust_remote_code)
    weights = any(name.endswith(WEIGHTS) for name in files)
    if "quantization_config" in config or BESIDE in files or weights or (local and INDEX in files):
        # Names and shapes say what is packed, so those of a hub id are fetched.
        checkpoint = open_checkpoint(model_directory(path_or_id), trust_remote_code=trust_remote_code)
        layout, model = layout_of(checkpoint), meta_model(checkpoint.root, None)
        check_tensors(model, checkpoint, layout)
        return Source(model, checkpoint, layout)
    model = meta_model(root, None)
    if INDEX in files:
        check_names(model, listed_tensors(root), where=str(root / INDEX))
    return Source(model, lacks_weights=local)


def skeleton(source: Source, recipe: Recipe, adapter: str | PathLike[str] | None = None) -> Skeleton:
    """Transform a model on meta, in place.

    Args:
        source: the model, and which of its linears a checkpoint holds packed already.
        recipe: what is done to it; rules that need sample text count as followed.
        adapter: directory of an adapter to start from, whose ranks replace the lora rules.

    Raises:
        RecipeError, FormatError, GraphError, CheckpointError: as `load`.
    """
    model, packed = source.model, frozenset(source.layout.linears)
    sites = norms = None
    if adapter is not None:
        sites = adapter_sites(adapter)
        norms = adapter_norms(adapter) or None
    plan = make_plan(model, recipe, packed=packed, adapters=sites, trained_norms=norms, calibrating=True)
    if source.checkpoint is not None:
        refuse_uncalled(source.checkpoint, source.layout, plan)
    alike: dict[tuple[object, ...], list[str]] = {}
    for path in plan.layers:
        alike.setdefault((kind(model.get_submodule(path)), plan.kind(path)), []).append(path)
    calls = layer_calls(model, [paths[0] for paths in alike.values()])
    plan = attach_shapes(model, plan, seed=recipe.train.seed)
    state = TransformState(recipe, plan, "eager", recompute=recipe.train.recompute)
    become_qerl(model, state)
    before = _bytes([model])
    attach_stacked_adapters(model)
    kinds = tuple(_layer_kind(model, plan, paths, calls[paths[0]]) for paths in alike.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stacked = sum(_bytes([model]).values()) - sum(before.values())
    scratch, captured = _largest_decoded(model)
    held = Held(**before, stacked=stacked, trained=trained, scratch=scratch, captured=captured)
    return Skeleton(model, state, kinds, held)


def _layer_kind(model: Any, plan: Plan, paths: list[str], call: LayerCall) -> LayerKind:
    inside = f"{paths[0]}."

    def count(sites: Iterable[str]) -> int:
        return sum(path.startswith(inside) for path in sites)

    held = sum(_bytes([model.get_submodule(paths[0])]).values())
    packed = count(plan.quantize) + count(plan.experts)
    return LayerKind(paths[0], len(paths), packed, count(plan.lora), count(plan.noise), held, call)


def _bytes(roots: Iterable[nn.Module]) -> Mapping[str, int]:
    """Return bytes by what they are for, each storage once."""
    found = {"packed": 0, "dense": 0, "adapters": 0}
    seen: set[int] = set()
    for root in roots:
        for tensor in [*root.parameters(), *root.buffers()]:
            storage = tensor.untyped_storage()
            if storage._cdata in seen:
                continue
            seen.add(storage._cdata)
            what = "packed" if tensor.dtype in PACKED else "adapters" if tensor.requires_grad else "dense"
            found[what] += rounded(storage.nbytes())  # that of a ghost has one element
    return found


def _largest_decoded(model: Any) -> tuple[int, int]:
    """Return bytes in the model's dtype: of the largest packed matrix, and of the largest stack decoded as a whole."""
    dtype = model.get_input_embeddings().weight.dtype
    matrix = stack = 0
    for codes in [*model.parameters(), *model.buffers()]:
        if codes.dtype != torch.uint8:
            continue
        rows, bytes_in = codes.shape[-2:]
        if codes.dim() == 3 and decodes_whole(rows, dtype):
            stack = max(stack, 2 * dtype.itemsize * codes.numel())
        else:
            matrix = max(matrix, 2 * dtype.itemsize * rows * bytes_in)
    return matrix, stack
