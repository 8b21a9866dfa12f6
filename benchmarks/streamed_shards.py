"""Streaming a checkpoint that is larger than the disk: GB/s, anonymous host memory, GPU memory after.

    python benchmarks/streamed_shards.py --size 32B --json OUT            [--packed] [--cached] [--layers N] [--dir DIR]
    python benchmarks/streamed_shards.py --size tiny --device cpu

A directory like a Hub's (config, index, shards of about 4 GB) with random bf16 weights of a Qwen2.5 shape, of which
only headers are whole. `load` judges all headers before it reads a tensor, and a header says nothing about whether the
data are there, so shards begin as holes. A second process fills the next shards with random numbers while one is read,
and empties it afterwards: two full shards exist at most, 8 GB for 61 GiB of model.

The gate is around `loading.read_tensors`, the one function through which `load` gets its bytes: it is called shard by
shard, after the producer has said that the shard is full. `load` itself is the product's. What this costs: nothing is
read ahead across a shard's end. What waiting for the producer costs is taken out of GB/s (`waited_s`).

    seconds        all of `load`, with waiting
    stream_s       from the first tensor asked for to the last one placed, with waiting
    gb_per_s       checkpoint bytes / (stream_s - waited_s)

Reads are cold: the producer waits until the disk has a shard, then drops it from the page cache (`--cached` leaves it
there, which shows what is possible beyond the disk). `disk` says what plain reads of a cold shard give, in one thread
and in four, in the same minute. RssAnon is sampled every 20 ms.

`--mapped` reads as `load` does for a CPU, and did for a GPU before tensor_reading.py: safetensors' mapping, tensor by
tensor. `--packed` also exports the model as `transform -o` does, drops it from the page cache, and loads it again.

After each load every packed weight is looked at: a shard that was read before it was full would be zeros.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

RANDOM_BYTES = 256 << 20  # of bf16 numbers, written over and over, beginning elsewhere each time
STEP = 77_777_778  # even, and no divisor of it
FULL_SHARDS = 2
SHARD_BYTES = 4_000_000_000  # Qwen2.5-32B's are 3.9 GB
PROBE_BYTES = 2 << 30
STANDARD_DEVIATION = 0.02


def write_holes(size: str, layers: int | None, root: Path, shard_bytes: int) -> list[Path]:
    """Write config, index and shards with headers and no data.

    Args:
        size: a key of `random_models.SHAPES`.
        layers: fewer layers than the shape has.
        root: an empty directory.
        shard_bytes: of data, at most, or one tensor.

    Returns:
        The shards, in the order of their names.
    """
    from benchmarks.random_models import empty_model

    model = empty_model(size, layers)
    model.config.save_pretrained(root)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, tensor in model.state_dict().items():
        if shards[-1] and tensor.numel() * 2 > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tuple(tensor.shape)
        room -= tensor.numel() * 2
    files = [root / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shapes in zip(files, shards, strict=True):
        _write_hole(file, dict(sorted(shapes.items())))
    weight_map = {name: file.name for file, shapes in zip(files, shards, strict=True) for name in shapes}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def _write_hole(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def data_begin(file: Path) -> int:
    """First byte after the header."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def random_bf16(count_bytes: int) -> np.ndarray:
    """Normal numbers in bf16, as uint8 [count_bytes]."""
    generator, parts = np.random.default_rng(0), []
    for begin in range(0, count_bytes // 2, 1 << 24):
        numbers = generator.standard_normal(min(1 << 24, count_bytes // 2 - begin), dtype=np.float32)
        parts.append(((numbers * STANDARD_DEVIATION).view(np.uint32) >> 16).astype(np.uint16))
    return np.concatenate(parts).view(np.uint8)


def produce(pipe: Connection, files: list[Path], random_bytes: int, *, cached: bool, emptied: bool) -> None:
    """Fill shards in order, at most `FULL_SHARDS` ahead of what was consumed. Runs in a process of its own.

    Sends the seconds that each took; receives one message for each that was read.
    """
    numbers = random_bf16(random_bytes)
    for index, file in enumerate(files):
        if index >= FULL_SHARDS:
            _consumed(pipe, files[index - FULL_SHARDS], emptied)
        begin = time.perf_counter()
        fill(file, numbers, first=index * STEP, cached=cached)
        pipe.send(time.perf_counter() - begin)
    for file in files[-FULL_SHARDS:]:
        _consumed(pipe, file, emptied)


def _consumed(pipe: Connection, file: Path, emptied: bool) -> None:
    pipe.recv()
    if emptied:
        os.truncate(file, data_begin(file))


def fill(file: Path, numbers: np.ndarray, *, first: int, cached: bool) -> None:
    """Write random numbers over a shard's data.

    Args:
        file: a shard with its header.
        numbers: uint8, bf16 numbers.
        first: where in them to begin, an even number of bytes.
        cached: leave the data in the page cache, and do not wait for the disk.
    """
    descriptor = os.open(file, os.O_RDWR)
    try:
        at, end = data_begin(file), os.fstat(descriptor).st_size
        source = first % len(numbers)
        while at < end:
            piece: Any = numbers[source : source + min(end - at, 64 << 20)]
            at += os.pwrite(descriptor, piece, at)
            source = (source + STEP) % len(numbers)
        if not cached:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class Producer:
    """The process that fills shards, and the gate that holds the reader until it has."""

    def __init__(self, files: list[Path], *, random_bytes: int, cached: bool, emptied: bool) -> None:
        self.files, self.waited_s, self.stream_s, self.fill_s = files, 0.0, 0.0, []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        options = {"cached": cached, "emptied": emptied}
        self._process = context.Process(target=produce, args=(theirs, files, random_bytes), kwargs=options, daemon=True)
        self._process.start()
        theirs.close()

    def wait_for(self, count: int) -> None:
        """Until this many shards have been filled."""
        while len(self.fill_s) < count:
            with self._alive():
                self.fill_s.append(self._pipe.recv())

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as fault:  # it has said why on stderr
            raise RuntimeError(f"the process that fills shards died after {len(self.fill_s)}") from fault

    def gated(self, read: Callable[..., Any]) -> Callable[..., Any]:
        """`read_tensors`, shard by shard."""

        def read_tensors(entries: Mapping[str, Any], device: Any) -> Iterator[tuple[str, Any]]:
            first = time.perf_counter()
            for index, file in enumerate(self.files):
                begin = time.perf_counter()
                self.wait_for(index + 1)
                self.waited_s += time.perf_counter() - begin
                with closing(read({name: e for name, e in entries.items() if e.file == file}, device)) as tensors:
                    yield from tensors
                with self._alive():
                    self._pipe.send(index)
            self.stream_s = time.perf_counter() - first

        return read_tensors

    def end(self) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()


def plain_read_gb_per_s(file: Path, threads: int) -> float:
    """What reading the first part of a cold file gives, thread by thread in turn, 16 MiB each."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    total, block = min(PROBE_BYTES, os.fstat(descriptor).st_size), 16 << 20
    rooms = [bytearray(block) for _ in range(threads)]

    def read(first: int) -> None:
        for at in range(first * block, total, threads * block):
            os.preadv(descriptor, [rooms[first]], at)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    seconds = time.perf_counter() - begin
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return round(total / seconds / 1e9, 3)


def rss_anon_gb() -> float:
    """This process's anonymous memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


@contextmanager
def rss_anon_peak(row: dict[str, Any]) -> Iterator[None]:
    """Put RssAnon before, its peak and after, in GB, into `row`."""
    peak, ended = rss_anon_gb(), threading.Event()
    row["rss_anon_before_gb"] = round(peak, 3)

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, rss_anon_gb())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()
        row["rss_anon_peak_gb"], row["rss_anon_after_gb"] = round(peak, 3), round(rss_anon_gb(), 3)


def gpu_memory() -> dict[str, float]:
    """GB on the GPU: of live tensors, held by the allocator, in holes, in use on the device, and the peaks."""
    import torch

    free, total = torch.cuda.mem_get_info()
    holes = torch.cuda.memory_stats()["inactive_split_bytes.all.current"]
    numbers = {
        "gpu_allocated_gb": torch.cuda.memory_allocated(),
        "gpu_reserved_gb": torch.cuda.memory_reserved(),
        "gpu_inactive_split_gb": holes,
        "gpu_in_use_gb": total - free,
        "gpu_allocated_peak_gb": torch.cuda.max_memory_allocated(),
        "gpu_reserved_peak_gb": torch.cuda.max_memory_reserved(),
    }
    return {key: round(value / 1e9, 3) for key, value in numbers.items()}


def sums(model: Any) -> dict[str, int]:
    """A number per packed weight that says whether it is the same again.

    Raises:
        RuntimeError: one is mostly zeros.
    """
    import torch

    found = {}
    for path in model.qerl.plan.quantize:
        codes = model.get_submodule(path).weight_packed
        # of normal numbers 7 % round to zero, half of them to code 8 (-0), so one byte in 1000 is zero
        if (codes == 0).count_nonzero().item() > codes.numel() // 10:
            raise RuntimeError(f"{path} holds zeros: it was read before its shard was full")
        found[path] = codes.sum(dtype=torch.int64).item()
    return found


def timed_load(directory: Path, recipe: Any, device: str, size_bytes: int) -> tuple[Any, dict[str, Any]]:
    """Load, and say how long it took and how much memory."""
    import torch

    from qerl_compile.loading import load

    on_gpu = device != "cpu"
    if on_gpu:
        torch.zeros(1, device=device)  # the context is not the load's
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"checkpoint_gb": round(size_bytes / 1e9, 3)}
    with rss_anon_peak(row):
        begin = time.perf_counter()
        model = load(directory, recipe, device=device, inner="eager")
        if on_gpu:
            torch.cuda.synchronize()
        row["seconds"] = round(time.perf_counter() - begin, 2)
    return model, row | held_gb(model) | (gpu_memory() if on_gpu else {})


def held_gb(model: Any) -> dict[str, float]:
    """GB of the model's own tensors, by kind."""
    kinds = {"packed_gb": 0, "adapters_gb": 0, "dense_gb": 0}
    for name, tensor in model.state_dict().items():
        leaf = name.rpartition(".")[2]
        kind = "packed" if leaf in ("weight_packed", "weight_scale") else "adapters" if "lora_" in leaf else "dense"
        kinds[f"{kind}_gb"] += tensor.nbytes
    return {kind: round(value / 1e9, 3) for kind, value in kinds.items()}


def stream(options: argparse.Namespace, root: Path) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint that is never whole."""
    from qerl_compile import loading, tensor_reading

    source = root / "bf16"
    source.mkdir()
    shard_bytes = 100_000 if options.size == "tiny" else SHARD_BYTES
    files = write_holes(options.size, options.layers, source, shard_bytes)
    sizes = [file.stat().st_size for file in files]
    # on a CPU dense tensors are views of the file, which must outlive the load
    random_bytes = min(RANDOM_BYTES, max(sizes) // 2 * 2)
    producer = Producer(files, random_bytes=random_bytes, cached=options.cached, emptied=options.device != "cpu")
    original = loading.read_tensors
    try:
        producer.wait_for(min(FULL_SHARDS, len(files)))  # it writes no more until a shard has been read
        disk = {f"read_{n}_gb_per_s": plain_read_gb_per_s(files[0], n) for n in (1, 4)} if not options.cached else {}
        loading.read_tensors = producer.gated(tensor_reading._mapped if options.mapped else original)
        model, row = timed_load(source, options.recipe, options.device, sum(sizes))
    finally:
        loading.read_tensors = original
        producer.end()
    row |= {
        "shards": len(files),
        "largest_shard_gb": round(max(sizes) / 1e9, 3),
        "stream_s": round(producer.stream_s, 2),
        "waited_s": round(producer.waited_s, 2),
        "gb_per_s": round(sum(sizes) / (producer.stream_s - producer.waited_s) / 1e9, 3),
        "disk": disk | {"write_gb_per_s": round(sum(sizes) / sum(producer.fill_s) / 1e9, 3)},
    }
    shutil.rmtree(source)  # a mapping outlives the name
    return model, row


def write_packed(model: Any, out: Path) -> dict[str, Any]:
    """Export the model as `transform -o` does, and drop the files from the page cache."""
    from qerl_compile.exporters import export

    row: dict[str, Any] = {}
    with rss_anon_peak(row):
        begin = time.perf_counter()
        export(model, out, target="vllm")
        row["seconds"] = round(time.perf_counter() - begin, 2)
    for file in out.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the export has waited for the disk
        os.close(descriptor)
    return row


def load_packed(out: Path, options: argparse.Namespace, expected: dict[str, int]) -> dict[str, Any]:
    """Load the export.

    Raises:
        RuntimeError: its codes are not those that were exported.
    """
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    model, row = timed_load(out, options.recipe, options.device, sum(sizes))
    if sums(model) != expected:
        raise RuntimeError("the packed directory holds other codes than the model that was exported")
    return row | {"shards": len(sizes), "gb_per_s": round(sum(sizes) / row["seconds"] / 1e9, 3)}


def main() -> None:
    """Measure, print and append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=["tiny", "0.5B", "7B", "14B", "32B"])
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--recipe", default="qerl-nvfp4-aqn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dir", type=Path, help="where the shards go; a new directory under it is used and removed")
    parser.add_argument("--cached", action="store_true", help="read from the page cache")
    parser.add_argument("--mapped", action="store_true", help="read through safetensors' mapping, for comparison")
    parser.add_argument("--packed", action="store_true", help="export and load again")
    parser.add_argument("--json", type=Path, help="one row is appended")
    options = parser.parse_args()
    import torch

    if options.dir:
        options.dir.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="streamed-", dir=options.dir))
    try:
        model, streamed = stream(options, root)
        expected = sums(model)
        row = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": options.size,
            "layers": options.layers,
            "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
            "torch": torch.__version__,
            "cached": options.cached,
            "mapped": options.mapped,
            "streamed": streamed,
        }
        print(json.dumps(row), flush=True)
        if options.packed:
            row["packed"] = {"export": write_packed(model, root / "packed")}
            del model
            gc.collect()  # modules and hooks hold each other
            torch.cuda.empty_cache()  # does nothing without CUDA
            row["packed"]["load"] = load_packed(root / "packed", options, expected)
            print(json.dumps(row["packed"]), flush=True)
    finally:
        shutil.rmtree(root)
    if options.json:
        with options.json.open("a") as stream_out:
            stream_out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
