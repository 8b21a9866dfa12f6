"""What lives when: the memory of a graph, read off its nodes without running it.

    buffers    a node that must lie in memory: (bytes, born at node i, last read at node j)
    peak       the most bytes that buffers with i <= t <= j have together, over all t

Bytes are expressions in symbolic sizes (rows, positions), so that one capture answers for every batch.

**What lies in memory.** Inductor runs elementwise operators and reductions fused with what reads them. A product, an
operator of ours, attention need their operands in memory. So an elementwise node is a buffer only if such a node or the
caller reads it, or if several read it and one of them stands behind such a node; otherwise whatever it is computed
from lives until it is used. Views are no memory but keep their base alive. This is the rule of thumb of a fusing
compiler and not its scheduler, which orders nodes for less memory still.

What a call allocates and frees within itself lives at its node alone; operator_scratch.py knows it.

What this module does not do: count what is there anyway (weights, adapters): inputs with fixed sizes are not buffers
unless the caller says so.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qerl_compile.rl.footprint.operator_scratch import scratch_of

GRAIN = 512
"""CUDA's caching allocator hands out multiples of this."""

_FUSED_READERS = frozenset({"sum", "mean", "amax", "amin", "var_mean", "prod"})
_FREE = frozenset({"full", "full_like", "iota", "arange", "scalar_tensor", "lift_fresh_copy", "empty"})
_COPIES = frozenset({"clone", "_to_copy", "convert_element_type", "where", "copy", "constant_pad_nd"})
_VIEWS = frozenset({"_unsafe_view", "reshape", "alias"})


@dataclass(frozen=True)
class Buffer:
    """One piece of memory: `size` bytes from node `born` to node `dies`, both included."""

    node: fx.Node
    size: Any
    born: int
    dies: int


def rounded(size: int) -> int:
    """Return what the caching allocator gives out for `size` bytes."""
    return -(-size // GRAIN) * GRAIN


def bytes_of(value: Any, sizes: Mapping[Any, int]) -> int:
    """Return the bytes of a tensor whose sizes may be symbols, with those replaced by numbers.

    Args:
        value: a tensor of a graph's metadata, or a tuple of such.
        sizes: sympy symbol → number.
    """
    if isinstance(value, (tuple, list)):
        return sum(bytes_of(each, sizes) for each in value)
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else int(size.node.expr.subs(sizes))
    return rounded(count * value.element_size())


def is_dynamic(value: Any) -> bool:
    """Whether a tensor has a size that is a symbol: what comes with a batch, and not with the model."""
    return isinstance(value, torch.Tensor) and any(not isinstance(size, int) for size in value.shape)


class Liveness:
    """The buffers of one graph.

    Args:
        graph: as AOTAutograd leaves it, every node typed by `meta["val"]`.
        counted: which placeholders are memory of this graph; None for those with symbolic sizes.
    """

    def __init__(self, graph: fx.Graph, *, counted: Callable[[fx.Node], bool] | None = None) -> None:
        self.nodes = list(graph.nodes)
        self.at = {node: index for index, node in enumerate(self.nodes)}
        self.counted = counted or (lambda node: is_dynamic(node.meta.get("val")))
        barriers, count = {}, 0
        for node in self.nodes:
            barriers[node] = count
            count += _is_opaque(node)
        self.barriers = barriers
        self.buffers = self._buffers()

    def peak(self, sizes: Mapping[Any, int]) -> int:
        """Return the most bytes that live at a time, for these values of the symbols."""
        change = [0] * (len(self.nodes) + 1)
        for buffer in self.buffers:
            size = bytes_of(buffer.size, sizes)
            change[buffer.born] += size
            change[buffer.dies + 1] -= size
        most = now = 0
        for step in change:
            now += step
            most = max(most, now)
        return most

    def returned(self, *, like: fx.Node) -> list[Any]:
        """Return the values that the graph hands out beside its first result and what all its like share.

        Args:
            like: the first result; of the inputs that come with a batch, only those of its shape are one layer's own.
        """
        (output,) = (node for node in self.nodes if node.op == "output")
        kept = dict.fromkeys(self._root(node) for node in output.args[0][1:] if isinstance(node, fx.Node))
        kept.pop(self._root(like), None)
        shape = like.meta["val"].shape
        own: list[Any] = []
        for node in kept:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            if node.op != "placeholder" or (is_dynamic(value) and value.shape == shape):
                own.append(value)
        return own

    def _buffers(self) -> list[Buffer]:
        last = self._last_reads()
        found: list[Buffer] = []
        for node in self.nodes:
            value = node.meta.get("val")
            if node.op == "output" or value is None or self._root(node) is not node:
                continue
            if node.op == "placeholder":
                if self.counted(node):
                    found.append(Buffer(node, value, 0, last.get(node, 0)))
            elif self._in_memory(node):
                found += self._of_call(node, value, last)
                found += (Buffer(node, each, self.at[node], self.at[node]) for each in scratch_of(node))
        return found

    def _of_call(self, node: fx.Node, value: Any, last: Mapping[fx.Node, int]) -> list[Buffer]:
        born = self.at[node]
        if not isinstance(value, (tuple, list)):
            return [Buffer(node, value, born, last.get(node, born))]
        taken = {user.args[1]: user for user in node.users if _is_getitem(user)}
        own = _own_results(node, len(value))
        parts = [(index, each) for index, each in enumerate(value) if index < own]
        return [
            Buffer(node, each, born, last.get(taken[index], born) if index in taken else born) for index, each in parts
        ]

    def _last_reads(self) -> dict[fx.Node, int]:
        """Return at which node a buffer is read for the last time, through views and through what is fused."""
        last: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node.op != "output" and not (node.op.startswith("call") and self._reads_memory(node)):
                continue
            for source in self._sources(node):
                last[source] = self.at[node]
        return last

    def _reads_memory(self, node: fx.Node) -> bool:
        return not _is_view(node) and not _is_getitem(node) and self._in_memory(node)

    def _sources(self, node: fx.Node) -> Iterable[fx.Node]:
        """Yield the buffers that a node reads, those that come through fused nodes included."""
        seen: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            root = self._root(stack.pop())
            if root in seen:
                continue
            seen.add(root)
            if root.op.startswith("call") and not _is_getitem(root) and not self._in_memory(root):
                stack += root.all_input_nodes
            else:
                yield root

    def _root(self, node: fx.Node) -> fx.Node:
        """Return the node whose memory a view looks at; a result of several is its `getitem`."""
        while True:
            if _is_view(node) or (_is_getitem(node) and _is_view(node.all_input_nodes[0])):
                node = node.all_input_nodes[0]
            else:
                return node

    def _in_memory(self, node: fx.Node) -> bool:
        if _is_getitem(node):
            return False  # counted with the call that has several results
        if _name(node) in _FREE:
            return False
        if not _is_fusible(node):
            return True
        readers = list(self._readers(node))
        if any(reader.op == "output" or _is_opaque(reader) for reader in readers):
            return True
        if _widens(node):
            return False  # made again from its narrow source wherever it is read
        # What several read, some of them behind a node that needs memory, is computed once and kept.
        return len(readers) > 1 and any(self.barriers[reader] != self.barriers[node] for reader in readers)

    def _readers(self, node: fx.Node) -> Iterable[fx.Node]:
        for user in node.users:
            if _is_view(user):
                yield from self._readers(user)
            else:
                yield user


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else str(target)


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or _name(node) in _VIEWS)


def _is_fusible(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op.startswith("call") and not isinstance(target, torch._ops.HigherOrderOperator)
    return torch.Tag.pointwise in target.tags or _name(node) in _COPIES


def _widens(node: fx.Node) -> bool:
    """Whether a node is a cast to a dtype with more bytes."""
    if _name(node) not in ("convert_element_type", "_to_copy"):
        return False
    source, result = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    return result.element_size() > source.element_size()


def _is_opaque(node: fx.Node) -> bool:
    """Whether a call reads its operands from memory: a product, attention, an operator of ours."""
    if not node.op.startswith("call") or _is_getitem(node) or _is_view(node):
        return False
    return not _is_fusible(node) and _name(node) not in _FUSED_READERS and _name(node) not in _FREE


def _own_results(node: fx.Node, count: int) -> int:
    """Return how many of a call's results are new memory: functionalized operators also return what they write to."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) and node.args:
        schema = getattr(node.args[0], "_schema", None)
        if schema is not None:
            return len(schema.returns)
    return count
