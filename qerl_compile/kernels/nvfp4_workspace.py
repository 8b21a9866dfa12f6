"""Memory that kernels share between calls: partial sums, counters, and one dequantized weight.

Split-K kernels need room for partial sums and `flags`, counters that start at zero and that every kernel leaves at zero
again. (Where a pass over x comes first, it clears counters behind the partial sums instead.) A
stream runs its kernels one after the other, so one piece per (device, stream) is enough, and no call allocates once the
largest shape has been seen. Calls of more than one kernel take `turn`: two threads may share a stream.

`arrivals` are two words by which a kernel tells the next one, while both run, how many of its programs have done what
the next one waits for (lead_in.py). Calls of a captured graph use them in turn, and each clears the other's.

`permuted` is x as the Hopper kernel reads it: the copy engine's descriptor of a buffer that stays is made only once.

`dense_weight` is the scratch of the two-step path: one bfloat16 weight per (device, stream), as large as the largest
layer. It remembers which packed tensors it holds. Under activation checkpointing a layer's recompute is followed at
once by its backward, so the second use of the same weight finds it there and the dequantize pass is saved.

CUDA graphs. A replay would overwrite a shared buffer behind the memory's back, so while a graph is captured scratch is
allocated call by call in the graph's own pool, and nothing is remembered of it. Only counters are not: a node that
zeroes them costs 2 µs a call, so each capture gets one of 64 sets that an earlier call has laid by. A set is never
taken back, 16 KB a capture: nobody tells us when a graph dies.

What outlives a call is allocated by a thread of our own on a stream of our own: while Inductor's
`mode="reduce-overhead"` warms up, what its thread allocates (torch 2.11; its stream, before) lies in a pool in which it
allows nothing that it does not know.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Place = tuple[int, int]  # device, stream

_PARTIAL: dict[Place, Tensor] = {}
_FLAGS: dict[Place, Tensor] = {}
_PERMUTED: dict[Place, Tensor] = {}
_DENSE: dict[Place, Tensor] = {}
_HELD: dict[Place, tuple[object, ...]] = {}
_ARRIVALS: dict[Place, Tensor] = {}
_CAPTURES: dict[Place, "_Captured"] = {}  # the last capture on each (device, stream)
_SPARES: dict[int, list[Tensor]] = {}  # device -> sets of counters for the next captures
_TAKEN: list[Tensor] = []  # flags that captured graphs use
_TURNS: dict[Place, threading.Lock] = {}

MIN_PARTIAL = 1 << 20
MIN_FLAGS = 1 << 14
SPARE_FLAGS = 1 << 12
ARRIVAL_WORDS = 4  # of those, the last: two, and as many as keep them aligned like the first
SPARES = 64
PERMUTED_ROWS = 1 << 16  # of 128 bytes: 8 MB; above, one allocation costs nothing beside the kernel


@dataclass
class _Captured:
    """A capture, by the driver's number, and what belongs to it."""

    number: int
    flags: Tensor
    arrivals: Tensor
    calls: int = 0  # that were launched with arrivals


class Arrivals(NamedTuple):
    """Where programs of a kernel count themselves when they are done.

    Attributes:
        words: int32, two that matter, 16-byte aligned.
        at: which of them this call uses. The same kernel sets the other one to zero, for the next call, before it
            counts its first program.
        early: whether the word is known to be zero before: only then may the next kernel go by it.
        capture: that the call belongs to; None for none.
    """

    words: Tensor
    at: int
    early: bool
    capture: _Captured | None = None

    def launched(self) -> None:
        """Make way for the next call. Not before the launch: a call that failed would have cleared nothing."""
        if self.capture is not None:
            self.capture.calls += 1


def stream_of(device_index: int) -> int:
    """The handle of torch's current stream.

    `torch.cuda.current_stream` builds an object around it, which takes 2 µs of a launch's 15. The name is private and
    in every CUDA build since 1.8; code that Inductor generates uses it.
    """
    get = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return get(device_index) if get else torch.cuda.current_stream(device_index).cuda_stream


def turn(device: torch.device) -> threading.Lock:
    """Held from the kernel that fills scratch to the one that reads it, so that no thread comes between them."""
    return _TURNS.setdefault(_here(device), threading.Lock())


def _here(device: torch.device) -> Place:
    if device.type == "meta":  # compiled and not launched (rehearsal.py)
        return -1, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, stream_of(index)


def _place(device: torch.device) -> Place | None:
    """Whose scratch to use; None for nobody's: without CUDA, or while a graph is captured."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return _here(device)


@cache
def _own_stream(device_index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index)


def _lasting(count: int, dtype: torch.dtype, place: Place) -> Tensor:
    """Uninitialised memory that may outlive the call, from a thread and a stream of our own, for the current stream."""
    index, _ = place
    user = torch.cuda.current_stream(index)

    def allocate() -> Tensor:
        with torch.cuda.device(index), torch.cuda.stream(_own_stream(index)):
            return torch.empty(count, dtype=dtype, device="cuda")

    with ThreadPoolExecutor(1) as thread:
        new = thread.submit(allocate).result()
    new.record_stream(user)  # freed, it is given out again only after this stream's kernels
    return new


def _capture_number(stream: int) -> int | None:
    """The driver's number of the capture that the stream is in: unique in the process (cuStreamGetCaptureInfo)."""
    info = _capture_info()
    if info is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    failed = info(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number))
    return number.value if not failed and status.value == 1 else None


@cache
def _capture_info() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo
    except (OSError, AttributeError):
        return None


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
        held = _PARTIAL[place] = _lasting(max(count, MIN_PARTIAL), torch.float32, place)
    return held


def flags(device: torch.device, count: int) -> Tensor:
    """int32 [>= count], all zero, to be left all zero."""
    place = _place(device)
    if place is None:
        capture = _capture(_here(device)) if device.type == "cuda" and count <= SPARE_FLAGS - ARRIVAL_WORDS else None
        return torch.zeros(count, dtype=torch.int32, device=device) if capture is None else capture.flags
    held = _FLAGS.get(place)
    if held is None or held.numel() < count:
        held = _FLAGS[place] = _lasting(max(count, MIN_FLAGS), torch.int32, place).zero_()
    _lay_by(place)
    return held


def _lay_by(place: Place) -> None:
    """Words for the next captures, which cannot allocate any."""
    if not _SPARES.get(place[0]):
        _SPARES[place[0]] = list(_lasting(SPARES * SPARE_FLAGS, torch.int32, place).zero_().split(SPARE_FLAGS))


def arrivals(device: torch.device) -> Arrivals:
    """For the call that is being launched: outside of a capture, and for a capture's first call, not to go by.

    A replay begins with what the last one left in the word of the first call. Every other call's was cleared by the
    call before it.
    """
    place = _place(device)
    if place is not None:
        if place not in _ARRIVALS:
            _ARRIVALS[place] = _lasting(2, torch.int32, place)
        _lay_by(place)
        return Arrivals(_ARRIVALS[place], 0, early=False)
    capture = _capture(_here(device)) if device.type == "cuda" else None
    if capture is None:
        return Arrivals(torch.empty(2, dtype=torch.int32, device=device), 0, early=False)
    return Arrivals(capture.arrivals, (capture.calls + 1) % 2, early=capture.calls > 0, capture=capture)


def _capture(here: Place) -> _Captured | None:
    """The capture that the current stream is in, or None if no words were laid by for it."""
    number = _capture_number(here[1])
    if number is None:
        return None
    before = _CAPTURES.get(here)
    if before is not None and before.number == number:
        return before
    spares = _SPARES.get(here[0])
    if not spares:
        return None
    flags, words = spares.pop().split((SPARE_FLAGS - ARRIVAL_WORDS, ARRIVAL_WORDS))
    _TAKEN.append(flags)  # a view: all of it stays
    _CAPTURES[here] = captured = _Captured(number, flags, words)
    return captured


def permuted(device: torch.device, rows: int) -> Tensor:
    """bfloat16 [>= rows, 64], contents undefined."""
    place = _place(device) if rows <= PERMUTED_ROWS else None
    if place is None:
        return torch.empty(rows, 64, dtype=torch.bfloat16, device=device)
    held = _PERMUTED.get(place)
    if held is None:
        held = _PERMUTED[place] = _lasting(PERMUTED_ROWS * 64, torch.bfloat16, place).view(PERMUTED_ROWS, 64)
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
        scratch = _DENSE[place] = _lasting(n * k, torch.bfloat16, place)
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
    for held in (_PARTIAL, _FLAGS, _ARRIVALS, _PERMUTED, _DENSE, _HELD):
        held.clear()
