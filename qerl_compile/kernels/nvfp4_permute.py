"""Columns of x in the order in which the Hopper kernel meets those of W.

nvfp4_wgmma_layouts.py renames the columns of every 256: thread t of a quad takes columns 64 t to 64 t + 63. One lane
here moves one word's worth of x, eight neighbours (16 bytes), to the four places of its pairs (i, i + 4). Planes of 64
positions are laid one after the other for every tile of tokens, so that the copy engine fetches several at once. The
pass reads and writes x once; at decode sizes that is launch latency, part of which programmatic dependent launch hides.
"""

# ruff: noqa: ANN001, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LANES = 512


@triton.jit(do_not_specialize=["M"])
def _kernel(x_ptr, out_ptr, K, stride_x, M, TOKENS: tl.constexpr, LANES: tl.constexpr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    per_row = K // 8
    m = (lane // per_row).to(tl.int64)
    column = lane % per_row  # of eight: (group of 256, t:2, half, word:2), lowest bits rearranged for the stores
    t = column % 4
    word = (column // 4) % 4
    half = (column // 16) % 2
    group = column // 32
    inside = m < M
    src = x_ptr + m * stride_x + group * 128 + t * 32 + half * 16 + word * 4
    words = tl.load(src[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0)
    w02, w13 = tl.split(words.reshape(LANES, 2, 2))
    w0, w2 = tl.split(w02)
    w1, w3 = tl.split(w13)
    plane = m // TOKENS * (K // 64) + group * 4 + half * 2
    out = out_ptr + (plane * TOKENS + m % TOKENS) * 32 + word * 8 + t
    tl.store(out, (w0 & 0xFFFF) | (w2 << 16), mask=inside)
    tl.store(out + 4, ((w0 >> 16) & 0xFFFF) | (w2 & -65536), mask=inside)
    tl.store(out + TOKENS * 32, (w1 & 0xFFFF) | (w3 << 16), mask=inside)
    tl.store(out + TOKENS * 32 + 4, ((w1 >> 16) & 0xFFFF) | (w3 & -65536), mask=inside)


def permute(x_MK: Tensor, tokens: int, *, dependent: bool = False) -> Tensor:
    """Reorder x for `nvfp4_wgmma.kernel`.

    Args:
        x_MK: 2-byte dtype [M, K], rows contiguous and 4-byte aligned, K a multiple of 256.
        tokens: of a tile.
        dependent: use programmatic dependent launch (Hopper and newer).

    Returns:
        [ceil(M / tokens) * (K / 64) * tokens, 64], same dtype: tile of tokens, plane, token, position. Rows of tokens
        from M on are not written: they feed output columns that nobody stores.
    """
    m, k = x_MK.shape
    rows = triton.cdiv(m, tokens) * tokens * (k // 64)
    out = torch.empty(rows, 64, dtype=x_MK.dtype, device=x_MK.device)
    words = x_MK.view(torch.int32)
    extra = {"launch_pdl": True} if dependent else {}
    _kernel[(triton.cdiv(m * (k // 8), LANES),)](
        words, out.view(torch.int32), k, words.stride(0), m,
        TOKENS=tokens, LANES=LANES, DEPENDENT=dependent, num_warps=4, **extra,
    )  # fmt: skip
    return out


def column_order(k: int) -> Tensor:
    """The permutation as an index: plane p of a row x is x[column_order(k)[64 p : 64 p + 64]]. For tests."""
    i = torch.arange(k)
    position = i % 64
    low_bit, t, pair, word = position % 2, position // 2 % 4, position // 8 % 2, position // 16
    high_plane, half = i // 64 % 2, i // 128 % 2
    return i // 256 * 256 + 64 * t + 32 * half + 8 * word + 2 * high_plane + pair + 4 * low_bit
