"""The twiddled layout: a kernel's own order of bits, derived from the packed codes and never saved.

Each aligned 32-bit word holds eight codes s|ee|m of one row. The twiddled word holds the same 32 bits, placed so that
one shift and one mask bring two codes at once to where a bfloat16 pair wants them (sign at bit 15, ee|m at 8..6 of each
half). Four slots, each with a code in the low and one in the high half:

    slot   bits of (s, e1, e0, m)     columns (low half, high half)      instructions for the pair
    A      15  8  7  6                0, 2                               and
    B      12  5  4  3                4, 6                               shl, and
    C      14 11 10  9                1, 3                               shl, shr, and, lop3
    D      13  2  1  0                5, 7                               shl, shl, and, lop3

It is a bijection: `untwiddle(twiddle(codes))` returns every bit.
"""

import torch
from torch import Tensor

_SLOTS = {
    (15, 8, 7, 6): (0, 2),
    (12, 5, 4, 3): (4, 6),
    (14, 11, 10, 9): (1, 3),
    (13, 2, 1, 0): (5, 7),
}
# (bit of the packed word, bit of the twiddled word)
_BITS = [
    (4 * column + source, 16 * half + target)
    for targets, columns in _SLOTS.items()
    for half, column in enumerate(columns)
    for source, target in zip((3, 2, 1, 0), targets, strict=True)
]


def twiddle(codes_NK2: Tensor) -> Tensor:
    """Packed codes -> twiddled codes, uint8 [N, K/2], K a multiple of 8."""
    return _move_bits(codes_NK2, _BITS)


def untwiddle(twiddled_NK2: Tensor) -> Tensor:
    """Inverse of `twiddle`."""
    return _move_bits(twiddled_NK2, [(target, source) for source, target in _BITS])


def _move_bits(codes_NK2: Tensor, bits: list[tuple[int, int]]) -> Tensor:
    words = codes_NK2.contiguous().view(torch.int32)
    moved = torch.zeros_like(words)
    for source, target in bits:
        # & 1 after an arithmetic shift is right for bit 31 too; << 31 wraps to the sign bit, as it should
        moved |= ((words >> source) & 1) << target
    return moved.view(torch.uint8).view(codes_NK2.shape)
