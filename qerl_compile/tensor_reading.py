"""Read a checkpoint's tensors in order, as fast as the disk gives them, in bounded memory.

Two ways, because a tensor ends up in two kinds of places:

    CPU     safetensors maps the file, and a tensor is a view of the mapping. Nothing is copied: what stays dense stays
            on the file's own pages, which the kernel may drop and read again
    CUDA    threads read the next blocks of the file into a ring of page-locked memory while the GPU works on the
            tensors before; a tensor is allocated on the GPU and its bytes are copied there as the blocks come

On CUDA the mapping is the slow way. The driver copies from ordinary memory through a buffer of its own, in the thread
that asks, so each page fault, each copy and each kernel launch waits for the one before. From page-locked memory the
copy is asynchronous, and the disk has `READERS` requests at a time.

Memory of the CUDA way: a ring of 256 MiB, whatever the shards' size. A block is filled again only after the copies out
of it are done, which a CUDA event says. torch keeps page-locked memory for later copies (to give it back:
`torch.accelerator.memory.empty_host_cache`).

The bytes are trusted no more than before: offsets come from headers that were judged (safetensors_header.py), and a
file that has become shorter since is refused. Readers end with the generator: close it (`contextlib.closing`) rather
than leave it to the garbage collector, because a traceback keeps frames alive.

What this module does not do: look at values (checkpoint_tensors.py), read faster than one process can (no O_DIRECT, no
GPUDirect Storage), or read pickles.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qerl_compile.safetensors_header import TensorEntry
from qerl_compile.wording import refuse_checkpoint

BLOCK_BYTES = 16 << 20  # long enough that a disk reads it at full speed, short beside a weight
BLOCKS = 16
READERS = 4  # requests that are under way at once; one thread copies out of the page cache with 8 GB/s

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""By the names of safetensors; the keys are those of `safetensors_header.ELEMENT_BYTES`."""

Tensors = Generator[tuple[str, Tensor], None, None]


def read_tensors(entries: Mapping[str, TensorEntry], device: torch.device) -> Tensors:
    """Yield tensors in the order of `entries`; the generator keeps none once the next is asked for.

    Args:
        entries: name → where its bytes lie, of judged files. File order is fastest: each file is then opened once.
        device: where the tensors go.

    Returns:
        A generator of (name, tensor of the file's dtype and shape). Close it to stop reading.

    Raises:
        CheckpointError: while it runs, if a file cannot be read any more.
    """
    return read_ahead(entries, device) if device.type == "cuda" else _mapped(entries, device)


def _mapped(entries: Mapping[str, TensorEntry], device: torch.device) -> Tensors:
    from safetensors import safe_open

    for file, names in _by_file(entries):
        with safe_open(file, framework="pt", device=str(device)) as reader:
            for name in names:
                yield name, reader.get_tensor(name)


def _by_file(entries: Mapping[str, TensorEntry]) -> list[tuple[Path, list[str]]]:
    """Neighbours of one file together."""
    runs: list[tuple[Path, list[str]]] = []
    for name, entry in entries.items():
        if not runs or runs[-1][0] != entry.file:
            runs.append((entry.file, []))
        runs[-1][1].append(name)
    return runs


def read_ahead(
    entries: Mapping[str, TensorEntry], device: torch.device, *, block_bytes: int = BLOCK_BYTES, blocks: int = BLOCKS
) -> Tensors:
    """`read_tensors` by threads that run ahead; on any device.

    Args:
        entries: as there.
        device: as there. Copies to a GPU are enqueued on its current stream.
        block_bytes: size of one read.
        blocks: how many are read ahead at most.
    """
    with closing(_filled(_spans(entries.values(), block_bytes), device, blocks)) as stream:
        left = torch.empty(0, dtype=torch.uint8)
        for name, entry in entries.items():
            tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=device)
            into = tensor.reshape(-1).view(torch.uint8)
            while len(into):
                if not len(left):
                    left = next(stream)
                count = min(len(left), len(into))
                into[:count].copy_(left[:count], non_blocking=True)
                left, into = left[count:], into[count:]
            yield name, tensor
            del tensor, into


@dataclass(frozen=True)
class _Span:
    """Bytes [begin, end) of a file, which one read brings. `last`: the file is not needed after it."""

    file: Path
    begin: int
    end: int
    last: bool


def _spans(entries: Iterable[TensorEntry], block_bytes: int) -> list[_Span]:
    """Cut the bytes of the entries, in their order, into reads; neighbours in a file share them."""
    runs: list[tuple[Path, int, int]] = []
    for entry in entries:
        if runs and runs[-1][0] == entry.file and runs[-1][2] == entry.begin:
            runs[-1] = (entry.file, runs[-1][1], entry.end)
        elif entry.size_bytes:
            runs.append((entry.file, entry.begin, entry.end))
    cuts = [
        (file, at, min(at + block_bytes, end)) for file, begin, end in runs for at in range(begin, end, block_bytes)
    ]
    files = [file for file, _, _ in cuts] + [None]
    return [_Span(*cut, last=files[index + 1] != cut[0]) for index, cut in enumerate(cuts)]


def _filled(spans: list[_Span], device: torch.device, blocks: int) -> Generator[Tensor, None, None]:
    """Yield the bytes of each span, in host memory that is overwritten some time after the next one is asked for."""
    on_gpu = device.type == "cuda"
    count = min(blocks, len(spans))
    size = max((span.end - span.begin for span in spans), default=0)
    ring = torch.empty(count, size, dtype=torch.uint8, pin_memory=on_gpu).unbind()
    under_way: deque[_Read] = deque()
    coming = iter(spans)
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="qerl-read")
    try:
        ahead = _Ahead(pool, coming)
        for block in ring:
            under_way.extend(ahead.submit(block, None))
        while under_way:
            read = under_way[0]
            yield read.bytes.result()
            under_way.popleft()
            if read.span.last:
                read.stream.close()
            copied = torch.cuda.Event() if on_gpu else None
            if copied is not None:
                copied.record(torch.cuda.current_stream(device))
            under_way.extend(ahead.submit(read.block, copied))
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the reads that have begun: they write into the ring
        for read in under_way:
            read.stream.close()


@dataclass(frozen=True)
class _Read:
    span: _Span
    stream: BinaryIO
    block: Tensor
    bytes: Future[Tensor]


class _Ahead:
    """Hands out reads in order; a file is opened when its first is due."""

    def __init__(self, pool: ThreadPoolExecutor, spans: Iterator[_Span]) -> None:
        self._pool, self._spans = pool, spans
        self._stream: BinaryIO | None = None

    def submit(self, block: Tensor, copied: torch.cuda.Event | None) -> list[_Read]:
        """The next read, into `block` once `copied` has passed; none if all are handed out."""
        span = next(self._spans, None)
        if span is None:
            return []
        if self._stream is None:
            self._stream = _opened(span.file)
        stream = self._stream
        if span.last:
            self._stream = None
        return [_Read(span, stream, block, self._pool.submit(_fill, stream, span, block, copied))]


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as fault:
        got = fault.strerror or str(fault)
        refuse_checkpoint(str(file), "a readable file", got, do="Leave the files alone while they are loaded.")


def _fill(stream: BinaryIO, span: _Span, block: Tensor, copied: torch.cuda.Event | None) -> Tensor:
    """Read a span into a block once the copies out of it are done. Runs in a thread."""
    if copied is not None:
        copied.synchronize()
    filled = block[: span.end - span.begin]
    room: Any = filled.numpy()
    at = 0
    while at < len(room):
        try:
            got = os.preadv(stream.fileno(), [room[at:]], span.begin + at)
        except OSError as fault:
            refuse_checkpoint(
                f"{span.file}: byte {span.begin + at}",
                "bytes that can be read",
                fault.strerror or str(fault),
                do="Check the disk, and fetch the file again.",
            )
        if not got:
            refuse_checkpoint(
                str(span.file),
                f"a file of at least {span.end} bytes, as its header said",
                f"the end of the file at byte {span.begin + at}",
                do="Leave the files alone while they are loaded, or fetch the truncated file again.",
            )
        at += got
    return filled
