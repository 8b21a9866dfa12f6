"""Loads and calls cpu_native.cpp.

Why C++ at all: torch has no 4-bit float on CPU. The best that ATen operators reach is 0.7 ns per weight, and what
Inductor makes of the same arithmetic is no faster (docs/cpu_kernels.md); 200 lines of C++ need 0.07 ns, which makes
one row of activations faster than the bf16 linear it replaces, as 4 bits should be.

How it is built and kept, and what happens without a compiler: cpu_build.py.

Shape legend: M activation rows, N output features, K input features, K2 = K/2 bytes, G = K/16 blocks.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qerl_compile.kernels import cpu_build
from qerl_compile.kernels.cpu_build import FLAGS, threads

SOURCE = Path(__file__).with_name("cpu_native.cpp")

_LINEAR_ARGS = "plppllfpi"
_DECODE_ARGS = "plplllpi"


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
                cpu_build.declare(function, signature)
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
            threads(n * k * (1 + m // 4)),
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
            threads(n * k),
        )


@functools.cache
def load() -> NativeKernels | None:
    """The kernels of this machine, built if the cache folder has none; None if they cannot be had."""
    return cpu_build.available(lambda: NativeKernels(build(FLAGS)), "4-bit weights", "linears run several times slower")


def build(flags: tuple[str, ...]) -> Path:
    """Compile cpu_native.cpp, or find it already compiled.

    Args:
        flags: options of the compiler.

    Returns:
        Path of the shared library.
    """
    return cpu_build.build(SOURCE, flags)
