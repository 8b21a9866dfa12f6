"""Quantize a weight on the GPU to the same bytes as formats/nvfp4.py, in two passes over the weight.

Pass 1 finds the largest magnitude of the matrix (and NaN or Inf on the way: magnitudes of IEEE numbers order like
their bits, with Inf above all numbers and NaN above Inf, so an integer maximum sees both). The global scale follows on
one element with torch, in the weight's own dtype, as the format demands. Pass 2 does, per block of 16 columns,

    block = e4m3(min(global_scale * r(amax / 6), 448)), zero -> 0.125        r: rounding to the weight's dtype
    step  = block / global_scale
    code  = e2m1(w / step)                                                   fp32, IEEE divisions

and is bound by instructions unless it spends fewer than some 20 of them per weight. One thread owns one block, so that
what is done per block costs a sixteenth, and nothing crosses threads: 16 weights in, one 64-bit word and a byte out.

Division without dividing. 1/step as the sum of two fp32 numbers h + l, h = 1/step rounded, gives

    q = fma(w, h, w l)            w/step to 3 * 2^-48, then one rounding

which is below, on or above each of the seven borders b of E2M1 exactly when w/step rounded to fp32 is, and that
decides the code. Proof: "on" means within half an ulp of b. In units of 2^-47 of the binades of step and b,
w - step b is n 2^22 and step times half an ulp is s: integers, 2^23 <= s < 2^24 the digits of step (half of s below
b = 1/4). If they differ by 8 units, w/step is 2^-46 away from where the answer changes, beyond the error. If not, s is
next to 2^23, 3 2^22 or 2^24: few enough to try them all, which tests/kernels/test_quantize_arithmetic.py does. So it
does for the quotients per block (amax / 6, block / global_scale), which Markstein's theorem rounds as divisions: with
r = 1/d rounded and q = n r, the remainder n - q d is exact in an fma, and q + remainder r is the rounded quotient.

All this holds while nothing underflows: steps between 2^-100 and 1 (2^15 for 16-bit weights, none of which is below
2^-133). Other global scales take IEEE divisions for every weight, in the same kernel: right, and slower.

Rounding to E2M1 is formats/e2m1.py's min(round(2a), round(a) + 2, round(a/2) + 4); adding 1.5 * 2^23 in fp32 rounds to
an integer, ties to even. E4M3 likewise, with the power of two that leaves three bits after the point. A negative number
keeps its sign when it rounds to zero (code 8), an exact zero of either sign is code 0: -0 + 0 = 0.
"""

# ruff: noqa: ANN001, ANN202, RUF005
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qerl_compile.formats import nvfp4

BLOCKS, TILES = 128, 1
AMAX_CHUNK = 8192

ROUND = tl.constexpr(1.5 * 2**23)
PACKED_ROUND = tl.constexpr(0x4B400000 * 0x11111111 % 2**32)  # the bits of ROUND, added up as codes are
SIXTH = tl.constexpr(0.16666667163372039794921875)  # 1/6, rounded to fp32
LARGEST_GLOBAL = tl.constexpr(2.0**91)  # 2^-9, the smallest block scale, over this is 2^-100


@triton.jit
def _amax_kernel(w_ptr, out_ptr, count, CHUNK: tl.constexpr, MASK: tl.constexpr):
    """Largest magnitude bits of each chunk of the weight, seen as integers."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    bits = tl.load(w_ptr + at, mask=at < count, other=0) & MASK
    tl.store(out_ptr + tl.program_id(0), tl.max(bits.to(tl.int32), axis=0))


@triton.jit
def _to_fp32(w):
    if w.dtype == tl.bfloat16:  # as integers, because ptxas needs two instructions for every second conversion
        return (w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return w.to(tl.float32)


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """fp32, not negative -> nearest number of dtype, ties to even, still fp32."""
    if dtype == tl.bfloat16:  # as integers, because Triton's interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _divide(dividend, divisor, reciprocal):
    """Markstein's division."""
    q = dividend * reciprocal
    return tl.fma(tl.fma(-q, divisor, dividend), reciprocal, q)


@triton.jit
def _round_to_e4m3(x):
    """fp32 in [0, 448] -> nearest value of E4M3, ties to even, still fp32."""
    power = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 0.015625)  # 2^-6: the subnormals' steps are those of the first normals
    # in [power, 2 power) steps are power / 8: the last bit of power * 1.5 * 2^20
    return tl.fma(power, -1572864.0, tl.fma(power, 1572864.0, x))


@triton.jit
def _columns(x):
    """[B, 8] or [B, 4] -> its columns."""
    B: tl.constexpr = x.shape[0]
    if x.shape[1] == 8:
        even, odd = tl.split(x.reshape(B, 4, 2))
        x04, x26 = tl.split(even.reshape(B, 2, 2))
        x15, x37 = tl.split(odd.reshape(B, 2, 2))
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        return x0, x1, x2, x3, x4, x5, x6, x7
    else:
        even, odd = tl.split(x.reshape(B, 2, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3


@triton.jit
def _to_codes(q, WIDTH: tl.constexpr):
    """Quotients [B, WIDTH], no -0 -> packed codes, uint32 [B]."""
    a = tl.minimum(tl.abs(q), 6.0)
    rounded = tl.minimum(tl.fma(a, 2.0, ROUND), a + (ROUND + 2.0))
    rounded = tl.minimum(rounded, tl.fma(a, 0.5, ROUND + 4.0))
    magnitude = _columns(rounded.to(tl.uint32, bitcast=True))
    sign = _columns(q.to(tl.uint32, bitcast=True))
    magnitudes = magnitude[WIDTH - 1]
    signs = sign[WIDTH - 1] >> 28
    for i in tl.static_range(2, WIDTH + 1):
        magnitudes = (magnitudes << 4) + magnitude[WIDTH - i]
        signs = (signs << 4) | (sign[WIDTH - i] >> 28)  # one funnel shift; exponent bits come along
    return (magnitudes - PACKED_ROUND) | (signs & 0x88888888)


@triton.jit
def _encode_blocks(
    w_ptr, codes_ptr, block_ptr, left, global_scale, reciprocal,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks from the pointers on, or `left` if that is less. EXACT: IEEE divisions throughout."""
    at = tl.arange(0, BLOCKS)
    parts = ()  # 16 bytes each, so that a block is in one thread
    for i in tl.static_range(16 // WIDTH):
        column = at[:, None] * 16 + (i * WIDTH + tl.arange(0, WIDTH))[None, :]
        parts = parts + (_to_fp32(tl.load(w_ptr + column, mask=(at < left)[:, None])),)
    amax = tl.max(tl.abs(parts[0]), axis=1)
    for i in tl.static_range(1, 16 // WIDTH):
        amax = tl.maximum(amax, tl.max(tl.abs(parts[i]), axis=1))

    sixth = tl.div_rn(amax, tl.full((BLOCKS,), 6.0, tl.float32)) if EXACT else _divide(amax, 6.0, SIXTH)
    sixth = _round_to(sixth, w_ptr.dtype.element_ty)
    block = _round_to_e4m3(tl.minimum(global_scale * sixth, 448.0))
    block = tl.where(block == 0.0, 0.125, block)
    byte = (block * 2.0**-120).to(tl.uint32, bitcast=True) >> 20  # E4M3 as the top of a subnormal or small fp32
    tl.store(block_ptr + at, byte.to(tl.uint8), mask=at < left)

    codes = tl.zeros((BLOCKS,), tl.uint64)
    if EXACT:
        step = tl.div_rn(block, tl.full((BLOCKS,), 0.0, tl.float32) + global_scale)
        step = tl.broadcast_to(step[:, None], (BLOCKS, WIDTH))
        for i in tl.static_range(16 // WIDTH):
            q = tl.div_rn(parts[i], step) + 0.0
            codes |= _to_codes(q, WIDTH).to(tl.uint64) << (4 * WIDTH * i)
    else:
        step = _divide(block, global_scale, reciprocal)
        h = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), step)
        error = tl.fma(-step, h, 1.0)
        low = h * tl.fma(error, error, error)  # 1/step = h / (1 - error)
        for i in tl.static_range(16 // WIDTH):
            q = tl.fma(parts[i], h[:, None], tl.fma(parts[i], low[:, None], 0.0))
            codes |= _to_codes(q, WIDTH).to(tl.uint64) << (4 * WIDTH * i)
    tl.store(codes_ptr + at, codes, mask=at < left)


@triton.jit
def _encode_kernel(w_ptr, global_ptr, codes_ptr, block_ptr, blocks, BLOCKS: tl.constexpr, TILES: tl.constexpr):
    WIDTH: tl.constexpr = 128 // w_ptr.dtype.element_ty.primitive_bitwidth
    # 448, the largest block scale, over this is 2^15 or 1
    LEAST_GLOBAL: tl.constexpr = 448.0 / 2**15 if WIDTH == 8 else 448.0
    first = tl.program_id(0) * (BLOCKS * TILES)
    w_ptr += first.to(tl.int64) * 16
    codes_ptr += first
    block_ptr += first
    left = blocks - first
    global_scale = tl.load(global_ptr)
    if (global_scale >= LEAST_GLOBAL) & (global_scale <= LARGEST_GLOBAL):
        reciprocal = tl.div_rn(1.0, global_scale)
        for i in tl.static_range(TILES):
            _encode_blocks(
                w_ptr + i * (BLOCKS * 16), codes_ptr + i * BLOCKS, block_ptr + i * BLOCKS, left - i * BLOCKS,
                global_scale, reciprocal, BLOCKS, WIDTH, False,
            )  # fmt: skip
    else:
        for i in range(TILES):
            _encode_blocks(
                w_ptr + i * (BLOCKS * 16), codes_ptr + i * BLOCKS, block_ptr + i * BLOCKS, left - i * BLOCKS,
                global_scale, 0.0, BLOCKS, WIDTH, True,
            )  # fmt: skip


def amax(w_NK: Tensor) -> Tensor:
    """Largest magnitude of a contiguous weight, in its dtype, 0-dim; NaN or Inf if there is one."""
    word, mask = (torch.int16, 0x7FFF) if w_NK.dtype.itemsize == 2 else (torch.int32, 0x7FFFFFFF)
    count = w_NK.numel()
    chunks = torch.empty(triton.cdiv(count, AMAX_CHUNK), dtype=torch.int32, device=w_NK.device)
    _amax_kernel[(chunks.numel(),)](w_NK.view(word), chunks, count, CHUNK=AMAX_CHUNK, MASK=mask, num_warps=8)
    return chunks.amax().to(word).view(w_NK.dtype)


def encode(w_NK: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales under a given global scale.

    Args:
        w_NK: bfloat16, float16 or float32 [N, K], contiguous, finite, K a multiple of 16.
        global_scale: float32, one element, the divisor.

    Returns:
        uint8 [N, K/2] and float8_e4m3fn [N, K/16].
    """
    n, k = w_NK.shape
    codes_NK2 = torch.empty(n, k // 2, dtype=torch.uint8, device=w_NK.device)
    block_NG = torch.empty(n, k // 16, dtype=torch.uint8, device=w_NK.device)
    blocks = block_NG.numel()
    _encode_kernel[(triton.cdiv(blocks, BLOCKS * TILES),)](
        w_NK, global_scale, codes_NK2.view(torch.int64), block_NG, blocks,
        BLOCKS=BLOCKS, TILES=TILES, num_warps=BLOCKS // 32, enable_fp_fusion=True,  # as checked to the bit
    )  # fmt: skip
    return codes_NK2, block_NG.view(torch.float8_e4m3fn)


def quantize(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`formats.nvfp4.quantize` on the GPU; the same bytes.

    Args:
        w_NK: bfloat16, float16 or float32 [N, K], K a multiple of 16.

    Returns:
        codes uint8 [N, K/2], block scales float8_e4m3fn [N, K/16], global scale float32 [1] (a divisor).

    Raises:
        FormatError: NaN or Inf in the weight.
    """
    w_NK = w_NK.detach().contiguous()
    largest = amax(w_NK)
    if not bool(largest.isfinite()):
        nvfp4.check_weight(w_NK)  # says where
    largest = largest.clamp(min=torch.finfo(w_NK.dtype).tiny)
    # scalar / tensor in torch is reciprocal times scalar, rounded after each: part of the format
    divisor = (largest.reciprocal() * nvfp4.AMAX_SCALED).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    global_scale = divisor.float().reshape(1)
    return *encode(w_NK, global_scale), global_scale
