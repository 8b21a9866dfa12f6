"""Weights of an exported directory beside the weights they stand for, one linear at a time.

Two questions, for every linear that the export packed or merged:

    same_bits     are codes, block scales and matrix scale those of the model in memory? An export that was not asked
                  to change them must have kept them; anything else is a writer's or a reader's mistake.
    sqnr_db       10·log10(|w|² / |w - ŵ|²): how much weight there is per rounding error. w is the bf16 weight of the
                  base if it is at hand, the trained weight `deq(W4) + s·B·A` for a merge, and otherwise what the
                  model computes with.

Round-to-nearest NVFP4 of a Gaussian matrix has 20.4 dB, a relative error of 0.095. A reciprocal scale, swapped nibbles
or scales of another layer give some 0 dB or less. Infinity means equal.

The matrix scale is compared across both dialects: equal numbers, or one is the fp32 reciprocal of the other. A stack of
experts has one line, that of its worst matrix.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import adapters_of
from qerl_compile.exporters.merging.modes import delta
from qerl_compile.exporters.served_experts import packed_experts, packed_stacks
from qerl_compile.exporters.sqnr import sqnr_db
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize
from qerl_compile.graph import held_tensor
from qerl_compile.passes.experts import packed_stack_of
from qerl_compile.passes.quantize import packed_of


@dataclass(frozen=True)
class LayerQuality:
    """One linear of the export.

    Attributes:
        path: module path.
        sqnr_db: see the module's essay.
        same_bits: None where the model has nothing packed to compare with, or the export was a merge.
    """

    path: str
    sqnr_db: float
    same_bits: bool | None


def layer_qualities(
    exported: nn.Module, model: nn.Module, *, merged: bool, original: Callable[[str], Tensor] | None
) -> Iterator[LayerQuality]:
    """Yield the quality of every linear that is packed in the export, or that a merge changed.

    Args:
        exported: the directory, loaded back.
        model: the model in memory that it was written from.
        merged: whether the adapter was merged.
        original: gives the base's weight by tensor name; not asked for a merge.
    """
    adapters = adapters_of(model)
    for path, module in exported.named_modules():
        found = packed_of(module)
        own_module = model.get_submodule(path)
        own = packed_of(own_module)
        if found is None and not (merged and (path in adapters or own is not None)):
            continue
        if merged:
            expected_NK = _weight(own_module, own)
            if path in adapters:
                expected_NK += delta(adapters[path])
        elif original is not None:
            expected_NK = original(f"{path}.weight").float()
        else:
            expected_NK = _weight(own_module, own)
        same = None if merged or own is None or found is None else same_bits(own, found)
        yield LayerQuality(path, sqnr_db(expected_NK, _weight(module, found)), same)
    yield from _stack_qualities(exported, model, merged=merged, original=original)


def _stack_qualities(
    exported: nn.Module, model: nn.Module, *, merged: bool, original: Callable[[str], Tensor] | None
) -> Iterator[LayerQuality]:
    """Yield one row for each stack of experts that the model has packed: the worst of its matrices."""
    own = packed_experts(model)
    for stack, _ in packed_stacks(model):
        module = exported.get_submodule(stack.module)
        held = packed_stack_of(module, stack.leaf)  # None in a merge to full weights
        worst_db, same = float("inf"), True
        for path, place in stack.places.items():
            if merged or original is None:
                expected_NK = dequantize(own[path], torch.float32)
            else:
                expected_NK = original(f"{path}.weight").float()
            if held is None:
                found_NK = held_tensor(module, stack.leaf).detach()[place.expert, place.rows].float()
            else:
                found = held.part(place.expert, place.rows.start // stack.part_rows)
                found_NK, same = dequantize(found, torch.float32), same and same_bits(own[path], found)
            worst_db = min(worst_db, sqnr_db(expected_NK, found_NK))
        yield LayerQuality(stack.name, worst_db, None if merged or held is None else same)


def same_bits(one: PackedNVFP4, other: PackedNVFP4) -> bool:
    """Return whether two packed weights are the same, in either dialect of the matrix scale."""
    pairs = (
        (one.codes_NK2, other.codes_NK2),
        (one.block_decode_scale_NG.view(torch.uint8), other.block_decode_scale_NG.view(torch.uint8)),
    )
    if any(mine.shape != theirs.shape or not torch.equal(mine, theirs.to(mine.device)) for mine, theirs in pairs):
        return False
    mine, theirs = one.global_scale.cpu(), other.global_scale.cpu()
    if one.direction == other.direction:
        return torch.equal(mine, theirs)
    return torch.equal(mine.reciprocal(), theirs) or torch.equal(mine, theirs.reciprocal())


def _weight(module: nn.Module, packed: PackedNVFP4 | None) -> Tensor:
    """What a linear multiplies with, without its adapter: float32 [N, K], a new tensor."""
    if packed is not None:
        return dequantize(packed, torch.float32)
    return held_tensor(module, "weight").detach().to(torch.float32, copy=True)
