"""Between the projections and attention, in decode graphs: bias and rotary embedding move into the attention operator.

    before   f = p + bias                                                                  p [B, 1, (H + 2 J) D]
             x_q, x_k, x_v = (part.view(B, 1, -1, D).transpose(1, 2) for part in split(f, [H D, J D, J D], -1))
             c, s = cos.unsqueeze(1), sin.unsqueeze(1)                                     [B, 1, 1, D]
             q = x_q * c + cat([-x_q[..., h:], x_q[..., :h]], -1) * s                      [B, H, 1, D], h = D / 2
             k = ...                                                                       the same of x_k
             y = qerl::paged_decode(q.squeeze(2), k.squeeze(2), x_v.squeeze(2), pages…)
    after    y = qerl::paged_decode(p[heads of q], p[heads of k], p[heads of v], pages…, c[:, 0, 0], s[:, 0, 0], bias)

Inductor makes a kernel each of q, k and v: of a bias alone too, since what it hands to an operator it computes slice by
slice. At one row each takes 1.3 µs and a gap, for a few thousand elements that the attention kernel reads anyway.
Without them the operator gets views of the projection's output.

Without a bias, or where norms come between (Qwen 3, Gemma 3), only the embedding moves: x_q and x_k are what is there.

Rounding is Inductor's: the operator computes in float32 from the projection on and rounds once.

What does not match is left as it is: embeddings of a part of the head dimension, of interleaved pairs, of q alone, with
different tables for q and k, in a dtype that is not the model's; and prefill, which has no `paged_decode`.
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from qerl_compile.graph import Program
from qerl_compile.kernels import paged_attention as _paged_attention  # noqa: F401  # registers qerl::paged_*

_DECODE = torch.ops.qerl.paged_decode
_SPELLINGS: dict[str, tuple[object, ...]] = {
    "add": (operator.add, torch.add, "add"),
    "mul": (operator.mul, torch.mul, "mul"),
    "neg": (operator.neg, torch.neg, "neg"),
    "cat": (torch.cat,),
    "getitem": (operator.getitem,),
    "squeeze": (torch.squeeze, "squeeze"),
    "split": (torch.functional.split, torch.split, "split"),
    "transpose": (torch.transpose, "transpose"),
    "view": ("view", "reshape", torch.reshape),
    "decode": (_DECODE, _DECODE.default),
}
"""What each operation is called in a Dynamo graph, as a function or as a method."""


class _Rotated(NamedTuple):
    """What a rotated tensor was made of: x [B, H, 1, D], cos and sin [B or 1, 1, 1, D]."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@dataclass(frozen=True)
class Rotary:
    """Moves biases of q, k and v and rotary embeddings of q and k into `qerl::paged_decode`."""

    def __call__(self, program: Program) -> None:
        """Rewrite every call whose q and k are rotated by the same tables."""
        for node in list(program.graph.nodes):
            given = _operands(node, "decode", 9)
            if given is None:
                continue
            q, k = (_rotated(x) for x in given[:2])
            if q is None or k is None or q[1:] != k[1:]:
                continue
            with program.replacing(node) as result:
                before = _without_bias(program, q.x, k.x, given[2])
                new = before or [program.call(torch.squeeze, q.x, 2), program.call(torch.squeeze, k.x, 2), given[2]]
                tables = [program.call(operator.getitem, table, (slice(None), 0, 0)) for table in q[1:]]
                result.append(program.call(_DECODE.default, *new[:3], *given[3:], *tables, *new[3:]))
            _erase_unused(program, given[:3])


def _without_bias(program: Program, q: fx.Node, k: fx.Node, v: Any) -> list[fx.Node] | None:
    """Insert q, k, v [B, heads, D] as they are before their bias, and that bias; None if the graph has no such sum."""
    squeezed = _operands(v, "squeeze", 2)
    parts = [_part(x) for x in (q, k, squeezed[0] if squeezed and squeezed[1] in (2, -2) else None)]
    found = [part for part in parts if part is not None]
    cut = _operands(found[0][0], "split", 3) if found else None
    if cut is None or cut[2] not in (-1, 2) or found != [(found[0][0], index) for index in range(3)]:
        return None
    d, widths = _shape(q)[3], [_shape(x)[1] for x in (q, k)]
    heads = widths[0] + 2 * widths[1]
    for whole, bias in _both_ways(cut[0], "add"):
        fits = _shape(whole)[1:] == (1, heads * d) and _shape(bias) == (heads * d,)
        if fits and _dtype(whole) == _dtype(bias):
            apart = program.call(torch.unflatten, whole, 2, (heads, d))
            ends = (0, widths[0], widths[0] + widths[1], heads)
            slices = [(slice(None), 0, slice(begin, end)) for begin, end in itertools.pairwise(ends)]
            new = [program.call(operator.getitem, apart, where) for where in slices]
            return [*new, program.call(torch.unflatten, bias, 0, (heads, d))]
    return None


def _part(x: Any) -> Any:
    """(split, i) if x [B, heads, 1, D] is its i-th part [B, 1, heads * D], heads apart; else None."""
    turned = _operands(x, "transpose", 3)
    if turned is None or {*turned[1:]} != {1, 2} or not _spelled(turned[0], "view"):
        return None
    got = _operands(turned[0].args[0], "getitem", 2)
    _, heads, one, d = _shape(x)
    return got if got is not None and one == 1 and _shape(turned[0].args[0])[1:] == (1, heads * d) else None


def _spelled(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.target in _SPELLINGS[name]


def _operands(node: Any, name: str, count: int) -> tuple[Any, ...] | None:
    """The `count` operands of a node that is this operation, a `dim` given by keyword among them; else None."""
    if not _spelled(node, name):
        return None
    given = (*node.args, *(value for keyword, value in node.kwargs.items() if keyword == "dim"))
    return given if len(given) == count == len(node.args) + len(node.kwargs) else None


def _rotated(node: Any) -> _Rotated | None:
    """Match squeeze(x * cos + cat([-x[..., h:], x[..., :h]], -1) * sin, 2), sums and products in either order."""
    squeezed = _operands(node, "squeeze", 2)
    if squeezed is None or squeezed[1] not in (2, -2):
        return None
    for plain, turned in _both_ways(squeezed[0], "add"):
        for x, cos in _both_ways(plain, "mul"):
            for other, sin in _both_ways(turned, "mul"):
                if _is_half_turn(other, x) and _is_table(cos, x) and _is_table(sin, x):
                    return _Rotated(x, cos, sin)
    return None


def _both_ways(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    given = _operands(node, name, 2)
    if given is not None:
        yield given[0], given[1]
        yield given[1], given[0]


def _is_half_turn(node: Any, x: Any) -> bool:
    """Whether `node` is cat([-x[..., h:], x[..., :h]], -1) and x is [B, H, 1, 2 h]."""
    joined, shape = _operands(node, "cat", 2), _shape(x)
    if joined is None or joined[1] not in (-1, 3) or len(joined[0]) != 2 or len(shape) != 4 or shape[2] != 1:
        return False
    high = _operands(joined[0][0], "neg", 1)
    halves = (_operands(high and high[0], "getitem", 2), _operands(joined[0][1], "getitem", 2))
    h = shape[3] // 2
    wanted = ((x, (..., slice(h, None))), (x, (..., slice(None, h))))
    return shape[3] % 2 == 0 and halves == wanted


def _is_table(node: Any, x: fx.Node) -> bool:
    """Whether `node` is [any, 1, 1, D] in the dtype of x [B, H, 1, D]."""
    shape = _shape(node)
    alike = len(shape) == 4 and tuple(shape[1:]) == (1, 1, _shape(x)[3])
    return alike and _dtype(node) == _dtype(x)


def _shape(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor; none where they are not known."""
    example = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(example.shape) if isinstance(example, torch.Tensor) else ()


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["example_value"].dtype


def _erase_unused(program: Program, nodes: tuple[Any, ...]) -> None:
    """Erase nodes that nobody reads any more, and then what only they had read."""
    for node in nodes:
        if not node.users and node.op.startswith("call"):
            inputs = tuple(node.all_input_nodes)
            program.graph.erase_node(node)
            _erase_unused(program, inputs)
