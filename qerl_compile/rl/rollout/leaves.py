"""The small modules beside the layers, each as one kernel while steps run: final norm and rotary tables.

Regions are layers and what a plan changes (region_calls.py). A Hugging Face decoder runs two more modules in every
step, written in PyTorch, a launch of about 2 µs per operator in a step's CUDA graph whatever the model:

    rotary tables   a cast, * inv_freq, cat, cos, * scaling, sin, * scaling, two casts              9 launches
    final norm      a cast, pow, mean, + eps, rsqrt, *, a cast, * weight                            8 launches

They are found by what they are: children of the module that holds the layers, without children of their own, and no
embedding. A compiled call is set on each for the time of a step, as `nn.Module.compile` sets it for good; outside of
steps, in training above all, the model is as it was.

What stays: rotary embeddings whose frequencies follow the longest position ("dynamic", "longrope"), which look at
values or write buffers; and modules that have a compiled call, since a plan changes them.

Rounding is Inductor's, as in the layers: a norm is computed in float32 to its end and rounded once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qerl_compile.isolation import call_region, isolated, mark_dynamic

CHANGING = frozenset({"dynamic", "longrope"})
"""Kinds of rotary embedding whose frequencies transformers' `dynamic_rope_update` changes on the way."""

Calls = Mapping[nn.Module, Callable[..., Any]]


def compiled_leaves(model: Any) -> Calls:
    """Return a compiled call for each small module beside the layers; see the module's essay.

    Args:
        model: the policy; one that is not transformed, or not with Inductor, has none.
    """
    state = getattr(model, "qerl", None)
    if state is None or state.inner != "inductor":
        return {}
    path, _, _ = state.plan.layers[0].rpartition(".")  # the list of layers
    decoder = model.get_submodule(path.rpartition(".")[0])
    return {module: _compiled(module) for module in decoder.children() if _is_small(module)}


def _is_small(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    changes = not CHANGING.isdisjoint(kinds.values() if isinstance(kinds, dict) else (kinds,))
    composed = isinstance(module, nn.Embedding) or any(True for _ in module.children())
    return not (composed or changes or module._compiled_call_impl)


def _compiled(module: nn.Module) -> Callable[..., Any]:
    compiled = isolated(call_region, "inductor")

    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                mark_dynamic(value, (0,))
        return compiled(module, *args, **kwargs)

    return call


@contextmanager
def calling(compiled: Calls) -> Iterator[None]:
    """Let modules use their compiled calls; on the way out they have none again."""
    for module, call in compiled.items():
        module._compiled_call_impl = call
    try:
        yield
    finally:
        for module in compiled:
            module._compiled_call_impl = None
