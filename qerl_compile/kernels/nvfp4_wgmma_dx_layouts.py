"""Who holds which weight in the backward kernel: the transposed fragment comes out of the load itself.

The tile computed is dxᵀ = Wᵀ dyᵀ. A warp group's `wgmma` takes A = Wᵀ from registers: thread t of a quad (lane =
4 g + t) must hold, for rows g and g + 8 of its warp (columns of W) and each step of 16, contraction positions 2t, 2t+1,
2t+8, 2t+9 (rows n of W). Two facts make that free:

- A matrix load with transposition (`ldmatrix.trans`) moves 16-bit units. Of eight packed rows it gives thread (g, t)
  unit g of rows 2t and 2t + 1 in one register. A unit is four codes of one row, so that register is four *pairs*
  (n, n + 1), 16 bits apart, exactly where a packed bfloat16 pair wants them: one mask picks a pair, as in the forward.
- Positions are rows n in natural order, so dy needs no permutation and comes by the copy engine as it lies.

Only columns are renamed. Of its 128 columns a consumer's warp w owns 32, eight units of four: code i of unit 8 w + g is
row g + 8 (i mod 2) of warp w in accumulator i / 2. A thread therefore ends with four neighbouring columns of a token,
eight bytes of dx.

Block scales. A block of 16 columns is four units, so thread (g, t) of warp w needs block 2 w + g / 4 of all rows 2t,
2t+1, 2t+8, ...: sixteen values of a 64-row tile, which the scale role lays side by side, [block][t][sixteen].
"""

# Gluon calls these while it compiles, with plain integers: no launch ever carries a layout.
# ruff: noqa: D103
# pyright: basic, reportArgumentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE_N = 64  # rows of W in one step
TILE_K = 256  # columns of one tile: two consumers of 128
UNITS = 32  # of a row that a consumer owns, 16 bits each: 128 columns

CODES_SMEM = gl.NVMMASharedLayout(128, 16, rank=2)
RAW_SMEM = gl.NVMMASharedLayout(0, 32, rank=2)
DY_SMEM = gl.NVMMASharedLayout(128, 16, rank=2)
SCALES_SMEM = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])


@gluon.constexpr_function
def accumulator(tokens: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 16])


@gluon.constexpr_function
def a_operand(tokens: int) -> gl.DotOperandLayout:
    return gl.DotOperandLayout(0, accumulator(tokens), 2)


@gluon.constexpr_function
def codes() -> gl.DistributedLinearLayout:
    """[n, unit] as `ldmatrix.trans` gives it: n in (16 s + 8 h + 2 t + b), unit in (8 w + g)."""
    register = [[1, 0], [8, 0], [16, 0], [32, 0]]
    return gl.DistributedLinearLayout(
        register, [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [TILE_N, UNITS]
    )


@gluon.constexpr_function
def scales() -> gl.DistributedLinearLayout:
    """[block, t, (s, h, b)]: the 16 scales of a thread are contiguous; four neighbouring g read the same."""
    register = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]]
    lane = [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    return gl.DistributedLinearLayout(register, lane, [[2, 0, 0], [4, 0, 0]], [], [8, 4, 16])


@gluon.constexpr_function
def block_units() -> gl.DistributedLinearLayout:
    """`codes` as [n, block, unit of the block]."""
    register = [[1, 0, 0], [8, 0, 0], [16, 0, 0], [32, 0, 0]]
    lane = [[2, 0, 0], [4, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]
    return gl.DistributedLinearLayout(register, lane, [[0, 2, 0], [0, 4, 0]], [], [TILE_N, 8, 4])


@gluon.constexpr_function
def raw_scales() -> gl.DistributedLinearLayout:
    """[n, word of four block bytes] for the two warps of the scale role: rows n, n + 1, n + 8, n + 9 in a thread."""
    lane = [[16, 0], [32, 0], [2, 0], [4, 0], [0, 1]]
    return gl.DistributedLinearLayout([[1, 0], [8, 0]], lane, [[0, 2]], [], [TILE_N, 4])


@gluon.constexpr_function
def columns_first(tokens: int) -> gl.DistributedLinearLayout:
    """[column, token] of the two accumulators, a thread's four columns in neighbouring registers: one 8-byte store."""
    more = [[0, 8 << i] for i in range(tokens.bit_length() - 4)]
    return gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [0, 1], *more],
        [[0, 2], [0, 4], [4, 0], [8, 0], [16, 0]],
        [[32, 0], [64, 0]],
        [],
        [128, tokens],
    )
