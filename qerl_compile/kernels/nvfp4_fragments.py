"""x in the order in which the stream kernel holds operands of `mma`: 16 contiguous bytes feed two instructions.

nvfp4_stream.py renames the columns of every 256 (lane t of a quad owns 64 from 64 t on) and pairs columns i and i + 4.
One lane here moves 16 neighbouring columns of one token (32 bytes) to the two planes they belong to (16 bytes each).
After the last tile comes one of zeros: warps whose stretch of K is a tile shorter than the others' multiply by it.

    element of a plane: (token block, step high, token:3, t:2, step low, pair, low)      from the highest bit

The pass reads and writes x once; at decode sizes that is launch latency, part of which dependent launch hides.
"""

# ruff: noqa: ANN001, ANN201, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qerl_compile.kernels.prepared_launch import prepare

LANES = 128


@triton.jit
def reorder(
    x_ptr, out_ptr, ticket_ptr, K, stride_x, M, ticket_at, tickets, program, programs,
    T: tl.constexpr, LANES: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """The share of one of `programs`; T (K / 16 + 16) / LANES of them."""
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    out_ptr = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    lane = program * LANES + tl.arange(0, LANES)
    token = lane // 16 % T
    sixteen = lane // (16 * T) * 16 + lane % 16  # of columns: (tile, t:2, half, step high)
    inside = (token < M) & (sixteen < K // 16)
    at = x_ptr + token * (stride_x // 2) + sixteen * 8
    words = tl.load(at[:, None] + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0)
    # word (step low, low, high, pair of columns): two neighbours share a word, pairs are (0, 4), (1, 5), (2, 6), (3, 7)
    words = tl.permute(words.reshape(LANES, 2, 2, 2), (0, 1, 3, 2))
    low, high = tl.split(words)  # of the pairs' members, by (lane, step low, high)
    first = (low & 0xFFFF) | (high << 16)
    second = ((low >> 16) & 0xFFFF) | (high & -65536)
    pairs = tl.join(first, second)  # (lane, step low, high, pair)
    planes0, planes1 = tl.split(tl.permute(pairs, (0, 1, 3, 2)).reshape(LANES, 4, 2))
    t, half, step = sixteen // 4 % 4, sixteen // 2 % 2, sixteen % 2
    plane = sixteen // 16 * 4 + half * 2
    out = out_ptr + plane * (32 * T) + token // 8 * 256 + step * 128 + token % 8 * 16 + t * 4
    out = out[:, None] + tl.arange(0, 4)[None, :]
    written = (sixteen < K // 16 + 16)[:, None]  # the tile of zeros too
    tl.store(out, planes0, mask=written)
    tl.store(out + 32 * T, planes1, mask=written)
    if CLEAR:
        for start in range(program * LANES, tickets, programs * LANES):
            ticket = start + tl.arange(0, LANES)
            tl.store(ticket_ptr + ticket_at + ticket, tl.zeros([LANES], tl.float32), mask=ticket < tickets)


@triton.jit(do_not_specialize=["M", "ticket_at", "tickets"])
def _kernel(
    x_ptr, out_ptr, ticket_ptr, K, stride_x, M, ticket_at, tickets,
    T: tl.constexpr, LANES: tl.constexpr, DEPENDENT: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    program, programs = tl.program_id(0), tl.num_programs(0)
    reorder(
        x_ptr, out_ptr, ticket_ptr, K, stride_x, M, ticket_at, tickets, program, programs, T, LANES, CLEAR
    )  # fmt: skip


def programs_for(tokens: int, k: int, lanes: int) -> int:
    """How many programs `reorder` takes."""
    return -(-tokens * (k // 16 + 16) // lanes)


def room(tokens: int, k: int) -> tuple[int, int, int]:
    """The shape of what it writes."""
    return k // 256 + 1, 4, 64 * tokens


def fragments(
    x_MK: Tensor, tokens: int, *, dependent: bool = False, clear: tuple[Tensor, int, int] | None = None
) -> Tensor:
    """Reorder x for `nvfp4_stream.kernel`.

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 16-byte aligned, K a multiple of 256, M <= tokens.
        tokens: 8, 16 or 32; rows from M on become zero.
        dependent: use programmatic dependent launch (Hopper and newer).
        clear: a float32 tensor, an index into it and a count: that many words are set to zero.

    Returns:
        bfloat16 [K / 256 + 1, 4, 64 * tokens], the last tile zero.
    """
    m, k = x_MK.shape
    out = x_MK.new_empty(*room(tokens, k))
    scratch, ticket_at, tickets = clear or (None, 0, 0)
    constants: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    launch = prepare(
        _kernel, T=tokens, LANES=LANES, DEPENDENT=dependent, CLEAR=clear is not None, num_warps=4, **constants
    )
    grid = (programs_for(tokens, k, LANES),)
    launch(grid, x_MK, out, scratch, k, x_MK.stride(0), m, ticket_at, tickets)
    return out
