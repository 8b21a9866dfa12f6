"""Who holds which weight, so that a Hopper tensor core is fed without moving data between threads.

A warp group's `wgmma` takes its A operand from registers: thread t of a quad (lane = 4 g + t) must hold, for rows g and
g + 8 of its warp and each step of 16 columns, positions 2t, 2t+1, 2t+8, 2t+9. A packed row offers 32-bit words of eight
codes. Instead of shuffling codes to where the instruction wants them we *rename* things until no shuffle is left:

- Columns. A sum over k may be taken in any order, as long as x is permuted alike (nvfp4_permute.py). Of every 256
  columns, thread t takes the 64 from 64 t on: 32 bytes of codes, and exactly four whole scale blocks.
- Pairs. Two weights share a register. The nibbles i and i + 4 of a word lie 16 bits apart, where a packed pair wants
  them, so one mask picks both: the pairs are (0, 4), (1, 5) in the "low" plane and (2, 6), (3, 7) in the "high" one.
- Rows. Rows 2r and 2r + 1 go to one thread, which then stores two neighbouring outputs at once; the remaining row bits
  are ordered so that the 16-byte loads from shared memory meet all 32 banks.

A 256-column tile is thus four planes of 64 positions (half 0 low, half 0 high, half 1 low, half 1 high). In bits, from
the highest: the byte of a code is (t:2, half, word:2, byte:2), its position in its plane (word:2, byte's high bit, t:2,
byte's low bit). What is below are these sentences as layout bases; nothing here runs on the device.
"""

# Gluon calls these while it compiles, with plain integers: no launch ever carries a layout.
# ruff: noqa: D103
# pyright: basic, reportArgumentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = 4  # of one warp group
TILE_K = 256  # columns of one weight tile

WARP_ROWS = [[16, 0], [32, 0]]
QUAD_ROWS = [[4, 0], [2, 0], [8, 0]]

CODES_SMEM = gl.NVMMASharedLayout(128, 8, rank=2)
X_SMEM = gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.constexpr_function
def _wide(bases: list[list[int]]) -> list[list[int]]:
    return [[*basis, 0] for basis in bases]


@gluon.constexpr_function
def accumulator(tokens: int) -> gl.NVMMADistributedLayout:
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, tokens, 16])


@gluon.constexpr_function
def a_operand(tokens: int) -> gl.DotOperandLayout:
    return gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, tokens, 16]), 2)


@gluon.constexpr_function
def codes() -> gl.DistributedLinearLayout:
    """One whole tile: 128 bytes a row."""
    register = [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], [0, 16]]
    return gl.DistributedLinearLayout(register, [[0, 32], [0, 64], *QUAD_ROWS], WARP_ROWS, [], [64, 128])


@gluon.constexpr_function
def scales() -> gl.DistributedLinearLayout:
    """Its scales: four bytes in one word per thread and row."""
    register = [[1, 0]]
    return gl.DistributedLinearLayout(register, [[0, 1], [0, 2], *QUAD_ROWS], WARP_ROWS, [], [64, 4])


@gluon.constexpr_function
def half() -> gl.DistributedLinearLayout:
    """Half a tile as bytes."""
    register = [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]]
    return gl.DistributedLinearLayout(register, [[0, 16], [0, 32], *QUAD_ROWS], WARP_ROWS, [], [64, 64])


@gluon.constexpr_function
def half_blocks() -> gl.DistributedLinearLayout:
    """The same as (scale block, byte of the block)."""
    register = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [1, 0, 0]]
    lane = [[0, 2, 0], [0, 4, 0], *_wide(QUAD_ROWS)]
    return gl.DistributedLinearLayout(register, lane, _wide(WARP_ROWS), [], [64, 8, 8])


@gluon.constexpr_function
def partial(tokens: int) -> gl.DistributedLinearLayout:
    """An accumulator as it lies between CTAs, [tokens / 8][64 rows][8]: 256 contiguous bytes per warp and access."""
    columns = [[512 << i] for i in range(tokens.bit_length() - 4)]
    return gl.DistributedLinearLayout(
        [[1], [64], *columns], [[2], [4], [8], [16], [32]], [[128], [256]], [], [64 * tokens]
    )
