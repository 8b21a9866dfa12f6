"""Quantize a weight on the GPU to the same bytes as formats/nvfp4.py, in two passes over the weight.

Pass 1 finds the largest magnitude of the matrix (and NaN or Inf on the way: magnitudes of IEEE numbers order like
their bits, with Inf above all numbers and NaN above Inf, so an integer maximum sees both). The global scale follows on
one element with torch, in the weight's own dtype, as the format demands. Pass 2 does, per block of 16 columns,

    block = e4m3(min(global_scale * r(amax / 6), 448)), zero -> 0.125        r: rounding to the weight's dtype
    code  = e2m1(w / (block / global_scale))                                 fp32, IEEE divisions

The divisions must round as IEEE divisions do. One reciprocal per block serves sixteen: with r = 1/step rounded
correctly and q = w r, the remainder w - q step is exact in an fma, and q + remainder * r is the correctly rounded
quotient (Markstein's theorem), unless something underflows; so w and step are first brought near 1 by a common power of
two where step is extreme. Rounding to E4M3 is integer arithmetic (add half, keep ties even). Rounding to E2M1 is
formats/e2m1.py's min(round(2a), round(a) + 2, round(a/2) + 4); adding 1.5 * 2^23 in fp32 rounds to an integer, ties to
even. A negative number keeps its sign when it rounds to zero (code 8), an exact zero of either sign is code 0.
"""

# ruff: noqa: ANN001, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qerl_compile.formats import nvfp4

ROWS, BLOCKS = 4, 32
AMAX_CHUNK = 8192


@triton.jit
def _amax_kernel(w_ptr, out_ptr, count, CHUNK: tl.constexpr, MASK: tl.constexpr):
    """Largest magnitude bits of each chunk of the weight, seen as integers."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    bits = tl.load(w_ptr + at, mask=at < count, other=0) & MASK
    tl.store(out_ptr + tl.program_id(0), tl.max(bits.to(tl.int32), axis=0))


@triton.jit
def _to_e4m3(value):
    """fp32 in [0, 448] -> E4M3 byte, nearest, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # (127 - 7) << 3: exponent bias and mantissa width
    # below 2^-6, adding 2^14 leaves steps of 2^-9 and rounds on the way
    subnormal = (value + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def _from_e4m3(byte):
    return (byte << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2^120


@triton.jit
def _per_weight(block_value, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    return tl.broadcast_to(block_value[:, :, None], (ROWS, BLOCKS, 16))


@triton.jit
def _kernel(w_ptr, global_ptr, codes_ptr, block_ptr, N, K, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.program_id(0) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    row_ok = (row < N)[:, None]
    row = row.to(tl.int64)[:, None]
    w = tl.load(w_ptr + row * K + column[None, :], mask=row_ok & (column < K)[None, :], other=0.0)
    w3 = w.to(tl.float32).reshape(ROWS, BLOCKS, 16)
    global_scale = tl.load(global_ptr)
    amax = tl.max(tl.abs(w3), axis=2)
    six = amax * 0.0 + 6.0
    sixth = tl.div_rn(amax, six).to(w_ptr.dtype.element_ty).to(tl.float32)
    byte = _to_e4m3(tl.minimum(global_scale * sixth, 448.0))
    byte = tl.where(byte == 0, 0x20, byte)  # 0.125
    step = tl.div_rn(_from_e4m3(byte), amax * 0.0 + global_scale)
    lift = tl.where(step < 2.0**-60, 2.0**64, tl.where(step > 2.0**60, 2.0**-64, 1.0))
    unit = step * lift
    inverse = _per_weight(tl.div_rn(amax * 0.0 + 1.0, unit), ROWS, BLOCKS)
    unit = _per_weight(unit, ROWS, BLOCKS)
    w3 = w3 * _per_weight(lift, ROWS, BLOCKS)
    q = w3 * inverse
    q = tl.fma(tl.fma(-q, unit, w3), inverse, q)
    a = tl.minimum(tl.abs(q), 6.0)
    round_magic = 12582912.0
    rounded = tl.minimum(tl.fma(a, 2.0, round_magic), a + (round_magic + 2.0))
    rounded = tl.minimum(rounded, tl.fma(a, 0.5, round_magic + 4.0))
    code = rounded.to(tl.int32, bitcast=True) & 7
    code = tl.where(q < 0, code | 8, code)
    low, high = tl.split(code.reshape(ROWS, BLOCKS * 8, 2))
    byte_at = tl.program_id(0) * (BLOCKS * 8) + tl.arange(0, BLOCKS * 8)
    packed = (low | (high << 4)).to(tl.uint8)
    tl.store(codes_ptr + row * (K // 2) + byte_at[None, :], packed, mask=row_ok & (byte_at < K // 2)[None, :])
    tl.store(block_ptr + row * (K // 16) + block[None, :], byte.to(tl.uint8), mask=row_ok & (block < K // 16)[None, :])


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
    grid = (triton.cdiv(k, BLOCKS * 16), triton.cdiv(n, ROWS))
    _kernel[grid](w_NK, global_scale, codes_NK2, block_NG, n, k, ROWS=ROWS, BLOCKS=BLOCKS, num_warps=4)
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
    scale = (largest.reciprocal() * nvfp4.AMAX_SCALED).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    global_scale = scale.float().reshape(1)
    return *encode(w_NK, global_scale), global_scale
