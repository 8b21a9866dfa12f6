"""The CPU forms of the paged operators: C++ for float32 and bfloat16, else the reference.

Reading only live positions, in place, is what the C++ is for: torch would gather every row's pages into one rectangle
as wide as the longest row, expand the kv heads, build a mask and then attend. Sums are in float32, a row gives equal
bits in any batch and with any number of threads. Lengths and page numbers are checked before anything is written: they
are in reach here, and a wrong one would write over another row or outside of the cache.

Legend: paged_attention.py.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qerl_compile.kernels import cpu_build
from qerl_compile.kernels import paged_attention as paged

SOURCE = Path(__file__).with_name("cpu_paged.cpp")
LANES = 16  # the widest register: head dimensions are a multiple of it, or the reference serves

_POINTERS = ("q", "k", "v", "pages_k", "pages_v", "out", "table", "length")
_LONGS = (
    "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "page_k", "page_v", "table_row",
    "rows", "heads_kv", "group", "dim", "page", "window",
)  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of cpu_paged.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_long) for name in _LONGS),
        ("factor", ctypes.c_float),
    )


class PagedKernels:
    """The loaded library. Nothing is checked here but lengths and page numbers, by `bad_row`."""

    def __init__(self, library: Path) -> None:
        """Load a library that `build` has made.

        Raises:
            OSError: the file cannot be loaded.
        """
        lib = ctypes.CDLL(str(library))
        self._decode: dict[torch.dtype, Callable[..., None]] = {
            torch.float32: lib.qerl_paged_decode_f32,
            torch.bfloat16: lib.qerl_paged_decode_bf16,
        }
        self._write: dict[torch.dtype, Callable[..., None]] = {
            torch.float32: lib.qerl_paged_write_f32,
            torch.bfloat16: lib.qerl_paged_write_bf16,
        }
        self._bad_row: Callable[..., int] = lib.qerl_paged_bad_row
        for function in self._decode.values():
            cpu_build.declare(function, "pi")
        for function in self._write.values():
            cpu_build.declare(function, "plli")
        cpu_build.declare(self._bad_row, "plplllll", ctypes.c_long)

    def takes(self, pages: Tensor) -> bool:
        """Whether there is a kernel for a cache of this dtype and head dimension."""
        return pages.dtype in self._decode and pages.shape[3] % LANES == 0

    def bad_row(self, pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int, limit: int) -> int:
        """The first row whose length or page numbers are out of range, -1 if there is none."""
        return self._bad_row(
            table_BP.data_ptr(), table_BP.stride(0), length_B.data_ptr(), len(length_B), pages.shape[2], window, limit,
            pages.shape[0],
        )  # fmt: skip

    def decode(
        self,
        q_BHD: Tensor,
        k_BJD: Tensor,
        v_BJD: Tensor,
        pages_k: Tensor,
        pages_v: Tensor,
        table_BP: Tensor,
        length_B: Tensor,
        scaling: float,
        window: int,
    ) -> Tensor:
        """`qerl::paged_decode` for what `takes` allows and `bad_row` has not refused; D contiguous in q, k and v."""
        rows, heads, d = q_BHD.shape
        _, heads_kv, page, _ = pages_k.shape
        y_BHD = torch.empty(rows, heads, d, dtype=q_BHD.dtype)
        call = _Call(
            q_BHD.data_ptr(), k_BJD.data_ptr(), v_BJD.data_ptr(), pages_k.data_ptr(), pages_v.data_ptr(),
            y_BHD.data_ptr(), table_BP.data_ptr(), length_B.data_ptr(),
            q_BHD.stride(0), q_BHD.stride(1), k_BJD.stride(0), k_BJD.stride(1), v_BJD.stride(0), v_BJD.stride(1),
            pages_k.stride(0), pages_v.stride(0), table_BP.stride(0),
            rows, heads_kv, heads // heads_kv, d, page, window, scaling * math.log2(math.e),
        )  # fmt: skip
        threads = cpu_build.threads(rows * heads * d * table_BP.shape[1] * page)
        self._decode[q_BHD.dtype](ctypes.addressof(call), threads)
        return y_BHD

    def write(
        self, k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor
    ) -> None:
        """`qerl::paged_write`, under the conditions of `decode`."""
        rows, heads_kv, positions, d = k_BJTD.shape
        call = _Call(
            None, k_BJTD.data_ptr(), v_BJTD.data_ptr(), pages_k.data_ptr(), pages_v.data_ptr(), None,
            table_BP.data_ptr(), length_B.data_ptr(),
            0, 0, k_BJTD.stride(0), k_BJTD.stride(1), v_BJTD.stride(0), v_BJTD.stride(1),
            pages_k.stride(0), pages_v.stride(0), table_BP.stride(0),
            rows, heads_kv, 0, d, pages_k.shape[2], 0, 0.0,
        )  # fmt: skip
        threads = cpu_build.threads(rows * heads_kv * positions * d)
        self._write[k_BJTD.dtype](ctypes.addressof(call), k_BJTD.stride(2), v_BJTD.stride(2), threads)


@functools.cache
def load() -> PagedKernels | None:
    """The kernels of this machine, built if the cache folder has none; None if they cannot be had."""
    return cpu_build.available(
        lambda: PagedKernels(cpu_build.build(SOURCE, cpu_build.FLAGS)),
        "attention over the paged cache",
        "rollouts on the CPU run many times slower",
    )


@paged.paged_decode.register_kernel("cpu")
def decode(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    scaling: float,
    window: int,
    cos_BD: Tensor | None = None,
    sin_BD: Tensor | None = None,
    bias_XD: Tensor | None = None,
) -> Tensor:
    """CPU form of `qerl::paged_decode`; arguments, result and errors as there."""
    paged.check_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, window)
    paged.check_before(q_BHD, k_BJD, cos_BD, sin_BD, bias_XD)
    paged.check_rows(paged.DECODE, q_BHD, k_BJD, v_BJD, table_BP, length_B)
    paged.check_rotary_rows(cos_BD, sin_BD, length_B)
    native = load()
    limit = table_BP.shape[1] * pages_k.shape[2]
    _check_data(paged.DECODE, native, pages_k, table_BP, length_B, window, limit)
    q_BHD, k_BJD, v_BJD = paged.finished(q_BHD, k_BJD, v_BJD, cos_BD, sin_BD, bias_XD)
    if native is None or not native.takes(pages_k):
        return paged.reference_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, scaling, window)
    q_BHD, k_BJD, v_BJD = _rows(q_BHD), _rows(k_BJD), _rows(v_BJD)
    return native.decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, scaling, window)


@paged.paged_write.register_kernel("cpu")
def write(k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor) -> None:
    """CPU form of `qerl::paged_write`; arguments and errors as there."""
    paged.check_write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)
    paged.check_rows(paged.WRITE, k_BJTD, v_BJTD, table_BP, length_B)
    native = load()
    limit = min(k_BJTD.shape[2], table_BP.shape[1] * pages_k.shape[2])
    _check_data(paged.WRITE, native, pages_k, table_BP, length_B, 0, limit)
    if native is None or not native.takes(pages_k):
        paged.reference_write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)
    else:
        native.write(_rows(k_BJTD), _rows(v_BJTD), pages_k, pages_v, table_BP, length_B)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_data(
    where: str,
    native: PagedKernels | None,
    pages: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    window: int,
    limit: int,
) -> None:
    find = _bad_row if native is None else native.bad_row
    row = find(pages, table_BP, length_B, window, limit)
    if row >= 0:
        paged.refuse_row(where, row, pages, table_BP, length_B, limit)


def _bad_row(pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int, limit: int) -> int:
    """`PagedKernels.bad_row` without the library."""
    page = pages.shape[2]
    for row, length in enumerate(length_B.tolist()):
        if not 0 <= length <= limit:
            return row
        first = max(0, length - window) // page if window else 0
        numbers = table_BP[row, first : -(-length // page)]
        if not bool(((numbers >= 0) & (numbers < pages.shape[0])).all()):
            return row
    return -1
