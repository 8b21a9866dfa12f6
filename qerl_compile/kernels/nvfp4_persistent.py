"""What the persistent, warp-specialized kernels share: walking a ring of slots, and a CTA's place in the grid.

A ring's slot has two mbarriers, full and empty; the parity to wait for changes whenever the ring has been gone round.

CTAs are numbered backwards, so that the owner of a shared tile, who waits for those after it, only ever waits for CTAs
that were launched before it. `groups` of them work side by side: neighbours take the same weights for different tiles
of tokens, so that DRAM is read once.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
