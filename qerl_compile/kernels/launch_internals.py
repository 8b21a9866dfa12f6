"""What a prepared launch takes from Triton beyond its public interface. Nothing else touches these names.

Relied on, and read in the sources of Triton 3.6 (runtime/jit.py, compiler/compiler.py, backends/nvidia/driver.py):

- `kernel[grid](...)` returns the CompiledKernel that it launched; the same object for the same specialization.
- CompiledKernel.run is a CudaLauncher; its `launch` is the generated C function or, for a kernel with TMA arguments, a
  Python function that closes over it by the name `launcher` and encodes every descriptor at every call.
- The C function takes grid, stream, function, cooperative, pdl, two scratch buffers, packed metadata, launch metadata
  and two hooks (None for none), then one object per parameter: an integer is taken for a pointer as it is, a
  descriptor is replaced by its encoded map, shape and strides, a constant by any object.
- make_tensordesc_arg makes those from a descriptor and the kernel's `tensordesc_meta`.

Triton 3.9 passes other arguments to another function. So: this release or none. `AVAILABLE` is False elsewhere, and
under Triton's interpreter, and every launch is then the public one.
"""

# pyright: basic, reportCallIssue=false

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.runtime.jit import JITFunction

RELEASE = "3.6."
ARGUMENTS = "iiiKKppOOOOOO"  # of the C function before the kernel's own


def _available() -> bool:
    if not triton.__version__.startswith(RELEASE) or knobs.runtime.interpret:
        return False
    try:
        from triton.backends.nvidia import driver
    except ImportError:
        return False
    same = getattr(driver, "_BASE_ARGS_FORMAT", None) == ARGUMENTS
    return same and all(hasattr(driver, name) for name in ("make_tensordesc_arg", "CudaLauncher"))


AVAILABLE = _available()


def jit_function(kernel: object) -> bool:
    """Whether this is a compiled kernel and not an interpreted one."""
    return isinstance(kernel, JITFunction)


def watched() -> bool:
    """Whether a profiler (Proton, torch.profiler's Triton hooks) asks to see every launch."""
    runtime = knobs.runtime
    return _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook)


def _calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


class Raw(NamedTuple):
    """A compiled kernel, opened: `launch(*grid, stream, *fixed, *arguments, *constants)`."""

    launch: Callable[..., None]
    fixed: tuple[object, ...]  # what stands between stream and arguments
    constants: tuple[None, ...]  # one per constexpr parameter
    boxes: tuple[dict[str, Any], ...]  # how each TMA argument is to be encoded


def opened(compiled: Any, constants: int, boxes: int) -> Raw | None:
    """The C launcher of a compiled kernel, or None if it is not made as described above.

    Args:
        compiled: what `kernel[grid](...)` returned.
        constants: its constexpr parameters, all after the others.
        boxes: its TMA arguments.
    """
    run = compiled.run
    metadata = compiled.metadata
    meta = tuple(metadata.tensordesc_meta or ())
    if run.global_scratch_size or run.profile_scratch_size or len(meta) != boxes or None in meta:
        return None
    launch = run.launch
    if boxes:
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    if not inspect.isbuiltin(launch):
        return None
    flags = (run.launch_cooperative_grid, run.launch_pdl)
    fixed = (compiled.function, *flags, None, None, compiled.packed_metadata, None, None, None)
    return Raw(launch, fixed, (None,) * constants, meta)


def encoded(descriptor: Any, meta: dict[str, Any]) -> tuple[object, ...]:
    """A TMA argument as the C launcher takes it. Holds addresses and extents, no tensor."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return tuple(make_tensordesc_arg(descriptor, meta))
