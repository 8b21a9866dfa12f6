"""Fuse linears that share an input: q/k/v and gate/up become one GEMM each.

    before      q = linear(x, Wq, bq);  k = linear(x, Wk, bk);  v = linear(x, Wv, bv)
    after       f = linear(x, cat([Wq, Wk, Wv]), cat([bq, bk, bv]));  q, k, v = split(f, [Nq, Nk, Nv], -1)

Two reasons. At decode the launch latency of a small projection is as large as its work, so one launch instead of
three matters (design/kernels.md section 3). And serving engines fuse the same linears and keep one global scale for the
fused weight, so the members must have been quantized with one shared amax: the group is where that is decided.

The `cat` here is notation. The quantize pass, which runs next, replaces `linear(x, cat(...))` by one packed GEMM over a
tensor in which the members already lie one after another, so no concatenation runs. Under the bare backend, where
weights stay ordinary, it is a real cat and gives the members one shared scale.

What this pass does not do: look for groups (plan.py finds them in the captured graph), or fuse dense linears.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from qerl_compile.graph import LINEAR, Program, linear_parts


@dataclass(frozen=True)
class Fuse:
    """Fuses each group (module paths, in the order in which their rows lie in the fused weight)."""

    groups: tuple[tuple[str, ...], ...]

    def __call__(self, program: Program) -> None:
        """Rewrite each group whose members all read the same input in this graph."""
        linears = {path: node for node, path in program.linears()}
        for group in self.groups:
            nodes = [linears[path] for path in group if path in linears]
            if len(nodes) == len(group) and fusible(nodes):
                _fuse(program, nodes)


def fusible(nodes: list[fx.Node]) -> bool:
    """Whether linears read one input, each has its own weight, and all or none have a bias."""
    inputs, weights, biases = zip(*map(linear_parts, nodes), strict=True)
    distinct = len(set(weights)) == len(nodes)
    return len(set(inputs)) == 1 and distinct and len({bias is None for bias in biases}) == 1


def _fuse(program: Program, nodes: list[fx.Node]) -> None:
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    first = min(nodes, key=order.__getitem__)
    inputs, weights, biases = zip(*map(linear_parts, nodes), strict=True)
    rows = [program.rows(node) for node in nodes]
    with program.graph.inserting_before(first):
        weight = program.call(torch.cat, list(weights))
        bias = None if biases[0] is None else program.call(torch.cat, list(biases))
        fused = program.call(LINEAR, inputs[0], weight, bias)
        parts = program.call(torch.functional.split, fused, rows, -1)
    for key in ("nn_module_stack", "stack_trace"):
        if key in first.meta:
            fused.meta[key] = parts.meta[key] = first.meta[key]
    for index, node in enumerate(nodes):
        with program.replacing(node) as result:
            result.append(program.call(operator.getitem, parts, index))
