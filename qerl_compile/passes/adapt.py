"""Adapters in rollout graphs: one operator per linear, where a training graph has a branch per adapter.

    before   f = qerl::quantized_linear(x, fused codes, …)            what fuse and quantize left of q/k/v
             b = cat([bq, bk, bv])
    after    f = qerl::adapted_linear(x, fused codes, …, A, B)
             b = fused_bias

    before   f = linear(x, cat([Wq, Wk, Wv]), cat([bq, bk, bv]))      the same group with dense weights
    after    f = qerl::adapted_dense_linear(x, fused_weight, fused_bias, A, B)

The members' adapters are stacked, with s = alpha / rank folded in:

    A [R, K] = s₁·A₁     B [N, R] = B₁ 0  0      row block i: the rows of member i in the fused weight
               s₂·A₂                0  B₂ 0      column block i: the ranks of member i
               0                                 a member without an adapter has no ranks and rows of zeros

so 2 small GEMMs do what 2 per member did, and their zeros cost less than launches: at decode a GEMM of this size is
all latency. R is padded with zeros to a rank that the packed kernels add in their epilogue.

Why a pass of its own and no pattern over LoRA branches: rollout graphs are never differentiated, so the lora pass,
which exists to give autograd the members' own factors, does not run in them (noise → fuse → quantize → adapt). Nothing
is inserted only to be matched again.

A member that the fuse pass left alone (no shared input in this graph, or biases on some only) reads its own blocks of
the stacked factors. What this pass does not do: fill them (stacked_adapters.py).
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from qerl_compile.errors import GraphError
from qerl_compile.graph import LINEAR, Program, held_tensor, leaf_tensor, linear_parts
from qerl_compile.kernels import adapted as _adapted  # noqa: F401  # registers the operators
from qerl_compile.kernels.cuda import RANKS
from qerl_compile.passes.lora import LoraSite

DERIVED = ("stacked_lora_A", "stacked_lora_B", "fused_weight", "fused_bias")
"""Buffers that rollouts add to the first module of a group; none is saved."""

_QUANTIZED = torch.ops.qerl.quantized_linear.default


@dataclass(frozen=True)
class Block:
    """Where one member of a group lies: its rows of the fused weight, and its ranks among the stacked ones."""

    rows: slice
    ranks: slice


def blocks(members: Mapping[str, nn.Module], sites: Mapping[str, LoraSite]) -> dict[str, Block]:
    """Return the block of each member, in order; one without an adapter has no ranks."""
    found: dict[str, Block] = {}
    row = rank = 0
    for path, module in members.items():
        last_row = row + held_tensor(module, "weight").shape[0]
        last_rank = rank + (sites[path].rank if path in sites else 0)
        found[path] = Block(slice(row, last_row), slice(rank, last_rank))
        row, rank = last_row, last_rank
    return found


def padded_rank(rank: int) -> int:
    """Return the R that `rank` is padded to: one that the packed kernels add, or the next multiple of 16."""
    return next((width for width in RANKS if rank <= width), -(-rank // 16) * 16)


@dataclass(frozen=True)
class Adapt:
    """Gives the linears of `sites` their adapter; `groups` are those whose weights may be fused."""

    sites: Mapping[str, LoraSite]
    groups: tuple[tuple[str, ...], ...] = ()

    @staticmethod
    def state(members: Mapping[str, nn.Module], sites: Mapping[str, LoraSite]) -> None:
        """Give the first of `members` zeroed buffers `stacked_lora_A` [R, K] and `stacked_lora_B` [N, R]."""
        places = list(blocks(members, sites).values())
        first = next(iter(members.values()))
        weight = held_tensor(first, "weight")
        rank = padded_rank(places[-1].ranks.stop)
        for name, shape in (
            ("stacked_lora_A", (rank, weight.shape[1])),
            ("stacked_lora_B", (places[-1].rows.stop, rank)),
        ):
            first.register_buffer(name, weight.new_zeros(shape), persistent=False)

    def __call__(self, program: Program) -> None:
        """Read fused tensors where groups were concatenated, then rewrite every linear that has an adapter."""
        for node in list(program.graph.find_nodes(op="call_function", target=torch.cat)):
            self._read_fused(program, node)
        for target in (LINEAR, _QUANTIZED):
            for node in list(program.graph.find_nodes(op="call_function", target=target)):
                self._adapt(program, node)

    def _read_fused(self, program: Program, cat: fx.Node) -> None:
        """Replace `cat` of the weights or biases of a group by the tensor of which they are slices."""
        parts = cat.all_input_nodes
        names = [str(part.target).rpartition(".") for part in parts]
        members, leaves = tuple(path for path, _, _ in names), {leaf for _, _, leaf in names}
        if members not in self.groups or leaves not in ({"weight"}, {"bias"}):
            return
        with program.replacing(cat) as result:
            result.append(_derived(program, members[0], f"fused_{leaves.pop()}"))
        for part in parts:
            if not part.users:
                program.graph.erase_node(part)

    def _adapt(self, program: Program, node: fx.Node) -> None:
        weight = linear_parts(node).weight if node.target is LINEAR else node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return
        path, _, leaf = str(weight.target).rpartition(".")
        group = next((group for group in self.groups if path in group), (path,))
        adapted = group if leaf.startswith("fused_") else (path,)
        if not any(member in self.sites for member in adapted):
            return
        with program.replacing(node) as result:
            a, b = (_derived(program, group[0], name) for name in ("stacked_lora_A", "stacked_lora_B"))
            if adapted != group:
                a, b = self._block(program, group, path, a, b)
            if node.target is LINEAR:
                result.append(program.call(torch.ops.qerl.adapted_dense_linear.default, *linear_parts(node), a, b))
            else:
                result.append(program.call(torch.ops.qerl.adapted_linear.default, *node.args, a, b))

    def _block(
        self, program: Program, group: Sequence[str], path: str, a: fx.Node, b: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        block = blocks({member: program.modules[member] for member in group}, self.sites)[path]
        return (
            program.call(operator.getitem, a, block.ranks),
            program.call(operator.getitem, b, (block.rows, block.ranks)),
        )


def _derived(program: Program, path: str, name: str) -> fx.Node:
    """Insert a read of a derived buffer, which must be there."""
    module = program.modules.get(path)
    if module is None or leaf_tensor(module, name) is None:
        raise GraphError(
            where=f"{path}.{name}",
            expected="the buffers that rollout graphs read",
            got="a module without them",
            do="Call qerl_compile.stacked_adapters.refresh_stacked_adapters(model) before each rollout.",
        )
    return program.weight(f"{path}.{name}")
