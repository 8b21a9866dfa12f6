"""The values of one packed linear: statistics, and faults that only values show. One linear is in memory at a time.

    decoded amax        max over blocks of (largest code · block scale) · decode scale

A scalar that is the wrong way up moves the decoded amax by (2688/amax)², from about 1 to about 10⁷: beyond what any
weight is (`LARGEST_WEIGHT`), while its reciprocal is not. That is how the direction is told without the base.

Block scales of the wrong dtype are read as what was probably meant: integers as the bits of E4M3, wider floats as
numbers.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qerl_compile.checkup.findings import Fault, Numbers
from qerl_compile.formats.e2m1 import MAGNITUDES
from qerl_compile.formats.nvfp4 import BLOCK, E4M3_MAX
from qerl_compile.layouts.packed_linear import LARGEST_WEIGHT

SMALLEST_WEIGHT = 1e-8
SMALLEST_NORMAL = 2.0**-6  # of E4M3; Marlin's format has no subnormals
MARLIN_SHARE = 0.01
LARGEST_INPUT = 1e6


def block_bits(block: Tensor) -> Tensor:
    """Return block scales as uint8 bits of E4M3, whatever dtype they were saved in.

    Args:
        block: any dtype, [N, G].

    Returns:
        uint8 [N, G].
    """
    if block.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        return block.view(torch.uint8)
    return block.float().to(torch.float8_e4m3fn).view(torch.uint8)


def numbers_of(codes_NK2: Tensor, bits_NG: Tensor, decode_scale: float) -> Numbers:
    """Return the statistics of a linear whose tensors fit each other.

    Args:
        codes_NK2: uint8 [N, K/2], N and K positive.
        bits_NG: uint8 [N, K/16], bits of E4M3.
        decode_scale: multiplies; may be anything.
    """
    by_byte = torch.bincount(codes_NK2.flatten(), minlength=256).reshape(16, 16)
    by_code = (by_byte.sum(0) + by_byte.sum(1)).double()  # low nibbles, high nibbles
    share = by_code / by_code.sum()
    used = share[share > 0]
    by_scale = torch.bincount(bits_NG.flatten(), minlength=256)[:128].double()  # without those that have a sign
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scales = by_scale[:127]
    there = values[(scales > 0) & (values > 0)]
    largest = there.max().item() if len(there) else 0.0
    lifted = values * 2.0 ** math.floor(math.log2(E4M3_MAX / largest)) if largest else values
    rows, groups = bits_NG.shape
    magnitude_NGB = (codes_NK2 & 7).maximum((codes_NK2 >> 4) & 7).reshape(rows, groups, BLOCK // 2)
    block_code_NG = magnitude_NGB.amax(-1)
    block_values_NG = bits_NG.view(torch.float8_e4m3fn).float().nan_to_num(nan=0.0).abs()
    block_amax_NG = torch.tensor(MAGNITUDES)[block_code_NG.int()] * block_values_NG
    count = bits_NG.numel()
    return Numbers(
        decode_scale=decode_scale,
        amax=block_amax_NG.max().item() * decode_scale,
        block_min=there.min().item() if len(there) else 0.0,
        block_max=largest,
        zero_scales=scales[0].item() / count,
        subnormal=scales[1:8].sum().item() / count,
        flushed=scales[(values > 0) & (lifted < SMALLEST_NORMAL)].sum().item() / count,
        zero_blocks=(block_code_NG == 0).sum().item() / count,
        saturated=(share[7] + share[15]).item(),
        entropy_bits=-(used * used.log2()).sum().item(),
    )


def block_faults(name: str, bits_NG: Tensor) -> Iterator[Fault]:
    """Yield NaN and signs among block scales: bits 0x7F and 0xFF, and 0x80 and above."""
    count = bits_NG.numel()
    nan = int(((bits_NG & 0x7F) == 0x7F).sum())
    signed = int((bits_NG > 0x7F).sum()) - int((bits_NG == 0xFF).sum())
    if nan:
        yield Fault("block-scale-nan", name, f"{nan} of {count}")
    if signed:
        yield Fault("block-scale-negative", name, f"{signed} of {count}")


def scalar_faults(name: str, value: float, numbers: Numbers, *, divisor: bool) -> Iterator[Fault]:
    """Yield a scalar that is no positive number, or that decodes to weights that nobody has."""
    if not 0.0 < value < math.inf:
        yield Fault("scalar-not-positive", name, f"{value:g}")
        return
    if numbers.amax and not SMALLEST_WEIGHT < numbers.amax <= LARGEST_WEIGHT:
        what = "divisor" if divisor else "multiplier"
        reciprocal = numbers.amax / numbers.decode_scale**2
        told = SMALLEST_WEIGHT < reciprocal <= LARGEST_WEIGHT
        found = f"{value:g}, a {what}, decodes to weights as large as {numbers.amax:.3g}"
        found += f"; its reciprocal to {reciprocal:.3g}" if told else ""
        yield Fault("scale-reciprocal" if told else "scale-implausible", name, found)
    if numbers.flushed > MARLIN_SHARE:
        yield Fault("marlin-flush", name, f"{numbers.flushed:.1%} of the block scales")


def input_faults(name: str, value: float, *, divisor: bool) -> Iterator[Fault]:
    """Yield an input scale that is no positive number, or that stands for inputs that nobody has."""
    if not 0.0 < value < math.inf:
        yield Fault("scalar-not-positive", name, f"{value:g}")
        return
    amax = 2688.0 / value if divisor else 2688.0 * value
    if not 1.0 / LARGEST_INPUT < amax < LARGEST_INPUT:
        yield Fault("input-scale-implausible", name, f"{value:g} stands for inputs as large as {amax:.3g}")
