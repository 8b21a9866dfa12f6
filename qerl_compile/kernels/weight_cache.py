"""Opt-in: keep the decoded products of packed weights between calls, trading memory back for time.

    with weight_cache.enabled() as cache:
        train(...)
        print(cache.nbytes)

Off by default, because it gives back the memory that 4 bits saved: 2 bytes per weight for bf16 activations and 4 for
float32, beside the packed 0.56. What it buys depends on the kernel. With the C++ kernel a training step gains a few
per cent and decoding nothing (few rows read the packed bytes directly, which is faster than reading bf16); without a
compiler it is what makes the CPU path usable. It serves forward and dx, which use the same P.

When is an entry valid? It belongs to one codes tensor and one block-scale tensor *object*, and remembers both version
counters, which torch raises at every in-place change. Another tensor at the same address is another object; a changed
tensor has another version; a tensor that dies takes its entry with it (weak keys). `decode_scale` is not part of P
and may change freely. Tensors made under `torch.inference_mode` have no version counter and are never cached. Not
seen, because torch does not count it: writing through `tensor.data` or through another library's view of the memory.
Call `cache.clear()` after that.

The switch is process-wide and entries may be used from several threads; a race costs one decoding too many.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class _Entry:
    """Products of one packed weight as they were at two versions."""

    blocks: weakref.ReferenceType[Tensor]
    versions: tuple[int, int]
    products_NK: Tensor

    def fits(self, codes_NK2: Tensor, block_decode_scale_NG: Tensor) -> bool:
        same = self.blocks() is block_decode_scale_NG
        return same and self.versions == (codes_NK2._version, block_decode_scale_NG._version)


class WeightCache:
    """Products P [N, K] by packed weight and dtype, with their memory counted."""

    def __init__(self) -> None:
        self._by_codes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(
        self, codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype, decode: Callable[[], Tensor]
    ) -> Tensor:
        """Look up P, or compute and keep it.

        Args:
            codes_NK2: uint8 [N, K/2].
            block_decode_scale_NG: float8_e4m3fn [N, K/16].
            dtype: of the products.
            decode: makes P [N, K] in `dtype`; called on a miss.

        Returns:
            P; not to be written to.
        """
        if codes_NK2.is_inference() or block_decode_scale_NG.is_inference():
            return decode()
        entries: dict[torch.dtype, _Entry] | None = self._by_codes.get(codes_NK2)
        if entries is None:
            entries = self._by_codes[codes_NK2] = {}
        entry = entries.get(dtype)
        if entry is None or not entry.fits(codes_NK2, block_decode_scale_NG):
            versions = codes_NK2._version, block_decode_scale_NG._version
            entry = entries[dtype] = _Entry(weakref.ref(block_decode_scale_NG), versions, decode())
        return entry.products_NK

    @property
    def nbytes(self) -> int:
        """Memory held by the cached products."""
        return sum(entry.products_NK.nbytes for entries in self._by_codes.values() for entry in entries.values())

    def clear(self) -> None:
        """Forget everything."""
        self._by_codes.clear()


_active: WeightCache | None = None


def active() -> WeightCache | None:
    """The cache in force, None by default."""
    return _active


@contextmanager
def enabled() -> Iterator[WeightCache]:
    """Put a new, empty cache in force; it is emptied and the previous one restored on leaving."""
    global _active
    previous, _active = _active, WeightCache()
    try:
        yield _active
    finally:
        _active.clear()
        _active = previous
