"""The Gluon names our Hopper kernels use, where each supported Triton keeps them. Device code imports them from here.

Gluon is experimental and renames things between releases. torch pins its Triton: 2.11 takes 3.6.0, 2.12 takes 3.7.0 or
3.7.1, 2.14 takes 3.8; 3.9 is the newest. The same device code compiles on all of them, to loops of the same structure
(3.9's are 6 to 8 % longer: moves), once two names are looked up here:

    ours         3.6                               3.7              3.8          3.9
    barrier      gl.thread_barrier                 gl.barrier       the same     the same
    tma_load     tma.async_copy_global_to_shared   the same         both names   tma.async_load; the old one raises

Everything else we use has kept its name, its place and the meaning of its positional arguments: layouts, warpgroup_mma
and its wait, mma_v2, inline assembly, gdc_*, TensorDescriptor. Three differences need care rather than a name:

- mbarrier.expect calls its second argument `bytes` in 3.6 and `bytes_per_cta` since: pass it by position.
- warp_specialize wants the register counts in 3.6; they are optional since: always pass them.
- A missing old name is no sign of a version: 3.9 keeps async_copy_global_to_shared as a function that raises when it is
  compiled. So the new name is asked for first.

Import this module only where nvfp4_arithmetic.GLUON is true: on a Triton that moved the modules below, its imports
fail. GLUON names the releases where tests/kernels/test_triton_lowering.py has seen the kernels compile with overlapped
`wgmma` and without spills; elsewhere the plain Triton kernels run, which are slower and not experimental.

What is not here: how a compiled kernel is launched. Triton rewrote its launcher in 3.7 and moved it in 3.8.
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "TensorDescriptor",
    "barrier",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "mbarrier",
    "mma_v2",
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # pyright: ignore[reportAttributeAccessIssue]
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
