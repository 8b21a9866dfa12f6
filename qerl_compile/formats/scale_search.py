"""Block scales chosen by the error they make, instead of by the block's largest weight.

NVFP4 as everybody packs it (nvfp4.py) puts the largest weight of every block on 6. That is rarely best: between 4 and 6
lies the widest gap of E2M1, and E4M3 rounds the scale besides. Any scales decode, so better ones cost nothing later.

`four_over_six` (Cook et al., arXiv 2512.02010) tries two scales per block, largest weight on 6 or on 4, and keeps that
with the smaller squared error (6 on a tie). A scale for 4 is 1.5 times that for 6, so the matrix scale leaves room for
it: the largest weight lies at 256 * 6 = 1536 instead of 448 * 6 (256 * 1.5 = 384 fits E4M3, 448 * 1.5 does not).

`mse` keeps the matrix scale of nvfp4.py and finds, for every block, the E4M3 scale with the smallest

    error(s) = Σ_k importance_k (w_k - s q_k)²             q_k the nearest E2M1 value of w_k / s

over **all 126** positive scales, of which only about a dozen have to be tried, because with A the largest magnitude:

    above   If A <= 7s, the scale 2s is no better than s: up to 6s each of its points {0, 1, 2, 3, 4, 6}·s is a point of
            s, and no weight is nearer to 8s than to 6s. So nothing above 2A/7 need be tried, where the half of a scale
            is a scale: from byte 16 up.
    below   The largest weight alone costs importance (A - 6s)², more for every smaller s. Once that exceeds the best
            error found, the block is done.

`importance` is what an error in a column costs. For the output of a linear, y = W x, whose errors in different columns
are taken as independent, that is the column's mean square E[x_k²] over calibration inputs; without data, 1.

With equal errors the scale of nvfp4.py stays, and so do its bytes. A scale of nvfp4.py is always a candidate: no block
gets worse. Weights that an engine fuses share one matrix scale, as there.

What this module does not do: search the matrix scale (E4M3 is a float: another matrix scale moves all block scales
by one factor and helps no block in particular), or let later columns make up for the errors of earlier ones
(calibrating/gptq.py).

Shape suffixes: N rows (output features), K columns (input features), G = K/16 blocks, B = 16 columns of a block.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qerl_compile.errors import FormatError
from qerl_compile.formats.e2m1 import MAX_VALUE
from qerl_compile.formats.nvfp4 import (
    AMAX_SCALED,
    BLOCK,
    PackedNVFP4,
    amax_block_scales,
    divisor_of,
    encode_with,
    group_amaxes,
    quantize_group,
    row_chunks,
)

Scales = Literal["amax", "mse", "four_over_six"]
FOUR_OVER_SIX_SCALED = 256 * MAX_VALUE
LARGEST_BYTE = 0x7E  # 448; the positive E4M3 scales are the bytes 1 to 126, in the order of their values
HALVES_EXACTLY_FROM = 16


def search_group(
    weights: Mapping[str, Tensor], method: Scales, *, importance: Mapping[str, Tensor] | None = None
) -> dict[str, PackedNVFP4]:
    """Quantize weights that an engine fuses, with one matrix scale and block scales chosen by `method`.

    Args:
        weights: name -> bf16, fp16 or fp32 [N, K], on CPU or CUDA; N may differ, dtype may not.
        method: "amax" (`quantize_group`, the bytes of compressed-tensors), "mse" or "four_over_six".
        importance: name -> float32 [K], positive: what a squared error in each column counts; None is 1 for all.
            "amax" does not look at it.

    Returns:
        name -> packed weight, in the same order, all with equal `global_scale`, a divisor.

    Raises:
        FormatError: as `quantize_group`; an importance that is not [K], positive and finite.
    """
    if method == "amax" or not weights:
        return quantize_group(weights)
    of_blocks, shared = group_amaxes(weights)
    counts = {name: _importance(w, (importance or {}).get(name), name) for name, w in weights.items()}
    global_scale = divisor_of(shared, AMAX_SCALED if method == "mse" else FOUR_OVER_SIX_SCALED)
    choose = _least_error if method == "mse" else _four_or_six
    packed: dict[str, PackedNVFP4] = {}
    for name, w_NK in weights.items():
        scale_NG = torch.empty_like(of_blocks[name], dtype=torch.float8_e4m3fn)
        for rows in row_chunks(w_NK.shape, w_NK.device):
            blocks = _Blocks(w_NK[rows].detach(), of_blocks[name][rows], counts[name], global_scale)
            scale_NG[rows] = choose(blocks)
        packed[name] = encode_with(w_NK, scale_NG, global_scale)
    return packed


class _Blocks:
    """Some rows of a weight, cut into blocks, in units of each block's largest magnitude: huge weights do not overflow.

    Attributes:
        amax_NG: largest magnitudes, in the weight's dtype.
        magnitude_NGB: |w| / amax, float32; zero in a zero block.
        importance_GB: float32.
        global_scale: float32 [1], a divisor.
    """

    def __init__(self, w_NK: Tensor, amax_NG: Tensor, importance_GB: Tensor, global_scale: Tensor) -> None:
        self.amax_NG, self.importance_GB, self.global_scale = amax_NG, importance_GB, global_scale
        amax = amax_NG.float()
        self.unit_NG = torch.where(amax > 0, amax, 1.0)
        w_NGB = w_NK.float().view(*amax_NG.shape, BLOCK)
        self.magnitude_NGB = w_NGB.abs() / self.unit_NG[..., None]

    def step(self, scale_NG: Tensor) -> Tensor:
        """Return what one unit of E2M1 stands for under a scale, in units of the block's largest: fp32 [N, G]."""
        return scale_NG.float() / self.global_scale / self.unit_NG

    def error(self, scale_NG: Tensor) -> Tensor:
        """Return the weighted squared error of each block: fp32 [N, G]."""
        step_NG1 = self.step(scale_NG)[..., None]
        x = self.magnitude_NGB / step_NG1
        # The nearest value: the code is the lowest of three straight lines (e2m1.py), its value the highest of three.
        clamped = x.clamp(max=MAX_VALUE)
        code = torch.minimum((clamped * 2).round_(), clamped.round().add_(2))
        code = torch.minimum(code, clamped.mul_(0.5).round_().add_(4))
        value = torch.maximum(code * 0.5, code - 2)
        value = torch.maximum(value, code.mul_(2).sub_(8))
        return value.sub_(x).mul_(step_NG1).square_().mul_(self.importance_GB).sum(-1)


def _four_or_six(blocks: _Blocks) -> Tensor:
    six = amax_block_scales(blocks.amax_NG, blocks.global_scale)
    four = amax_block_scales(blocks.amax_NG, blocks.global_scale, lands_on=4.0)
    is_four = blocks.error(four) < blocks.error(six)
    return _scales(torch.where(is_four, four.view(torch.uint8), six.view(torch.uint8)))


def _least_error(blocks: _Blocks) -> Tensor:
    plain = amax_block_scales(blocks.amax_NG, blocks.global_scale)
    best_byte, best_error = plain.view(torch.uint8).int(), blocks.error(plain)
    largest = blocks.magnitude_NGB.argmax(-1, keepdim=True)
    its_importance = blocks.importance_GB.expand_as(blocks.magnitude_NGB).gather(-1, largest).squeeze(-1)
    # One byte more than the rounded bound: the conversion may have rounded down.
    bound = (blocks.amax_NG.float() * blocks.global_scale * (2 / 7)).clamp(max=448.0)
    highest = bound.to(torch.float8_e4m3fn).view(torch.uint8).int() + 1
    byte = highest.clamp(min=HALVES_EXACTLY_FROM - 1, max=LARGEST_BYTE)
    live = blocks.amax_NG > 0
    while bool(live.any()):
        block_decode_scale_NG = _scales(byte.clamp(min=1).to(torch.uint8))
        error = blocks.error(block_decode_scale_NG)
        better = live & (error < best_error)
        best_byte, best_error = torch.where(better, byte, best_byte), torch.where(better, error, best_error)
        left_over = (1 - MAX_VALUE * blocks.step(block_decode_scale_NG)).clamp(min=0)
        live = live & (byte > 1) & (its_importance * left_over.square() <= best_error)
        byte = byte - 1
    return _scales(best_byte.to(torch.uint8))


def _scales(bytes_NG: Tensor) -> Tensor:
    return bytes_NG.view(torch.float8_e4m3fn)


def _importance(w_NK: Tensor, given_K: Tensor | None, name: str) -> Tensor:
    """Return the importance as fp32 [G, B] with mean 1, on the weight's device."""
    columns = w_NK.shape[1]
    if given_K is None:
        return torch.ones(columns // BLOCK, BLOCK, device=w_NK.device)
    good = tuple(given_K.shape) == (columns,) and bool((given_K > 0).all()) and bool(given_K.isfinite().all())
    if not good:
        raise FormatError(
            where=f"importance of {name}",
            expected=f"float32 [K] = [{columns}], all positive and finite",
            got=f"{list(given_K.shape)}, from {given_K.min().item():g} to {given_K.max().item():g}",
            do="Give the mean square of every input channel, with a floor for channels that were never seen.",
        )
    given_K = given_K.to(w_NK.device, torch.float32)
    return (given_K / given_K.mean()).view(-1, BLOCK)
