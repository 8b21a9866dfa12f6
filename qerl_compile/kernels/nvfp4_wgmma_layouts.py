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

from functools import cache
from typing import Any

from triton.experimental.gluon import language as gl

WARPS = 4  # of one warp group
TILE_K = 256  # columns of one weight tile
PLANE_K = 64  # positions of one plane


@cache
def layouts(tokens: int, rows: int) -> dict[str, Any]:
    """Layout constants of the kernel, by the names of its parameters.

    Args:
        tokens: columns of the accumulator tile, 8 to 256, a power of two.
        rows: weight rows of one warp group, 64 or 128.

    Returns:
        Keyword arguments of `nvfp4_wgmma.kernel`.
    """
    more_rows = [[64, 0]] if rows == 128 else []
    warp_rows = [[16, 0], [32, 0]]
    accumulator = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, tokens, 16])
    quad_rows = [[4, 0], [2, 0], [8, 0]]
    return {
        "ACC": accumulator,
        "A_DOT": gl.DotOperandLayout(0, accumulator, 2),
        # one whole tile: 128 bytes a row
        "CODES": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], *more_rows, [0, 16]],
            [[0, 32], [0, 64], *quad_rows],
            warp_rows,
            [],
            [rows, 128],
        ),
        # its scales: four bytes in one word per thread and row
        "SCALES": gl.DistributedLinearLayout(
            [[1, 0], *more_rows], [[0, 1], [0, 2], *quad_rows], warp_rows, [], [rows, 4]
        ),
        # half a tile as bytes, and the same as (scale block, byte of the block)
        "HALF": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0], *more_rows],
            [[0, 16], [0, 32], *quad_rows],
            warp_rows,
            [],
            [rows, 64],
        ),
        "HALF3": gl.DistributedLinearLayout(
            [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [1, 0, 0], *_wide(more_rows)],
            [[0, 2, 0], [0, 4, 0], *_wide(quad_rows)],
            _wide(warp_rows),
            [],
            [rows, 8, 8],
        ),
        "CODES_SMEM": gl.NVMMASharedLayout(128, 8, rank=2),
        "X_SMEM": gl.NVMMASharedLayout(128, 16, rank=2),
    }


def _wide(bases: list[list[int]]) -> list[list[int]]:
    return [[*basis, 0] for basis in bases]
