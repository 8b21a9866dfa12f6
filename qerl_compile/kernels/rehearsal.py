"""Compile the kernels of a run before it needs them: call the launchers on meta tensors, in processes without a GPU.

A kernel has many forms: its constexpr parameters come from the weight's shape and the number of tokens, and Triton
compiles a form when it is first launched, on the thread that launches it. A first step at 7B launches several dozen,
and each takes a second or so of one core while the others idle.

    python -m qerl_compile.kernels.rehearsal < SCRIPT        a process of its own; a script says which shapes will come

    1  every launcher (linear, adapted_linear, linear_dx, paged decode and write) is called on meta tensors of these
       shapes. Dispatch, plans and specialization are the real ones, so no list of forms has to be kept in step with
       the code. Launches go to a recorder (prepared_launch.py); products that torch makes cost nothing on meta.
    2  what was recorded, each form once and in the order in which a run meets it, is dealt out to forked processes.
       They call Triton's public `warmup`, which compiles as a launch would and leaves the result in Triton's disk
       cache, where the run's first launch finds it.

**No GPU.** The processes see none (warm_up.py hides it): a CUDA context in each would take gigabytes of the memory that
is wanted for weights. Triton asks its *driver* for the target; ours answers what the run's own device said.

**Nothing depends on it.** A form that was forgotten, or failed here, or came too late, is compiled at its first launch
as before. Failures are printed as JSON with everything else, and warm_up.py says them.

Why processes: half of a compilation is Python (benchmarks/precompile.py). Why a process that forks: torch and Triton
are imported once, in seconds, and a parent that has no threads and no CUDA may fork. A compiler that crashes takes its
process along; the rehearsal then ends, and does not wait for a result that will never come.

None of the processes outlives the run: the first looks every second whether its parent is still there, and the kernel
ends the others with it. So a run may be killed by a signal that leaves it no time to tidy up.

What this module does not do: know a model (warm_up.py), or compile Inductor's kernels (Inductor has workers for that).
"""

# pyright: basic, reportCallIssue=false

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from qerl_compile.kernels import cuda, cuda_device, paged_cuda, prepared_launch
from qerl_compile.kernels.rehearsal_script import Attention, Linear, Script

PR_SET_PDEATHSIG = 1  # of prctl(2)


Form = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, the arguments of one launch, and its constexpr parameters and options."""


def forms(script: Script) -> list[Form]:
    """Call everything a script names on meta tensors; return each form of a kernel once, in order.

    This process launches no kernel afterwards: it records (prepared_launch.py).
    """
    found: dict[object, Form] = {}

    def recorder(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found.setdefault(_key(kernel, arguments, constants), (kernel, arguments, constants))

    prepared_launch.record(recorder)
    cuda_device.stand_in(script.capability, script.multiprocessors)
    with torch.no_grad():
        for tokens in script.prefill_tokens:
            for linear in script.linears:
                _rollout_linear(linear, tokens)
        for rows in sorted(script.decode_rows, reverse=True):
            for linear in script.linears:
                _rollout_linear(linear, rows)
            if script.attention is not None:
                _attention(script.attention, rows)
        for tokens in script.training_tokens:
            for linear in script.linears:
                packed = _packed(linear)
                cuda.linear(_meta(tokens, linear.k), *packed)
                cuda.linear_dx(_meta(tokens, linear.n), *packed)
    return list(found.values())


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    codes_NK2 = _meta(linear.n, linear.k // 2, dtype=torch.uint8)
    block_NG = _meta(linear.n, linear.k // 16, dtype=torch.float8_e4m3fn)
    return codes_NK2, block_NG, _meta(1, dtype=torch.float32)


def _rollout_linear(linear: Linear, tokens: int) -> None:
    x_MK = _meta(tokens, linear.k)
    if not linear.rank:
        cuda.linear(x_MK, *_packed(linear))
        return
    adapter = _meta(linear.rank, linear.k), _meta(linear.n, linear.rank)
    residual = _meta(tokens, linear.n) if linear.residual else None
    cuda.adapted_linear(x_MK, *_packed(linear), *adapter, residual)


def _attention(shape: Attention, rows: int) -> None:
    d, heads, heads_kv = shape.head_dim, shape.heads, shape.kv_heads
    qkv_BXD = _meta(rows, heads + 2 * heads_kv, d)  # one product, of which q, k and v are slices
    q_BHD, k_BJD, v_BJD = qkv_BXD.split([heads, heads_kv, heads_kv], dim=1)
    pages = _meta(2, heads_kv, shape.page_tokens, d)
    table_BP, length_B = _meta(rows, shape.pages, dtype=torch.int32), _meta(rows, dtype=torch.int32)
    rotary_BD = _meta(rows, d)
    bias_XD = _meta(heads + 2 * heads_kv, d) if shape.bias else None
    for window in shape.windows:
        paged_cuda.decode(
            q_BHD, k_BJD, v_BJD, pages, pages, table_BP, length_B, d**-0.5, window, rotary_BD, rotary_BD, bias_XD
        )
    new_BJTD = _meta(rows, heads_kv, shape.page_tokens, d)
    paged_cuda.write(new_BJTD, new_BJTD, pages, pages, table_BP, length_B)


def _key(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> object:
    """Equal for launches that Triton compiles once, as far as can be told from what it specializes on."""
    plain = [parameter for parameter in kernel.params if not parameter.is_constexpr]
    parts: list[object] = []
    for parameter, argument in zip(plain, arguments, strict=True):
        if isinstance(argument, Tensor):
            parts.append((argument.dtype, argument.data_ptr() % 16 == 0))
        elif isinstance(argument, int):
            special = () if parameter.do_not_specialize else (argument == 1, argument % 16 == 0)
            parts.append((argument.bit_length() < 32, *special))
        elif argument is None:
            parts.append(None)
        else:  # a descriptor: element type, box and layout
            parts.append((argument.base.dtype, tuple(argument.block_shape), str(argument.layout)))
    return id(kernel), tuple(parts), tuple((name, type(value), value) for name, value in sorted(constants.items()))


def compile_forms(script: Script, made: list[Form]) -> Iterator[dict[str, Any]]:
    """Compile forms in forked processes; yield what became of each: kernel, seconds, error or None.

    Raises:
        BrokenProcessPool: one of the processes died, and with it the rest of the work.
    """
    from triton.runtime import driver

    parent = os.getppid()
    driver.set_active(_Driver(script.capability))  # pyright: ignore[reportArgumentType]  # all of it that warmup asks
    if not made:
        return
    _made[:] = made
    context, workers = multiprocessing.get_context("fork"), max(1, min(script.processes, len(made)))
    with ProcessPoolExecutor(workers, context, _end_with, (os.getpid(),)) as pool:
        left = {pool.submit(_compile, index) for index in range(len(made))}
        while left:
            done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
            for one in done:
                yield one.result()
            if os.getppid() != parent:
                os._exit(1)


def _end_with(parent: int) -> None:
    """Have the kernel end this process when the one that forked it ends, however that comes about."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


_made: list[Form] = []  # inherited by forked processes: kernels cannot be pickled


def _compile(index: int) -> dict[str, Any]:
    kernel, arguments, constants = _made[index]
    begin, fault = time.perf_counter(), None
    try:
        kernel.warmup(*arguments, grid=(1,), **constants)
    except Exception as error:  # whatever a compiler says, the run compiles this form itself and meets the error there
        fault = f"{type(error).__name__}: {error}"[:400]
    return {"kernel": kernel.__name__, "seconds": round(time.perf_counter() - begin, 3), "error": fault}


class _Driver:
    """What `warmup` asks of Triton's driver, answered for a device that this process does not see."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        """Return the compilation target; a warp has 32 threads."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_current_device(self) -> int:
        """Return the device whose compiled kernels `warmup` looks among."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream, on which nothing is launched."""
        return 0


def main(lines: Iterable[str]) -> None:
    """Carry out a script; print one JSON line per form, and one with the total."""
    begin = time.perf_counter()
    os.nice(5)  # the run's own thread goes first
    script = Script.from_json(next(iter(lines)))
    made = forms(script)
    for result in compile_forms(script, made):
        _say(result)
    _say({"forms": len(made), "seconds": round(time.perf_counter() - begin, 3)})


def _say(result: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # nobody listens any more
        os._exit(1)


if __name__ == "__main__":
    main(sys.stdin)
