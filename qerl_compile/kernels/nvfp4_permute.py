"""Columns of x in the order in which the Hopper kernel meets those of W.

nvfp4_wgmma_layouts.py renames the columns of every 256: thread t of a quad takes columns 64 t to 64 t + 63. One lane
here moves one word's worth of x, eight neighbours (16 bytes), to the four places of its pairs (i, i + 4). Planes of 64
positions are laid one after the other for every tile of tokens, so that the copy engine fetches several at once. The
pass reads and writes x once; at decode sizes that is launch latency, part of which programmatic dependent launch hides
(nvfp4_hopper.py says how and what is safe). It also sets to zero the counters of the kernel that follows: a counter
that needs no memory filled beforehand costs no node of its own in a CUDA graph.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qerl_compile.kernels.prepared_launch import prepare

LANES = 128


@triton.jit
def reorder(
    x_ptr, out_ptr, counter_ptr, K, stride_x, counter_at, counters, row, piece, program, programs,
    TOKENS: tl.constexpr, LANES: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """Piece `piece`, of LANES words, of row `row`; of the counters the share of one of `programs`."""
    x_word_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    out_word_ptr = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    m = row.to(tl.int64)
    # of eight: (group of 256, t:2, half, word:2), lowest bits rearranged for the stores
    column = piece * LANES + tl.arange(0, LANES)
    t = column % 4
    word = (column // 4) % 4
    half = (column // 16) % 2
    group = column // 32
    inside = column < K // 8
    src = x_word_ptr + m * (stride_x // 2) + group * 128 + t * 32 + half * 16 + word * 4
    words = tl.load(src[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0)
    w02, w13 = tl.split(words.reshape(LANES, 2, 2))
    w0, w2 = tl.split(w02)
    w1, w3 = tl.split(w13)
    plane = m // TOKENS * (K // 64) + group * 4 + half * 2
    out = out_word_ptr + (plane * TOKENS + m % TOKENS) * 32 + word * 8 + t
    tl.store(out, (w0 & 0xFFFF) | (w2 << 16), mask=inside)
    tl.store(out + 4, ((w0 >> 16) & 0xFFFF) | (w2 & -65536), mask=inside)
    tl.store(out + TOKENS * 32, (w1 & 0xFFFF) | (w3 << 16), mask=inside)
    tl.store(out + TOKENS * 32 + 4, ((w1 >> 16) & 0xFFFF) | (w3 & -65536), mask=inside)
    if CLEAR:
        for start in range(program * LANES, counters, programs * LANES):
            counter = start + tl.arange(0, LANES)
            tl.store(counter_ptr + counter_at + counter, tl.zeros([LANES], tl.float32), mask=counter < counters)


@triton.jit(do_not_specialize=["counter_at", "counters"])
def _kernel(
    x_ptr, out_ptr, counter_ptr, K, stride_x, counter_at, counters,
    TOKENS: tl.constexpr, LANES: tl.constexpr, DEPENDENT: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    if DEPENDENT > 0:
        gdc_launch_dependents()
    if DEPENDENT == 1 or DEPENDENT == 3:
        gdc_wait()
    row, piece = tl.program_id(0), tl.program_id(1)
    program, programs = piece * tl.num_programs(0) + row, tl.num_programs(0) * tl.num_programs(1)
    reorder(
        x_ptr, out_ptr, counter_ptr, K, stride_x, counter_at, counters, row, piece, program, programs,
        TOKENS, LANES, CLEAR,
    )  # fmt: skip


def permuted_rows(m: int, k: int, tokens: int) -> int:
    """Rows of 64 positions that x takes in this order."""
    return -(-m // tokens) * tokens * (k // 64)


def permute(
    x_MK: Tensor,
    tokens: int,
    *,
    dependent: int = 0,
    out: Tensor | None = None,
    clear: tuple[Tensor, int, int] | None = None,
) -> Tensor:
    """Reorder x for `nvfp4_wgmma.kernel`.

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 4-byte aligned, K a multiple of 256.
        tokens: of a tile.
        dependent: as in nvfp4_hopper.py's config: with 1 and 3 it is itself launched as a programmatic dependent; all
            but 0 let the next kernel start at once.
        out: bfloat16 [>= permuted_rows, 64], where to write it; else it is allocated.
        clear: a float32 tensor, an index into it and a count: that many words are set to zero.

    Returns:
        [>= permuted_rows, 64], same dtype: tile of tokens, plane, token, position. Rows of tokens from M on are not
        written: they feed output columns that nobody stores.
    """
    m, k = x_MK.shape
    if out is None:
        out = torch.empty(permuted_rows(m, k, tokens), 64, dtype=x_MK.dtype, device=x_MK.device)
    counters, counter_at, count = clear or (None, 0, 0)
    launch = _launch(tokens, dependent, clear is not None)
    launch((m, -(-k // (8 * LANES))), x_MK, out, counters, k, x_MK.stride(0), counter_at, count)
    return out


@cache
def _launch(tokens: int, dependent: int, clear: bool) -> Any:
    options: dict[str, int] = {"launch_pdl": True} if dependent in (1, 3) else {}
    return prepare(_kernel, TOKENS=tokens, LANES=LANES, DEPENDENT=dependent, CLEAR=clear, num_warps=4, **options)


def column_order(k: int) -> Tensor:
    """The permutation as an index: plane p of a row x is x[column_order(k)[64 p : 64 p + 64]]. For tests."""
    i = torch.arange(k)
    position = i % 64
    low_bit, t, pair, word = position % 2, position // 2 % 4, position // 8 % 2, position // 16
    high_plane, half = i // 64 % 2, i // 128 % 2
    return i // 256 * 256 + 64 * t + 32 * half + 8 * word + 2 * high_plane + pair + 4 * low_bit
