"""The smallest warp-specialized kernels: two roles that share nothing, without and with an mbarrier between them.

python benchmarks/racecheck/roles.py [barred], under compute-sanitizer.
"""

# ruff: noqa: ANN001, ANN201

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from qerl_compile.kernels.gluon_compat import barrier


@gluon.jit
def many(out_ptr):
    i = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + i, i)


@gluon.jit
def few(out_ptr):
    i = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(out_ptr + 128 + i, i)


@gluon.jit
def plain(out_ptr):
    gl.warp_specialize([(many, (out_ptr,)), (few, (out_ptr,))], [1], [24])


@gluon.jit
def send(ready, out_ptr):
    many(out_ptr)
    mbarrier.arrive(ready, count=1)


@gluon.jit
def receive(ready, out_ptr):
    mbarrier.wait(ready, 0)
    few(out_ptr)


@gluon.jit
def barred(out_ptr):
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    barrier()
    gl.warp_specialize([(send, (ready, out_ptr)), (receive, (ready, out_ptr))], [1], [24])


if __name__ == "__main__":
    out = torch.zeros(160, dtype=torch.int32, device="cuda")
    kernel = barred if "barred" in sys.argv else plain
    kernel[(4,)](out, num_warps=4)
    print(kernel.__name__, "right" if out.sum().item() == 128 * 127 // 2 + 32 * 31 // 2 else "WRONG")
