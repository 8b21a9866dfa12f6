"""Regions: the modules that are compiled one by one, and a way to look inside them before any weight is read.

A region is a decoder layer. Compiling layers instead of the model keeps compile time flat in depth: Dynamo captures
one layer and reuses its graph for all that are alike (design/compiler.md B1: two graphs at any depth for training). A
model's decoder layers are the modules that transformers itself marks as the unit of checkpointing,
`GradientCheckpointingLayer`; no family is named here.

`capture` finds out what a layer computes without its weights: the model is copied to the meta device (shapes, no
storage), run once on eight tokens, and one layer of each kind is caught by Dynamo on the way. Which linears
share an input and which norm feeds them are then facts of that graph.

What this module does not do: rewrite, or compile for running (`region_calls.py`).
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from qerl_compile.errors import GraphError
from qerl_compile.graph import Program, linear_parts, unlift
from qerl_compile.grouped_nodes import grouped_products, stacked_parameters
from qerl_compile.isolation import call_region, isolated


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's decoder layers by module path, in order.

    Raises:
        GraphError: the model has none that transformers marks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in layers)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            layers[path] = module
    if not layers:
        raise GraphError(
            where=type(model).__name__,
            expected="decoder layers derived from transformers' GradientCheckpointingLayer",
            got="none",
            do="Use a causal LM of transformers 5.17 or newer, or torch.compile(model, backend='qerl').",
        )
    return layers


def skeleton(model: nn.Module) -> nn.Module:
    """Copy `model` to the meta device: same modules, shapes and dtypes, no storage, nothing read."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def kind(layer: nn.Module) -> tuple[object, ...]:
    """Return what two layers must agree on to compute the same function of their weights."""
    parts = [(path, type(module).__qualname__) for path, module in layer.named_modules()]
    return (*parts, *((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters()))


@dataclass(frozen=True)
class LayerFacts:
    """What the graph of one layer says; module paths are full paths.

    Attributes:
        linears: every linear called with a weight of its own.
        groups: linears that read the same node, in call order; only groups of two or more.
        norms: modules whose 1-D weight scales the input of a linear, such as input_layernorm; in a layer with experts
            only where nothing but linears reads it, so that no router does.
        feeds: (module, linears): a norm, or a linear that is one factor of a product such as up_proj, where nothing but
            these linears reads the result. A factor per channel can be moved from the one into the others.
        stacks: tensors [E, N, K] of experts that rows sorted by expert are multiplied with (grouped_nodes.py).
    """

    linears: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    norms: tuple[str, ...]
    feeds: tuple[tuple[str, tuple[str, ...]], ...] = field(default=(), compare=False)
    stacks: tuple[str, ...] = ()

    def renamed(self, old: str, new: str) -> "LayerFacts":
        """Return the same facts about another layer of the same kind."""

        def move(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new + path.removeprefix(old) for path in paths)

        return LayerFacts(
            linears=move(self.linears),
            groups=tuple(map(move, self.groups)),
            norms=move(self.norms),
            feeds=tuple((move((source,))[0], move(linears)) for source, linears in self.feeds),
            stacks=move(self.stacks),
        )


def layer_facts(program: Program) -> LayerFacts:
    """Read linears, groups that share an input, and feeding norms off a captured layer."""
    by_input: dict[fx.Node, list[str]] = {}
    for node, path in program.linears():
        by_input.setdefault(linear_parts(node).x, []).append(path)
    path_of = dict(program.linears())
    stacks = dict.fromkeys(str(product.weight.target) for product in grouped_products(program))

    def feeds_linears_only(x: fx.Node) -> bool:
        return all(user in path_of and linear_parts(user).x is x for user in x.users)

    # With experts, whatever else reads a norm is a router, which noise would make choose others.
    sources = [x for x in by_input if not stacks or feeds_linears_only(x)]
    norms = dict.fromkeys(norm for x in sources for norm in _feeding_norms(x))
    feeds = [
        (source, tuple(paths))
        for x, paths in by_input.items()
        if feeds_linears_only(x)
        for source in _sole_source(x, path_of)
    ]
    return LayerFacts(
        linears=tuple(path for paths in by_input.values() for path in paths),
        groups=tuple(tuple(paths) for paths in by_input.values() if len(paths) > 1),
        norms=tuple(norms),
        feeds=tuple(feeds),
        stacks=tuple(stacks),
    )


def _sole_source(x: fx.Node, path_of: dict[fx.Node, str]) -> list[str]:
    """Return the norm whose output `x` is, or the linear that is one factor of `x`, as a list of one; else none."""
    norms = list(_feeding_norms(x))
    if norms:
        return norms if len(norms) == 1 else []
    if x.op.startswith("call") and getattr(x.target, "__name__", x.target) == "mul":
        factors = [node for node in x.all_input_nodes if node in path_of and len(node.users) == 1]
        return [path_of[factors[0]]] if len(factors) == 1 else []
    return []


_POINTWISE = frozenset({"mul", "to", "type_as", "float", "add"})
"""How a norm's weight reaches its output: `w * x̂`, and `x̂ * (1 + w.float())` in Gemma, with casts around."""


def _feeding_norms(x: fx.Node) -> Iterator[str]:
    """Yield the module whose 1-D weight is multiplied into `x` last, if x is the output of a norm."""
    seen, stack = set[fx.Node](), [(x, 0)]
    while stack:
        node, depth = stack.pop()
        if node in seen or depth > 4:
            continue
        seen.add(node)
        value = node.meta.get("example_value")
        if node.op == "get_attr" and str(node.target).endswith(".weight") and value is not None and value.dim() == 1:
            yield str(node.target).removesuffix(".weight")
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op.startswith("call") and name in _POINTWISE and _same_module(node, x):
            stack += [(source, depth + 1) for source in node.all_input_nodes]


def _same_module(node: fx.Node, x: fx.Node) -> bool:
    """Whether two calls come from one module, so that a walk stays inside the norm and off the residual stream."""
    stacks = [list((n.meta.get("nn_module_stack") or {}).values()) for n in (node, x)]
    return bool(stacks[0] and stacks[1]) and stacks[0][-1] == stacks[1][-1]


def capture(model: nn.Module) -> dict[str, LayerFacts]:
    """Return the facts of every decoder layer of `model`, which may be on any device; no weight is read.

    Raises:
        GraphError: Dynamo cannot capture a layer in one graph, or the model computes with values that it looks at, such
            as the largest position of a batch in a dynamic rotary embedding.
    """
    from torch._dynamo.exc import TorchDynamoException

    shadow = skeleton(model).eval()
    layers = decoder_layers(shadow)
    names = {id(t): name for name, t in [*shadow.named_parameters(), *shadow.named_buffers()]}
    facts: dict[str, LayerFacts] = {}
    first: dict[tuple[object, ...], str] = {}
    calls: dict[str, Callable[..., object]] = {}
    for path, layer in layers.items():
        representative = first.setdefault(kind(layer), path)
        if representative == path:
            calls[path] = functools.partial(isolated(call_region, _recorder(facts, path, names)), layer)
        # what nn.Module.compile() sets; eager, layers would need meta kernels that torch lacks (float32 experts)
        layer._compiled_call_impl = calls[representative]
    try:
        run_on_meta(shadow)
    except TorchDynamoException as fault:
        raise GraphError(
            where=type(model).__name__,
            expected="decoder layers that torch.compile captures in one graph each",
            got=str(fault).splitlines()[0],
            do="Build it with experts_implementation='grouped_mm'; other ways to compute experts are no graph."
            if any(stacked_parameters(model))
            else "Report this model class; meanwhile torch.compile(model, backend='qerl') may work.",
        ) from fault
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as fault:
        dynamic = "'dynamic'" in str(getattr(model.config, "rope_parameters", None))
        raise GraphError(
            where=type(model).__name__,
            expected="a forward that runs on shapes alone, with a mask [B, 1, T, T]",
            got=f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]}",
            do="Set rope_parameters['rope_type'] to one that no batch changes, such as yarn."
            if dynamic
            else "Use another architecture; this one's forward does not pass through torch's meta device.",
        ) from fault
    unseen = [path for path in first.values() if path not in facts]
    if unseen:
        raise GraphError(
            where=unseen[0],
            expected="a decoder layer that runs when the model is called on token ids",
            got="a layer that is not called, such as one of a vision tower",
            do="Use the text-only class of this model, such as Gemma3ForCausalLM.",
        )
    return {path: facts[first[kind(layer)]].renamed(first[kind(layer)], path) for path, layer in layers.items()}


def run_on_meta(model: nn.Module) -> None:
    """Run a model whose parameters are on meta on two rows of eight tokens, so that its layers get captured."""
    # A ready 4-D mask: transformers decides about 2-D masks by looking at their values, which meta tensors lack.
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool, device="meta")
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def _recorder(facts: dict[str, LayerFacts], path: str, names: dict[int, str]):  # noqa: ANN202  # a Dynamo backend
    def backend(gm: fx.GraphModule, example_inputs: list[torch.Tensor]):  # noqa: ANN202
        facts[path] = layer_facts(unlift(gm, example_inputs, names))
        return gm.forward

    return backend
