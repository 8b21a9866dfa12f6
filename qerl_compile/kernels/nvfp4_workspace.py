"""Memory that kernels share between calls: partial sums, counters, and one dequantized weight.

Split-K kernels need room for partial sums and counters that start at zero; every kernel leaves them at zero again. A
stream runs its kernels one after the other, so one piece per (device, stream) is enough, and no call allocates once the
largest shape has been seen.

`dense_weight` is the scratch of the two-step path: one bfloat16 weight per (device, stream), as large as the largest
layer. It remembers which packed tensors it holds. Under activation checkpointing a layer's recompute is followed at
once by its backward, so the second use of the same weight finds it there and the dequantize pass is saved.

CUDA graphs. A replay would overwrite a shared buffer behind the memory's back, so while a graph is being captured every
piece is allocated in the graph's own pool, and nothing is remembered.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_PARTIAL: dict[tuple[int, int], Tensor] = {}
_FLAGS: dict[tuple[int, int], Tensor] = {}
_DENSE: dict[tuple[int, int], Tensor] = {}
_HELD: dict[tuple[int, int], tuple[object, ...]] = {}

MIN_PARTIAL = 1 << 20
MIN_FLAGS = 1 << 14


def _place(device: torch.device) -> tuple[int, int] | None:
    """(device, stream), or None while a graph is captured or without CUDA."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors exactly if they are the same bytes.

    A weak reference to the storage and not its address: an address is given out again after a model is deleted.
    """
    version = 0 if tensor.is_inference() else tensor._version
    return StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tuple(tensor.shape), version


def partial_sums(device: torch.device, count: int) -> Tensor:
    """float32 [>= count], contents undefined."""
    place = _place(device)
    if place is None:
        return torch.empty(count, dtype=torch.float32, device=device)
    held = _PARTIAL.get(place)
    if held is None or held.numel() < count:
        held = _PARTIAL[place] = torch.empty(max(count, MIN_PARTIAL), dtype=torch.float32, device=device)
    return held


def flags(device: torch.device, count: int) -> Tensor:
    """int32 [>= count], all zero, to be left all zero."""
    place = _place(device)
    if place is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    held = _FLAGS.get(place)
    if held is None or held.numel() < count:
        held = _FLAGS[place] = torch.zeros(max(count, MIN_FLAGS), dtype=torch.int32, device=device)
    return held


def dense_weight(codes_NK2: Tensor, decode_scale: Tensor, fill: Callable[[Tensor], None]) -> Tensor:
    """The bfloat16 weight [N, K] of these codes, from the scratch if it is still there.

    Args:
        codes_NK2: uint8 [N, K/2]; its identity and version, with decode_scale's, name the weight.
        decode_scale: float32, one element.
        fill: writes the weight into the tensor it is given.

    Returns:
        bfloat16 [N, K], valid until the next call on this stream.
    """
    n, k = codes_NK2.shape[0], codes_NK2.shape[1] * 2
    place = _place(codes_NK2.device)
    if place is None:
        w_NK = torch.empty(n, k, dtype=torch.bfloat16, device=codes_NK2.device)
        fill(w_NK)
        return w_NK
    scratch = _DENSE.get(place)
    if scratch is None or scratch.numel() < n * k:
        _HELD.pop(place, None)
        _DENSE.pop(place, None)  # free the small one before asking for the large one
        scratch = _DENSE[place] = torch.empty(n * k, dtype=torch.bfloat16, device=codes_NK2.device)
    w_NK = scratch[: n * k].view(n, k)
    wanted = (*_identity(codes_NK2), *_identity(decode_scale))
    if _HELD.get(place) != wanted:
        _HELD.pop(place, None)  # if fill fails, nothing is held
        fill(w_NK)
        _HELD[place] = wanted
    return w_NK


def forget() -> None:
    """Dequantize again at the next call, whatever the scratch holds. For measurements."""
    _HELD.clear()


def release() -> None:
    """Give all scratch back to the allocator, as after loading or before a large evaluation."""
    for held in (_PARTIAL, _FLAGS, _DENSE, _HELD):
        held.clear()
