"""The graphs of one decoder layer of each kind, as training and rollouts compile them, from shapes alone.

    the model on meta → inputs of one layer of each kind          a run of the plain model, which reads no value
    that layer, transformed on meta → Dynamo → our passes         region_calls.py, backend.py
    → AOTAutograd with Inductor's decompositions and the min-cut partitioner → forward and backward graph

These are the steps of a real run up to code generation, with symbolic rows and positions. What the forward graph
returns beside its result is what a layer keeps for backward; what lives on the way is liveness.py's to say.

The partitioner weighs by sizes, so a layer is shown as many tokens as a micro-batch has: tensors on meta cost nothing.
Attention is planned_attention.py's, since torch's own on meta would keep all scores.

What this module does not do: layers that read values on the way, such as a sparse choice of experts in plain Python.
Dynamo refuses them, and the error says so.

Shapes: B rows, S positions, N prompt tokens, D hidden width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qerl_compile.backend import GraphCompiler
from qerl_compile.errors import GraphError
from qerl_compile.isolation import call_region, isolated, mark_dynamic
from qerl_compile.model import TransformState
from qerl_compile.passes import Pass
from qerl_compile.region_calls import named_tensors, passes_for, rollout_passes_for
from qerl_compile.regions import decoder_layers
from qerl_compile.rl.footprint.liveness import Liveness, bytes_of, is_dynamic
from qerl_compile.rl.footprint.planned_attention import planned_attention
from qerl_compile.rl.rollout.cache import CacheShape, PagedCache, PrefillView, paged_attention

ROWS, POSITIONS = 4, 1000
"""What graphs are captured with. Dynamo gives equal sizes one symbol, so a symbol is told by the size it stands for."""


@dataclass(frozen=True)
class LayerCall:
    """How a model called a layer: the hidden states [B, S, D] first."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def layer_calls(model: nn.Module, paths: Iterable[str]) -> dict[str, LayerCall]:
    """Run a plain model on meta once and return how it called the layers `paths`, but for the mask.

    Updates and prefills pass no mask (rl/logit_head.py, rl/rollout/cache.py).
    """
    calls: dict[str, LayerCall] = {}
    layers = {path: layer for path, layer in decoder_layers(model).items() if path in set(paths)}
    for path, layer in layers.items():
        layer._compiled_call_impl = _recorder(path, layer, calls)  # what nn.Module.compile() sets
    # A ready 4-D mask: transformers decides about 2-D masks by looking at their values, which meta tensors lack.
    mask = torch.ones(ROWS, 1, POSITIONS, POSITIONS, dtype=torch.bool, device="meta")
    ids = torch.zeros(ROWS, POSITIONS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    finally:
        for layer in layers.values():
            layer._compiled_call_impl = None
    return calls


def _recorder(path: str, layer: nn.Module, calls: dict[str, LayerCall]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[path] = LayerCall(args, {**kwargs, "attention_mask": None})
        return layer._call_impl(*args, **kwargs)

    return call


class TrainingGraphs:
    """Forward and backward graph of a layer, as AOTAutograd's partitioner leaves them."""

    def __init__(self, forward: fx.Graph, backward: fx.Graph) -> None:
        self._symbols = {**_symbols(forward), **_symbols(backward)}
        inputs = forward.find_nodes(op="placeholder")
        weights = {node.name for node in inputs if not is_dynamic(node.meta.get("val"))}
        self._backward = Liveness(backward, counted=lambda node: node.name not in weights)
        self._kept = Liveness(forward).returned(like=_output(forward)[0])

    def kept_bytes(self, rows: int, positions: int) -> int:
        """Return what a layer keeps for its backward, its input included; what all layers share is not."""
        sizes = self._sizes(rows, positions)
        return sum(bytes_of(value, sizes) for value in self._kept)

    def backward_bytes(self, rows: int, positions: int) -> int:
        """Return the most that lives in its backward, what it kept included."""
        return self._backward.peak(self._sizes(rows, positions))

    def _sizes(self, rows: int, positions: int) -> dict[Any, int]:
        return _values(self._symbols, {ROWS: rows, POSITIONS: positions})


class PrefillGraph:
    """A layer's graph in a rollout that runs several prompts, packed one after the other."""

    def __init__(self, graph: fx.Graph) -> None:
        self._symbols = _symbols(graph)
        names = {"pages_k", "pages_v"}
        self._live = Liveness(graph, counted=lambda node: is_dynamic(node.meta.get("val")) and node.name not in names)

    def bytes(self, prompts: int, positions: int) -> int:
        """Return the most that lives while `prompts` prompts of `positions` tokens run, the layer's input included."""
        tokens = prompts * positions
        return self._live.peak(_values(self._symbols, {ROWS: prompts, POSITIONS: positions, ROWS * POSITIONS: tokens}))


def training_graphs(path: str, call: LayerCall, model: Any, state: TransformState) -> TrainingGraphs:
    """Compile a transformed layer on meta for training, up to code generation.

    Raises:
        GraphError: the layer cannot be captured.
    """
    hidden_BSD, *others = call.args
    hidden_BSD = torch.empty_like(hidden_BSD).requires_grad_()
    found = _compiled(path, model, passes_for(state), (hidden_BSD, *others), call.kwargs)
    return TrainingGraphs(*found)


def prefill_graph(path: str, call: LayerCall, model: Any, state: TransformState) -> PrefillGraph:
    """Compile a transformed layer on meta for a rollout's prefill; rollouts' buffers are attached.

    Raises:
        GraphError: the layer cannot be captured.
    """
    tokens = ROWS * POSITIONS

    def packed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(packed, value))
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        return value.new_empty(1, tokens, *value.shape[2:]) if value.dim() < 4 else None

    cache = PagedCache(CacheShape.of(model, 64), 8, torch.device("meta"))
    pages = -(-POSITIONS // 64)
    view = PrefillView(cache, [[0] * POSITIONS] * ROWS, [range(pages)] * ROWS).layer(0)
    mark_dynamic(view.table_BP, (0, 1))
    mark_dynamic(view.length_B, (0,))
    kwargs = {name: packed(value) for name, value in call.kwargs.items()}
    with torch.no_grad(), paged_attention(model):
        args = tuple(map(packed, call.args))
        (graph,) = _compiled(path, model, rollout_passes_for(state), args, {**kwargs, "qerl_cache": view})
    return PrefillGraph(graph)


def _compiled(
    path: str, model: Any, passes: list[Pass], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[fx.Graph, ...]:
    """Return forward and backward graph of a layer, or its one graph where no gradient is asked for."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found: list[fx.Graph] = []

    def partition(joint: fx.GraphModule, inputs: Any, **given: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        parts = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **given)
        found.extend(part.graph for part in parts)
        return parts

    def run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(gm.forward)

    def infer(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(gm.graph)
        return make_boxed_func(gm.forward)

    def inner(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for node in gm.graph.find_nodes(op="call_function", target=nn.functional.scaled_dot_product_attention):
            node.target = planned_attention
        gm.recompile()
        table = select_decomp_table()
        return aot_module_simplified(gm, inputs, run, run, partition, table, inference_compiler=infer)

    # A backend may be a function wherever it may be a name; GraphCompiler only hands it on.
    compiler = GraphCompiler(passes, lambda: named_tensors(model), cast(str, inner))
    _mark(args, kwargs)
    try:
        isolated(call_region, compiler)(model.get_submodule(path), *args, **kwargs)
    except TorchDynamoException as fault:
        raise GraphError(
            where=path,
            expected="a decoder layer whose graph can be read from shapes alone",
            got=str(fault).splitlines()[0],
            do="Run it without a plan; peaks are in metrics.jsonl as memory/peak_cuda_mib.",
        ) from fault
    return tuple(found)


def _mark(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Mark rows and positions dynamic, as region_calls.py does."""
    for value in (*args, *kwargs.values()):
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                mark_dynamic(tensor, (0, 1))


def _output(graph: fx.Graph) -> tuple[Any, ...]:
    (node,) = graph.find_nodes(op="output")
    return tuple(cast(Any, node.args[0]))


def _symbols(graph: fx.Graph) -> dict[Any, int]:
    """Return the symbols of a graph's inputs, with the size that each was captured with."""
    found: dict[Any, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found[size.node.expr] = int(cast(Any, size.node.hint))
    return found


def _values(symbols: Mapping[Any, int], sizes: Mapping[int, int]) -> dict[Any, int]:
    return {symbol: sizes.get(hint, hint) for symbol, hint in symbols.items()}
