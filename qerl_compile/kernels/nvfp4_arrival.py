"""Waiting until x is in order, in a GEMM that is launched as a dependent of the kernel that puts it in order.

`griddepcontrol.wait` waits until all of the kernel before has ended. lead_in.py makes h beside, which takes longer and
is read only at the end; it says how its programs count themselves and why going by the count is safe. Here is the other
side: read the word with acquire until it is there. It is read by an atomic that adds nothing, as all waits for counters
here are: Triton hands its result to all threads of a role, so none leaves the loop alone.

The copy engine reads through another proxy than the stores went, so where it fetches x a fence comes after the acquire
(PTX ISA, "Async proxy").
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportArgumentType=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qerl_compile.kernels.gluon_compat import gdc_wait


@gluon.jit
def await_x(arrival_ptr, arrival_at, arriving):
    """Return when x may be read: by the count, or (no word, or `arriving` 0) when the kernel before has ended."""
    if arrival_ptr is None:
        gdc_wait()
    else:
        if arriving > 0:
            while gl.atomic_add(arrival_ptr + arrival_at, 0, sem="acquire") < arriving:
                pass
        else:
            gdc_wait()


@gluon.jit
def fence_for_copy_engine():
    """Let copies that this thread asks for from here on see what it has acquired."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
