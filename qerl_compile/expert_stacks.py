"""Experts: one tensor in the model, one matrix each in files.

transformers keeps a layer's experts in stacks [E, N, K]; published checkpoints, and engines, know every expert as
linears of its own:

    model.layers.0.mlp.experts.gate_up_proj [E, 2I, D]     …mlp.experts.0.gate_proj.weight [I, D], …0.up_proj.weight, …
    model.layers.0.mlp.experts.down_proj    [E, D, I]      …mlp.experts.0.down_proj.weight [D, I], …

Which names belong to which stack is transformers' own knowledge (its conversion mapping, by which `from_pretrained`
merges and `save_pretrained` splits them), and it is read from there; no family is named here. The names of these
virtual linears are what recipes match, what files are read by and written with.

Described are models whose conversions do no more than stack experts and lay their parts one below the other: Qwen2-MoE,
Qwen3-MoE, OLMoE, DeepSeek-V3 and more. If a model has any other, such as a renamed router (Mixtral's
`block_sparse_moe`), none of its stacks is described: files name the rest of it differently too, and loading renames
nothing.

Shape suffixes: E experts, N rows of an expert's matrix, K columns, P parts of the rows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn


class Place(NamedTuple):
    """Where a virtual linear lies: in which stack, expert and rows."""

    stack: str
    expert: int
    rows: slice


@dataclass(frozen=True)
class Stack:
    """One stack of experts.

    Attributes:
        name: of the tensor [E, N, K], such as `model.layers.0.mlp.experts.gate_up_proj`.
        members: per expert the paths of its virtual linears, in the order of their rows; equally many rows each.
        rows: N.
        columns: K.
    """

    name: str
    members: tuple[tuple[str, ...], ...]
    rows: int
    columns: int

    @property
    def part_rows(self) -> int:
        """Rows of one virtual linear: N / P."""
        return self.rows // len(self.members[0])

    @property
    def module(self) -> str:
        """Path of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """What that module calls it."""
        return self.name.rpartition(".")[2]

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each virtual linear lies, by path."""
        step = self.part_rows
        return {
            path: Place(self.name, expert, slice(part * step, (part + 1) * step))
            for expert, parts in enumerate(self.members)
            for part, path in enumerate(parts)
        }


def expert_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return the stacks of a model by name, in its order; none for a model that is not of transformers.

    Only dense stacks are found: a packed one is described by the plan. Which way a stack lies is not looked at, see
    grouped_nodes.py.
    """
    tensors = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 3}
    if not tensors or not hasattr(model, "config"):
        return {}
    found: dict[str, Stack] = {}
    for target, sources in _conversions(model):
        for name, (experts, rows, columns) in tensors.items():
            if not name.endswith(target) or rows % len(sources):
                continue
            prefix = name.removesuffix(target)
            members = tuple(tuple(prefix + source.replace("*", str(e)) for source in sources) for e in range(experts))
            found[name] = Stack(name, members, rows, columns)
    return {name: found[name] for name in tensors if name in found}


def places_of(stacks: Mapping[str, Stack]) -> dict[str, Place]:
    """Return where every virtual linear of these stacks lies, by path."""
    return {path: place for stack in stacks.values() for path, place in stack.places.items()}


def _conversions(model: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Return (end of a stack's name, ends of its linears' paths with `*` for the expert), or nothing; see the essay."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    usable: list[tuple[str, tuple[str, ...]]] = []
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(conversion, "operations", ())]
        sources, targets = conversion.source_patterns, conversion.target_patterns
        stacking = steps == [("MergeModulelist", 0)] if len(sources) == 1 else steps == [STACK, BELOW]
        plain = all(re.fullmatch(r"[\w.]*\.\*\.[\w.]+\.weight", source) for source in sources)
        if not (stacking and plain and len(targets) == 1) or getattr(conversion, "scope_prefix", None):
            return []
        usable.append((targets[0], tuple(source.removesuffix(".weight") for source in sources)))
    return usable


STACK, BELOW = ("MergeModulelist", 0), ("Concatenate", 1)
"""transformers' operations: one matrix per expert becomes a stack; stacks are concatenated along their rows."""
