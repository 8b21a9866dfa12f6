"""E2M1, the four-bit float: sixteen codes, how numbers round to them, how two share a byte.

A code is one sign bit and three magnitude bits (two of exponent, one of mantissa). The eight magnitudes are

    code       0    1    2    3    4    5    6    7          bit 3 set: the same, negative (8 is -0)
    value      0   0.5   1   1.5   2    3    4    6

The steps are 1/2 up to 2, then 1 up to 4, then 2 up to 6. On each stretch the code is affine in the value, so
rounding to nearest with ties to the even code is ordinary rounding of three straight lines, and the right one is
always the lowest because the curve through the table is concave:

    code(a) = min(round(2a), round(a) + 2, round(a/2) + 4)             0 <= a <= 6, round = ties to even

which gives the familiar interval table (a tie belongs to the even code):

    [0, .25] -> 0   (.25, .75) -> .5   [.75, 1.25] -> 1   (1.25, 1.75) -> 1.5
    [1.75, 2.5] -> 2   (2.5, 3.5) -> 3   [3.5, 5] -> 4   (5, 6] -> 6

A negative number that rounds to zero keeps its sign (code 8); an exact zero of either sign is code 0. Both are what
compressed-tensors writes, and no engine can tell the difference.

Two codes share a byte, the even column in the low nibble. Packing and unpacking move bytes by treating two codes as
one 16-bit word, which puts the even column in the low half on every little-endian machine (all that torch supports
with 4-bit serving engines). No integer index tensor wider than 32 bits is ever made: a weight has hundreds of
millions of codes.

Shape suffixes: N rows (output features), K columns (input features), K2 = K/2 bytes.
"""

from functools import cache

import torch
from torch import Tensor

MAX_VALUE = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)


def encode(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 code, ties to the even code, magnitudes above 6 clamped to 6.

    Args:
        x: fp32, any shape, no NaN.

    Returns:
        uint8 codes 0..15, same shape.
    """
    magnitude = x.abs().clamp_(max=MAX_VALUE)
    code = torch.minimum((magnitude * 2).round_(), magnitude.round().add_(2))
    code = torch.minimum(code, magnitude.mul_(0.5).round_().add_(4))
    # The sign is that of the number and not its sign bit: -0.0 becomes code 0, and -0.1 becomes code 8. As an int8,
    # -1 has bit 3 set; 0 and 1 have not. (torch converts to int8 nine times faster than to uint8.)
    return (code.to(torch.int8) | x.sign().to(torch.int8).bitwise_and_(8)).view(torch.uint8)


def pack(codes_NK: Tensor) -> Tensor:
    """Put two codes in a byte: uint8 [N, K] with values 0..15, K even -> uint8 [N, K/2], even column low."""
    words = codes_NK.contiguous().view(torch.int16)  # 0x0H0L
    return (words | (words >> 4)).to(torch.uint8)


def unpack(codes_NK2: Tensor) -> Tensor:
    """Inverse of `pack`: uint8 [N, K/2] -> uint8 [N, K] with values 0..15."""
    words = codes_NK2.to(torch.int16, memory_format=torch.contiguous_format)
    return ((words | (words << 4)) & 0x0F0F).view(torch.uint8)


@cache
def _value_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Both values of each of the 256 bytes, as one word of twice the width of `dtype`: [256]."""
    byte = torch.arange(256)
    values = torch.tensor(VALUES, dtype=dtype)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
    word = torch.int32 if dtype.itemsize == 2 else torch.int64
    return pairs.view(word).flatten().to(device)


def decode(codes_NK2: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of packed codes: uint8 [N, K/2] -> `dtype` [N, K], exact in bf16, fp16 and fp32."""
    pairs = _value_pairs(dtype, codes_NK2.device).index_select(0, codes_NK2.flatten().int())
    return pairs.view(dtype).view(codes_NK2.shape[0], -1)
