"""The last sum of a layer, in rollout graphs: x + f(x) moves into the linear that made f(x).

    before   f = qerl::adapted_linear(h, codes, …, A, B)        [..., N]
             return x + f
    after    return qerl::adapted_linear(h, codes, …, A, B, x)

In the middle of a layer Inductor makes such a sum part of the norm behind it. At the end of a region nothing is behind
it, so it is a kernel of its own: 1.7 µs and a gap, once a layer, for a few thousand elements that the GEMM's epilogue
has in registers anyway. Rounding is that of two nodes: f is rounded to its dtype before x is added.

What does not match is left as it is: sums that anything but the graph's output reads, sums of other shapes or dtypes,
dense linears, whose product is cuBLAS's.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qerl_compile.graph import Program

_ADAPTED = torch.ops.qerl.adapted_linear.default
_SUMS: tuple[object, ...] = (operator.add, torch.add, "add")
_OPERANDS = 6  # of an adapted linear that has no residual yet


@dataclass(frozen=True)
class Residual:
    """Lets `qerl::adapted_linear` add what its result is added to at the end of a graph."""

    def __call__(self, program: Program) -> None:
        """Rewrite every sum that only the output reads."""
        for node in list(program.graph.nodes):
            if node.target not in _SUMS or len(node.args) != 2 or node.kwargs:
                continue
            if [user.op for user in node.users] != ["output"]:
                continue
            for linear, other in (node.args, node.args[::-1]):
                if _only_here(linear) and _alike(linear, other):
                    with program.replacing(node) as result:
                        result.append(program.call(_ADAPTED, *linear.args, other))
                    program.graph.erase_node(linear)
                    break


def _only_here(node: Any) -> bool:
    """Whether `node` is an adapted linear without a residual, read once."""
    adapted = isinstance(node, fx.Node) and node.target is _ADAPTED
    return adapted and len(node.args) == _OPERANDS and not node.kwargs and len(node.users) == 1


def _alike(linear: fx.Node, other: Any) -> bool:
    """Whether both are known to be tensors of one shape and dtype."""
    pair = [node.meta.get("example_value") if isinstance(node, fx.Node) else None for node in (linear, other)]
    a, b = pair
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or other is linear:
        return False
    return a.shape == b.shape and a.dtype == b.dtype
