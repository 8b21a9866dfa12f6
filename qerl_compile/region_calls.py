"""Compile a model region by region, and call the regions so that they share graphs.

Each decoder layer gets a compiled call. Layers to which the plan does the same thing share one function and one
`GraphCompiler`, so Dynamo captures the first and reuses its graph for the rest; layers that differ (another rank, a
skipped projection) get their own, since Dynamo cannot see from its inputs what a pass will add.

Two things keep the number of graphs flat in depth and small in shapes:

*The cache is late-bound too.* Attention calls `cache.update(k, v, self.layer_idx)`, and an integer that indexes
becomes a guard: one graph per layer. A region is therefore handed a `LayerCache`, a view of its own layer's cache
that ignores the index. Prefill and decode then take the same few graphs at any depth.

*Rollouts have graphs of their own.* A region that is called with the keyword `qerl_cache` (pages of the rollout engine)
runs a second set of graphs, without gradients, in which adapters, the last sum of a layer and the rotary embedding are
part of operators (passes adapt, residual, rotary), made when the first rollout comes. `qerl_cache` too is handed down
as `qerl_cache.layer(index)`, the pages of one layer.

*The first layer takes the others' graph.* Dynamo guards on whether an input needs a gradient. Embeddings are frozen,
so the first layer's input would need none and every other layer's one: two graphs, each with a backward, where one
does. In training the first layer's input is therefore a leaf that needs a gradient, and nobody reads it. That is one
layer's dx through norm and q/k/v too many, and one [B, T, D] of gradient; a graph of a layer takes ten seconds.

*Which weights train chooses the graph.* Adapters enter a graph after Dynamo (`gather`), so it has no guard on whether
they need gradients, and AOTAutograd settles that when it compiles. Frozen then and thawed later, an adapter would get
no gradient and nobody would hear of it. So there are graphs for each pattern of `requires_grad` within a region.

*Batch and length are marked dynamic* (`maybe_mark_dynamic`) on the way in, so that the first call already compiles
for all lengths. `dynamic=True` would also turn module floats such as eps into inputs (design/compiler.md, rule R6).

What this module does not do: rewrite graphs (`backend.py`), or keep a cache of its own.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qerl_compile.backend import GraphCompiler
from qerl_compile.graph import held_tensor, owner_of, replaced
from qerl_compile.isolation import call_region, isolated, mark_dynamic
from qerl_compile.passes import (
    Adapt,
    Experts,
    FakeQuantize,
    Fuse,
    LoRA,
    Noise,
    Pass,
    Quantize,
    Recompute,
    Residual,
    Rotary,
    Sparsify,
    TrainedNorms,
)
from qerl_compile.plan import Plan

if TYPE_CHECKING:
    from qerl_compile.model import TransformState


def passes_for(state: "TransformState") -> list[Pass]:
    """Return the passes of training graphs in their order.

    trained norms → noise → lora → fuse → quantize → experts → fake quantize → sparsify → recompute. Those for trained
    norms, experts and trained weights, and recompute, are there only if there is something to do for them.
    """
    plan = state.plan
    passes: list[Pass] = [
        *_trained_norms(state),
        Noise(frozenset(plan.noise)),
        LoRA(plan.lora),
        Fuse((*plan.groups, *plan.trained_groups)),
        Quantize(frozenset(plan.quantize), plan.groups),
        *_experts(state),
        *_trained_weights(state),
    ]
    return [*passes, Recompute()] if state.recompute else passes


def rollout_passes_for(state: "TransformState") -> list[Pass]:
    """Return the passes of rollout graphs in their order.

    trained norms → noise → fuse → quantize → experts → fake quantize → sparsify → adapt → residual → rotary
    """
    plan = state.plan
    groups = (*plan.groups, *plan.dense_groups)
    return [
        *_trained_norms(state),
        Noise(frozenset(plan.noise)),
        Fuse((*groups, *plan.trained_groups)),
        Quantize(frozenset(plan.quantize), plan.groups),
        *_experts(state),
        *_trained_weights(state),
        Adapt(plan.lora, groups),
        Residual(),
        Rotary(),
    ]


def _trained_norms(state: "TransformState") -> list[Pass]:
    return [TrainedNorms(frozenset(state.plan.trained_norms))] if state.plan.trained_norms else []


def _experts(state: "TransformState") -> list[Pass]:
    return [Experts(frozenset(state.plan.experts))] if state.plan.experts else []


def _trained_weights(state: "TransformState") -> list[Pass]:
    plan, trained = state.plan, frozenset(state.plan.trained_weights)
    if not trained:
        return []
    rounding = FakeQuantize(trained.__contains__, plan.trained_groups)
    masked = trained & plan.sparse.keys()
    return [rounding, Sparsify(masked)] if masked else [rounding]


def named_tensors(model: nn.Module) -> dict[int, str]:
    """Return `{id(tensor): checkpoint key}` for every parameter and buffer."""
    return {id(tensor): name for name, tensor in [*model.named_buffers(), *model.named_parameters()]}


def marked_tensors(model: nn.Module, plan: Plan) -> dict[int, str]:
    """As `named_tensors`, for a model whose graphs find modules through their weights.

    Raises:
        GraphError: a weight was replaced, and its mark with it.
    """
    for path in plan.owners():
        if owner_of(held_tensor(model.get_submodule(path), "weight")) is None:
            raise replaced(path)
    return named_tensors(model)


def compile_regions(model: nn.Module, state: "TransformState") -> None:
    """Give every region of the plan a compiled call."""
    graphs: dict[tuple[object, ...], _KindGraphs] = {}
    for path in state.plan.regions():
        region = model.get_submodule(path)
        kind = state.plan.kind(path)
        if kind not in graphs:
            graphs[kind] = _KindGraphs(model, state)
        index = state.plan.layers.index(path) if path in state.plan.layers else None
        # nn.Module.compile() sets this same attribute; it takes no wrapper, which late-binding the cache needs.
        region._compiled_call_impl = _RegionCall(region, graphs[kind], index)


class _ByGradients:
    """A compiled call for each pattern of which parameters need gradients; calls without gradients share the first."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self.make, self.first = make, make()
        self.calls: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def of(self, needs_gradient: tuple[bool, ...]) -> Callable[..., Any]:
        """Return the call for a pattern, empty where gradients are off."""
        if not needs_gradient:
            return self.first
        if needs_gradient not in self.calls:
            self.calls[needs_gradient] = self.make() if self.calls else self.first
        return self.calls[needs_gradient]


def _needs_gradient(module: nn.Module) -> tuple[bool, ...]:
    """Return `requires_grad` of every parameter of a module, or nothing where gradients are off."""
    return tuple(parameter.requires_grad for parameter in module.parameters()) if torch.is_grad_enabled() else ()


class _KindGraphs:
    """What the regions of one kind share: compiled calls for training, and for rollouts once there is one."""

    def __init__(self, model: nn.Module, state: "TransformState") -> None:
        self.model, self.state = model, state
        self.training = _ByGradients(lambda: _compiled(call_region, passes_for(state), model, state))

    @functools.cached_property
    def rollout(self) -> Callable[..., Any]:
        """The call that rollouts make."""
        return _compiled(call_region, rollout_passes_for(self.state), self.model, self.state)


def compile_whole(model: nn.Module, state: "TransformState") -> Callable[..., Any]:
    """Return the model's forward as one graph, for calls that carry a cache."""
    calls = _ByGradients(lambda: _compiled(_call_forward, passes_for(state), model, state))
    return lambda *args, **kwargs: calls.of(_needs_gradient(model))(model, *args, **kwargs)


def _compiled(
    function: Callable[..., Any], passes: list[Pass], model: nn.Module, state: "TransformState"
) -> Callable[..., Any]:
    compiler = GraphCompiler(passes, lambda: marked_tensors(model, state.plan), state.inner)
    state.compilers.append(compiler)
    return isolated(function, compiler)


def _call_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model.forward(*args, **kwargs)


class _RegionCall:
    """One region's compiled call; see the module's essay."""

    def __init__(self, region: nn.Module, graphs: _KindGraphs, index: int | None) -> None:
        self.region, self.graphs, self.index = region, graphs, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # part of a larger graph, such as decode="whole"
            return self.region._call_impl(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and self.index is not None:
            kwargs["past_key_values"] = LayerCache(cache, self.index)
        needs_gradient = _needs_gradient(self.region)
        if any(needs_gradient) and self.index is not None and args and "qerl_cache" not in kwargs:
            args = (_as_of_a_later_layer(args[0]), *args[1:])
        _mark_dynamic([*args, *kwargs.values()], kwargs.get("attention_mask"))
        pages = kwargs.get("qerl_cache")
        if pages is None or self.index is None:
            return self.graphs.training.of(needs_gradient)(self.region, *args, **kwargs)
        kwargs["qerl_cache"] = layer = pages.layer(self.index)
        mark_dynamic(layer.table_BP, (0, 1))
        mark_dynamic(layer.length_B, (0,))
        with torch.no_grad():
            return self.graphs.rollout(self.region, *args, **kwargs)


def _as_of_a_later_layer(hidden: Any) -> Any:
    """Return the input [B, T, D] of a region that trains as one that needs a gradient; see the essay."""
    if not isinstance(hidden, Tensor) or hidden.requires_grad or not hidden.is_floating_point():
        return hidden
    return (hidden.clone() if hidden.is_inference() else hidden.detach()).requires_grad_()


class LayerCache:
    """The part of a transformers cache that one layer sees.

    Attention calls `update` with its own index; here the index is known already, and ignoring the argument keeps it
    from becoming a guard.
    """

    def __init__(self, cache: Any, index: int) -> None:
        while len(cache.layers) <= index:  # a DynamicCache without a config grows as layers first write
            cache.layers.append(cache.layer_class_to_replicate())
        self.layer = cache.layers[index]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, D]; return all that attention may read."""
        return self.layer.update(key, value, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions are cached."""
        return self.layer.get_seq_length()


def _mark_dynamic(values: Iterable[Any], attention_mask: Any) -> None:
    for value in values:
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                mark_dynamic(tensor, (0, 2, 3) if tensor is attention_mask and tensor.dim() == 4 else (0, 1))
