"""Builds, loads and calls cpu_native.cpp.

Why C++ at all: torch has no 4-bit float on CPU. The best that ATen operators reach is 0.7 ns per weight, and what
Inductor makes of the same arithmetic is no faster (docs/cpu_kernels.md); 200 lines of C++ need 0.07 ns, which makes
one row of activations faster than the bf16 linear it replaces, as 4 bits should be.

Why built on the user's machine: a wheel stays pure Python and the code uses the vector instructions that are there.
The first call costs about two seconds of g++ or clang++, later processes about 30 ms. The library is kept in
`$XDG_CACHE_HOME/qerl-compile` (default `~/.cache/qerl-compile`) under a name that hashes the source, the flags and
everything the compiler says of itself and of the CPU, so that a home directory shared by different machines is safe.
It has no torch headers and a C interface, so it does not depend on the torch version. It takes OpenMP from the
libgomp that torch has loaded.

Without a compiler, or with `QERL_CPU_KERNEL=torch` in the environment, `load` returns None and kernels/cpu.py stays
in torch.

Shape legend: M activation rows, N output features, K input features, K2 = K/2 bytes, G = K/16 blocks.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
# Below this many multiplications per thread, waking a thread costs more than it saves (a few microseconds).
GRAIN = 2**18

_LINEAR_ARGS = "plppllfpi"
_DECODE_ARGS = "plplllpi"
_CTYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}


class NativeKernels:
    """The loaded library.

    The following conditions hold:
      * `linear_dtypes` are what `linear` takes without loss of speed: float32 and, with AVX512-BF16, bfloat16.
      * nothing is checked here: callers pass what kernels/checks.py has accepted.
    """

    def __init__(self, library: Path) -> None:
        """Load a library that `build` has made.

        Raises:
            OSError: the file cannot be loaded (for example from a folder mounted noexec).
        """
        self._lib = ctypes.CDLL(str(library))
        self._linear = {torch.float32: self._lib.qerl_linear_f32, torch.bfloat16: self._lib.qerl_linear_bf16}
        self._decode = {torch.float32: self._lib.qerl_decode_f32, torch.bfloat16: self._lib.qerl_decode_bf16}
        for functions, signature in ((self._linear, _LINEAR_ARGS), (self._decode, _DECODE_ARGS)):
            for function in functions.values():
                function.restype = None
                function.argtypes = [_CTYPES[letter] for letter in signature]
        has_bf16_dot = bool(self._lib.qerl_has_bf16_dot())
        self.linear_dtypes = (torch.float32, torch.bfloat16) if has_bf16_dot else (torch.float32,)

    def linear(self, x_MK: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: float) -> Tensor:
        """y = (x · Pᵀ) · decode_scale without a dequantized weight; meant for few rows.

        Args:
            x_MK: float32 or bfloat16 [M, K].
            codes_NK2: uint8 [N, K/2].
            block_decode_scale_NG: float8_e4m3fn [N, K/16].
            decode_scale: multiplies after the sum, in float32.

        Returns:
            [M, N], dtype of x; each row is the same bit by bit in any batch and with any number of threads.
        """
        x_MK, codes_NK2 = x_MK.contiguous(), codes_NK2.contiguous()
        block_decode_scale_NG = block_decode_scale_NG.contiguous()
        m, k = x_MK.shape
        n = codes_NK2.shape[0]
        y_MN = torch.empty(m, n, dtype=x_MK.dtype)
        self._linear[x_MK.dtype](
            x_MK.data_ptr(),
            m,
            codes_NK2.data_ptr(),
            block_decode_scale_NG.data_ptr(),
            n,
            k,
            decode_scale,
            y_MN.data_ptr(),
            _threads(n * k * (1 + m // 4)),
        )
        return y_MN

    def products(self, codes_NK2: Tensor, block_decode_scale_NG: Tensor, out_NK: Tensor) -> None:
        """Write P = e2m1(code) · e4m3(block).

        Args:
            codes_NK2: uint8 [N, K/2], rows contiguous, any row stride.
            block_decode_scale_NG: float8_e4m3fn [N, K/16], rows contiguous, any row stride.
            out_NK: float32 or bfloat16 [N, K], contiguous; every element is overwritten.
        """
        n, k = out_NK.shape
        self._decode[out_NK.dtype](
            codes_NK2.data_ptr(),
            codes_NK2.stride(0),
            block_decode_scale_NG.data_ptr(),
            block_decode_scale_NG.stride(0),
            n,
            k,
            out_NK.data_ptr(),
            _threads(n * k),
        )


@functools.cache
def load() -> NativeKernels | None:
    """The kernels of this machine, built if the cache folder has none; None if they cannot be had."""
    if os.environ.get("QERL_CPU_KERNEL") == "torch":
        return None
    try:
        return NativeKernels(build(FLAGS))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"The C++ kernel for 4-bit weights could not be built; linears run several times slower: {reason.strip()}\n"
            "Install g++ or clang++ with OpenMP, or set QERL_CPU_KERNEL=torch to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build(flags: tuple[str, ...]) -> Path:
    """Compile cpu_native.cpp, or find it already compiled.

    Args:
        flags: options of the compiler.

    Returns:
        Path of the shared library.

    Raises:
        OSError: there is no compiler, or no folder can be written.
        subprocess.SubprocessError: the compiler failed or hung.
    """
    compiler = _compiler()
    macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *flags, macros]).encode()).hexdigest()[:24]
    folder = _cache_folder()
    library = folder / f"cpu_native-{key}.so"
    if not library.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _run([*compiler, *flags, str(SOURCE), "-o", name])
            Path(name).replace(library)
        finally:
            Path(name).unlink(missing_ok=True)
    return library


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("no C++ compiler found (looked for $CXX, g++, clang++, c++).")


def _run(command: list[str]) -> str:
    # The command is the user's own compiler with our fixed options.
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout  # noqa: S603


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qerl-compile"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    return Path(tempfile.mkdtemp(prefix="qerl-compile-"))


def _threads(work: int) -> int:
    return min(torch.get_num_threads(), 1 + work // GRAIN)
