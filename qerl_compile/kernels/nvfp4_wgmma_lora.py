"""y += h · Bᵀ in the epilogue of the Hopper kernel, from global memory to registers.

The tile is yᵀ, so B's rows are the A operand and h the B operand. The product is `mma.m16n8k16`: its accumulator lies
in registers exactly as that of `wgmma`, so nothing moves. A `wgmma` here, with h in shared memory, would run at twice
the rate, but ptxas then serializes those of the main loop (C7512, two consumers; docs/kernels.md).

As for W, columns are renamed until every lane reads neighbours: of each chunk of C = 16 or 32 ranks lane t of a quad
takes the C / 4 from C / 4 · t on, 8 or 16 bytes. Each warp reads all of h's tile; the second one finds it in L1. Tokens
from M on and rows from N on are read from the last one: nobody stores what comes of them.

Ranks 16, 32, 64 and 128. h is bfloat16 and carries alpha / rank; the sum is rounded once.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qerl_compile.kernels.gluon_compat import mma_v2
from qerl_compile.kernels.nvfp4_wgmma_layouts import QUAD_ROWS, WARP_ROWS, WARPS, accumulator


@gluon.constexpr_function
def chunk_of(rank: int) -> int:
    """Ranks at once."""
    return 16 if rank == 16 else 32


@gluon.constexpr_function
def _mma() -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])


@gluon.constexpr_function
def _ranks(chunk: int) -> tuple[list[list[int]], list[list[int]]]:
    """Register and lane bases along the ranks of a chunk."""
    quarter = chunk // 4
    return [[0, 1 << i] for i in range(quarter.bit_length() - 1)], [[0, quarter], [0, 2 * quarter]]


@gluon.constexpr_function
def h_layout(tokens: int, chunk: int) -> gl.DistributedLinearLayout:
    """[tokens, chunk], the same in every warp."""
    register, lane = _ranks(chunk)
    register = [*register, *[[8 << i, 0] for i in range(tokens.bit_length() - 4)]]
    return gl.DistributedLinearLayout(register, [*lane, [1, 0], [2, 0], [4, 0]], [[0, 0], [0, 0]], [], [tokens, chunk])


@gluon.constexpr_function
def lora_layout(chunk: int) -> gl.DistributedLinearLayout:
    """[64 rows of W in their own order, chunk], each row where the accumulator has it."""
    register, lane = _ranks(chunk)
    register = [*register, [1, 0]]
    return gl.DistributedLinearLayout(register, [*lane, *QUAD_ROWS], WARP_ROWS, [], [64, chunk])


@gluon.jit
def add_lora(
    out, h_ptr, lora_ptr, token0, row0, M, N, stride_h, stride_lora,
    TOKENS: gl.constexpr, RANK: gl.constexpr,
):  # fmt: skip
    """out [64, TOKENS] in accumulator order, plus B · hᵀ."""
    CHUNK: gl.constexpr = chunk_of(RANK)
    H: gl.constexpr = h_layout(TOKENS, CHUNK)
    L: gl.constexpr = lora_layout(CHUNK)
    MMA: gl.constexpr = _mma()
    token = gl.minimum(token0 + gl.arange(0, TOKENS, gl.SliceLayout(1, H)), M - 1)
    row = gl.minimum(row0 + gl.arange(0, 64, gl.SliceLayout(1, L)), N - 1)
    h_at = h_ptr + token[:, None] * stride_h + gl.arange(0, CHUNK, gl.SliceLayout(0, H))[None, :]
    lora_at = lora_ptr + row[:, None] * stride_lora + gl.arange(0, CHUNK, gl.SliceLayout(0, L))[None, :]
    out = gl.convert_layout(out, MMA)
    for c in gl.static_range(RANK // CHUNK):
        h = gl.load(h_at + c * CHUNK)
        b = gl.load(lora_at + c * CHUNK)
        # ranks (t:2, step, pair, low) -> positions (step, pair, t:2, low); rows as in nvfp4_wgmma._plane
        h = h.reshape([TOKENS, 4, CHUNK // 16, 2, 2]).permute([2, 3, 1, 4, 0]).reshape([CHUNK, TOKENS])
        b = b.reshape([4, 2, 2, 2, 2, 4, CHUNK // 16, 2, 2]).permute([0, 4, 1, 3, 2, 6, 7, 5, 8])
        b = gl.convert_layout(b.reshape([64, CHUNK]), gl.DotOperandLayout(0, MMA, 2))
        out = mma_v2(b, gl.convert_layout(h, gl.DotOperandLayout(1, MMA, 2)), out)
    return gl.convert_layout(out, accumulator(TOKENS))
