"""`transform`: a Hugging Face causal LM goes in; the same object comes out, computing from packed weights.

    plan     recipe × captured graph → sites                                   plan.py
    attach   quantize each weight in place, free its bf16 form, add adapters   attach.py
             (weights that the recipe trains stay; the graph rounds them)
    compile  each decoder layer through Dynamo and the passes                  region_calls.py, backend.py

Everything is checked before the first weight is touched, and weights are freed one group at a time, so that the peak is
the old model plus one group. For models that do not fit in memory at all, see `loading.load`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from qerl_compile.attach import Attacher
from qerl_compile.backend import check_inner
from qerl_compile.errors import ModelError
from qerl_compile.formats.nvfp4 import check_weight
from qerl_compile.graph import held_tensor
from qerl_compile.model import QerlModel, TransformState, become_qerl
from qerl_compile.passes.trained_norms import norm_weight
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe

ModelT = TypeVar("ModelT", bound=nn.Module)
RecipeLike = Recipe | Mapping[str, Any] | str | PathLike[str]


def transform(
    model: ModelT,
    recipe: RecipeLike,
    *,
    inner: str = "inductor",
    decode: str = "regional",
    seed: int = 0,
) -> ModelT:
    """Pack, adapt and compile a causal LM in place.

    Args:
        model: a transformers causal LM (`PreTrainedModel`) in bf16, fp16 or fp32, on its final device.
        recipe: a `Recipe`, a mapping, the name of a built-in recipe, or a YAML file.
        inner: what compiles the rewritten graphs: "inductor", "aot_eager" or "eager".
        decode: how calls with a cache are compiled: "regional" (one graph per kind of layer) or "whole" (one graph).
        seed: of the adapters' initial values.

    Returns:
        The same object; only LoRA factors, and norms and weights that the recipe trains, require gradients.

    Raises:
        RecipeError: the recipe is faulty, does not fit the model, or needs sample text (qerl_compile.calibrate has it).
        FormatError: a weight cannot be packed: NaN, Inf, or K no multiple of 16.
        GraphError: a layer cannot be captured.
        ModelError: the model was transformed before, or is no transformers model.
    """
    recipe = Recipe.resolve(recipe)
    check_options(inner, decode)
    refuse_unsuitable(model)
    _drop_collectors(model)
    plan = make_plan(model, recipe)
    for path in (*plan.quantize, *plan.trained_weights):
        check_weight(held_tensor(model.get_submodule(path), "weight"), path)
    for stack, _ in plan.experts.values():
        check_weight(model.get_parameter(stack.name).data.flatten(0, 1), stack.name)
    attacher = Attacher(model, plan, seed=seed)
    with torch.no_grad():
        for path in plan.quantize:
            attacher.weight(path, model.get_submodule(path).get_parameter("weight").data)
        for name in plan.experts:
            attacher.experts(name, model.get_parameter(name).data)
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    state = TransformState(recipe, attacher.finish(), inner, decode, recipe.train.recompute, base_name=name)
    become_qerl(model, state)
    return model


def _drop_collectors(model: nn.Module) -> None:
    """Take away the hooks that transformers leaves on layers once hidden states were asked for; graphs hold none."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
        vars(module).pop("_output_capturing_hooks_installed", None)


def check_options(inner: str, decode: str) -> None:
    """Refuse an unknown inner compiler or decode mode before any work starts."""
    check_inner(inner)
    if decode not in ("regional", "whole"):
        raise ModelError(
            where="decode", expected="'regional' or 'whole'", got=repr(decode), do="Use decode='regional', the default."
        )


def resample_noise(model: nn.Module, sigma: float, generator: torch.Generator | None = None) -> tuple[int, float]:
    """Draw z ~ N(0, sigma²) for every noisy norm, in place; sigma = 0 restores the clean model bit for bit.

    Args:
        model: a transformed model.
        sigma: standard deviation, in units of the norm weights.
        generator: a CPU generator; draws are made on the CPU, so a seed means the same noise on every device.

    Returns:
        (number of norms that have noise, root mean square of `w_eff - w` as computed in fp32). The number is counted
        and not read from the plan, so that a caller can compare the two.
    """
    sites, count = 0, 0
    squares: dict[torch.device, torch.Tensor] = {}  # read once at the end: a read waits for the device
    for path in state_of(model).plan.noise:
        norm = model.get_submodule(path)
        noise = norm._buffers.get("noise")
        if noise is None:
            continue
        sites += 1
        if sigma == 0:
            noise.zero_()
            continue
        noise.copy_(torch.randn(noise.shape, generator=generator, dtype=torch.float32) * sigma)
        clean = norm_weight(norm)
        square = ((clean + noise) - clean).double().square().sum()
        squares[square.device] = squares[square.device] + square if square.device in squares else square
        count += noise.numel()
    total = sum(square.item() for square in squares.values())
    return sites, (total / count) ** 0.5 if count else 0.0


@contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """Compute as the clean model inside, bit for bit, and with the very same noise afterwards, also after an error.

    Drawing noise inside, or zeroing it, has no effect on what is restored. Contexts nest.

    Args:
        model: a transformed model; without noise nothing happens.

    Raises:
        ModelError: the model is not transformed.
    """
    kept: dict[str, torch.Tensor] = {}
    for path in state_of(model).plan.noise:
        noise = model.get_submodule(path)._buffers.get("noise")
        if noise is not None:
            kept[path] = noise.clone()
            noise.zero_()
    try:
        yield
    finally:
        for path, noise in kept.items():
            model.get_submodule(path).get_buffer("noise").copy_(noise)


def state_of(model: nn.Module) -> TransformState:
    """Return what was done to a transformed model.

    Raises:
        ModelError: the model is not transformed.
    """
    if not isinstance(model, QerlModel):
        raise ModelError(
            where=type(model).__name__,
            expected="a model that went through qerl_compile.transform or load",
            got="an ordinary model",
            do="Call qerl_compile.transform(model, recipe) first.",
        )
    return model.qerl


def refuse_unsuitable(model: nn.Module) -> None:
    """Refuse what is no dense transformers model in memory, before any work.

    Raises:
        ModelError: it is transformed already, another quantizer's, on meta, or no `PreTrainedModel`.
    """
    from transformers import PreTrainedModel

    got = do = None
    if isinstance(model, QerlModel):
        got, do = "a model that is transformed already", "Load the base model again, or train this one."
    elif not isinstance(model, PreTrainedModel):
        got, do = (
            f"a {type(model).__name__}",
            "Pass a transformers PreTrainedModel, such as AutoModelForCausalLM gives.",
        )
    elif getattr(model.config, "quantization_config", None):
        got, do = "a model that another quantizer owns", "Load it dense, or give its directory to qerl_compile.load."
    elif any(p.device.type == "meta" for p in model.parameters()):
        got, do = "weights on the meta device", "Use qerl_compile.load(DIR, recipe), which streams them in."
    if got is not None:
        raise ModelError(where=type(model).__name__, expected="a dense causal LM in memory", got=got, do=str(do))
