"""What the persistent, warp-specialized kernels share: dividing work, walking a ring of slots, a place in the grid.

A ring's slot has two mbarriers, full and empty; the parity to wait for changes whenever the ring has been gone round.

CTAs are numbered backwards, so that the owner of a shared tile, who waits for those after it, only ever waits for CTAs
that were launched before it. `groups` of them work side by side: neighbours take the same weights for different tiles
of tokens, so that DRAM is read once.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def whole_and_shared(tiles: int, pieces: int, workers: int, waves: int) -> tuple[int, int]:
    """Whole tiles for each worker, and tiles that are left to be shared.

    Args:
        tiles: in all.
        pieces: into which a shared tile can be cut.
        workers: CTAs, at most tiles * pieces.
        waves: whole tiles wished for each worker; -1 as many as fit.
    """
    waves = tiles // workers if waves < 0 else min(waves, tiles // workers)
    if 0 < (tiles - waves * workers) * pieces < workers:
        waves -= 1  # every CTA must get a run: the owner of a shared tile waits for all that come after it
    return waves, tiles - waves * workers


def side_by_side(m_tiles: int, most: int) -> int:
    """Groups of CTAs, each with equally many of the tiles of tokens: the largest divisor up to `most`.

    A prime number of tiles above `most` would leave one group, which reads the weights once a tile; up to twice `most`
    it gets a group a tile instead.
    """
    groups = max(divisor for divisor in range(1, most + 1) if m_tiles % divisor == 0)
    return m_tiles if groups == 1 < most and m_tiles <= 2 * most else groups


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one in a ring, and the parity of its barrier. A division here would cost more than a copy."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def place(groups):
    """This CTA's number in its group, the CTAs of a group, and the group."""
    at = gl.num_programs(0) - 1 - gl.program_id(0)
    return at // groups, gl.num_programs(0) // groups, at % groups
