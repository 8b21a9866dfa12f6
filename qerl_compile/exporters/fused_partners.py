"""Linears that serving engines lay into one matrix: they must agree, or the engine computes with wrong weights.

vLLM, SGLang and TensorRT-LLM load q/k/v, gate/up and a few more as one matrix with one global scale, which is the
largest divisor (or multiplier) among the members: vLLM 0.33 warns and computes wrongly for the others, SGLang does so
without a word, TensorRT-LLM stops. The same holds for the scale of their common input. Members must also be packed
together or stay dense together, for a matrix is one or the other.

Known by name, because the fusing is done by name: these tuples are the values of `packed_modules_mapping` in vLLM
0.33.0's models that name more than one linear of a decoder (counted over all its files: q/k/v 124 times, gate/up 106,
w1/w3 3, the others once or twice).
"""

from collections.abc import Collection, Mapping

from torch import nn

from qerl_compile.errors import ExportError

FUSED_BY_ENGINES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Names of siblings that an engine loads into one matrix with one global scale."""


def partners(paths: Collection[str]) -> list[tuple[str, ...]]:
    """Return the sets of siblings among module paths that an engine fuses, in order of first appearance."""
    there = set(paths)
    sets: list[tuple[str, ...]] = []
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in paths):
        for names in FUSED_BY_ENGINES:
            members = tuple(path for name in names if (path := f"{parent}.{name}".removeprefix(".")) in there)
            if len(members) > 1:
                sets.append(members)
    return sets


def check_partners(model: nn.Module, packed: Collection[str], scalars: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a model whose fused linears disagree.

    Args:
        model: any module tree.
        packed: paths of its packed linears.
        scalars: what must be equal among partners, such as "global scale" → path → the number as it will be written.

    Raises:
        ExportError: names the parent and the members.
    """
    for members in partners(dict.fromkeys([*(path for path, _ in model.named_modules()), *packed])):
        parent = members[0].rpartition(".")[0]
        inside = [member for member in members if member in packed]
        if inside and len(inside) < len(members):
            raise ExportError(
                where=parent,
                expected=f"all of {', '.join(members)} packed or none, since engines fuse them",
                got=f"only {', '.join(inside)}",
                do="Make the recipe's quantize rules select them together.",
            )
        for what, numbers in scalars.items():
            values = {member: numbers[member] for member in inside if member in numbers}
            if len(set(values.values())) > 1:
                raise ExportError(
                    where=parent,
                    expected=f"one {what} for linears that engines fuse",
                    got=", ".join(f"{member} {value:g}" for member, value in values.items()),
                    do="Quantize them as a group: load the dense checkpoint with a recipe.",
                )
