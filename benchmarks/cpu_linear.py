"""How fast the CPU form of `qerl::quantized_linear` is, beside the bf16 linear that it replaces.

    python benchmarks/cpu_linear.py                 every cell, about ten minutes, writes results/cpu_linear.{json,md}
    python benchmarks/cpu_linear.py --quick         two shapes, few repeats, writes nothing

How it is measured. All competitors of a cell are called in turn, round after round, so that a slow minute hurts all of
them alike; then the median, the quartiles and the smallest are kept. One thread is timed in CPU time, which leaves out
what other users of the machine take. Two threads can only be timed by the clock; where the machine is busy, their
smallest times mean more than their medians, because a barrier waits for the slower core.

Each sample follows an untimed call of the same competitor, so its weight is as near as its size allows. `decode step`
has no such call and walks through 30 layers of distinct weights, as a model does: there every weight comes from
memory.

Competitors
    dense      F.linear on a dense weight of the activation's dtype: the linear that we replace
    ours       torch.ops.qerl.quantized_linear(_dx): the C++ kernel
    torch      the same without a compiler (QERL_CPU_KERNEL=torch)
    cached     ours inside weight_cache.enabled()
    naive      int64 table lookup of every code, scaled, multiplied: what a first draft looks like
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qerl_compile.formats import e2m1, nvfp4
from qerl_compile.kernels import cpu_native, ops, weight_cache

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "q, o": (576, 576),
    "k, v": (192, 576),
    "qkv": (960, 576),
    "gate, up": (1536, 576),
    "gate/up": (3072, 576),
    "down": (576, 1536),
}
BATCHES = (1, 16, 256, 2944)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALUES = torch.tensor(e2m1.VALUES)


@dataclass(frozen=True)
class Row:
    """One competitor in one cell; times in microseconds per call."""

    layer: str
    n: int
    k: int
    m: int
    direction: str
    dtype: str
    threads: int
    competitor: str
    median_us: float
    quartiles_us: tuple[float, float]
    smallest_us: float
    rounds: int


def interleaved(
    calls: dict[str, Callable[[], object]], seconds: float, threads: int, warm: bool
) -> dict[str, list[float]]:
    """Seconds per call, by competitor, one sample per round; short calls are repeated within a sample."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, call in calls.items():
        call()
        start = clock()
        call()
        repeats[name] = max(1, min(20, int(2e-4 / (clock() - start + 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(samples["dense"]) < 7:
        for name, call in calls.items():
            if warm:
                call()
            start = clock()
            for _ in range(repeats[name]):
                call()
            samples[name].append((clock() - start) / repeats[name])
    return samples


def without_compiler(call: Callable[[], object]) -> Callable[[], object]:
    """The same call with the C++ kernel hidden."""
    load = cpu_native.load

    def hidden() -> object:
        cpu_native.load = lambda: None
        try:
            return call()
        finally:
            cpu_native.load = load

    return hidden


def with_cache(call: Callable[[], object], cache: weight_cache.WeightCache) -> Callable[[], object]:
    """The same call with `cache` in force, so that it stays filled from round to round."""

    def cached() -> object:
        weight_cache._active = cache
        try:
            return call()
        finally:
            weight_cache._active = None

    return cached


def naive_weight(packed: nvfp4.PackedNVFP4, dtype: torch.dtype) -> Tensor:
    """Dequantize with an int64 index per code."""
    codes = torch.stack([packed.codes_NK2 & 15, packed.codes_NK2 >> 4], dim=-1).flatten(1).long()
    blocks = packed.block_decode_scale_NG.float().repeat_interleave(nvfp4.BLOCK, dim=1)
    return (VALUES[codes] * blocks * packed.decode_scale).to(dtype)


def competitors(n: int, k: int, m: int, direction: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The calls of one cell on fresh random data."""
    packed = nvfp4.quantize(torch.randn(n, k, dtype=torch.bfloat16) / k**0.5)
    weight = nvfp4.dequantize(packed, dtype)
    x = torch.randn(m, k if direction == "forward" else n, dtype=dtype)
    args = (x, packed.codes_NK2, packed.block_decode_scale_NG, packed.decode_scale)
    if direction == "forward":
        return {
            "dense": lambda: F.linear(x, weight),
            "ours": lambda: ops.quantized_linear(*args),
            "torch": without_compiler(lambda: ops.quantized_linear(*args)),
            "cached": with_cache(lambda: ops.quantized_linear(*args), weight_cache.WeightCache()),
            "naive": lambda: F.linear(x, naive_weight(packed, dtype)),
        }
    return {
        "dense": lambda: x @ weight,
        "ours": lambda: ops.quantized_linear_dx(*args),
        "torch": without_compiler(lambda: ops.quantized_linear_dx(*args)),
        "cached": with_cache(lambda: ops.quantized_linear_dx(*args), weight_cache.WeightCache()),
        "naive": lambda: x @ naive_weight(packed, dtype),
    }


def decode_step(m: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """All linears of SmolLM2-135M (30 layers, q/k/v and gate/up fused), each layer with weights of its own."""
    layers = []
    for _ in range(30):
        for n, k in (SHAPES["qkv"], SHAPES["q, o"], SHAPES["gate/up"], SHAPES["down"]):
            packed = nvfp4.quantize(torch.randn(n, k, dtype=torch.bfloat16) / k**0.5)
            layers.append(
                (torch.randn(m, k, dtype=dtype), packed, nvfp4.dequantize(packed, dtype), packed.decode_scale)
            )

    def ours() -> None:
        for x, packed, _, decode_scale in layers:
            ops.quantized_linear(x, packed.codes_NK2, packed.block_decode_scale_NG, decode_scale)

    def dense() -> None:
        for x, _, weight, _ in layers:
            F.linear(x, weight)

    return {
        "dense": dense,
        "ours": ours,
        "torch": without_compiler(ours),
        "cached": with_cache(ours, weight_cache.WeightCache()),
    }


def measure(quick: bool) -> list[Row]:
    """Every cell, as rows."""
    rows: list[Row] = []
    shapes = {name: SHAPES[name] for name in ("q, o", "gate, up")} if quick else SHAPES
    seconds = 0.05 if quick else 0.25

    def record(cell: tuple[str, int, int, int, str, str, int], calls: dict[str, Callable[[], object]]) -> None:
        with torch.no_grad():
            samples = interleaved(calls, seconds, cell[-1], warm=cell[0] != "decode step")
        for name, times in samples.items():
            low, median, high = (1e6 * t for t in statistics.quantiles(times, n=4))
            rows.append(Row(*cell, name, median, (low, high), 1e6 * min(times), len(times)))
        medians = {row.competitor: round(row.median_us) for row in rows[-len(samples) :]}
        print(*cell, medians, flush=True)

    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype_name, dtype in DTYPES.items():
            for m in (1, 8, 16, 64):
                record(("decode step", 0, 0, m, "forward", dtype_name, threads), decode_step(m, dtype))
            for direction in ("forward", "dx"):
                for layer, (n, k) in shapes.items():
                    for m in BATCHES:
                        cell = (layer, n, k, m, direction, dtype_name, threads)
                        record(cell, competitors(n, k, m, direction, dtype))
    return rows


def hardware() -> str:
    """CPU model, cores and the vector extensions that matter here."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in cpuinfo]
    return f"{model or platform.processor()}, {os.cpu_count()} cores, {' '.join(flags)}"


def table(rows: list[Row], head: str) -> str:
    """Markdown: one table per dtype and thread count; times with quartiles, ratios of medians and of smallest times."""
    lines = [head]
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row.dtype, row.threads, row.direction, row.layer, row.n, row.k, row.m), {})[
            row.competitor
        ] = row
    previous = None
    for (dtype, threads, direction, layer, n, k, m), cell in cells.items():
        if (dtype, threads) != previous:
            previous = (dtype, threads)
            lines += [
                "",
                f"## {dtype} activations, {threads} thread{'s' if threads > 1 else ''}",
                "",
                "| | layer | N×K | M | dense | ours | torch | cached | naive | /ours | /torch | /cached | smallest |",
                "|---" * 13 + "|",
            ]
        times = [_time(cell[name]) if name in cell else "" for name in ("dense", "ours", "torch", "cached", "naive")]
        ratios = [f"{cell['dense'].median_us / cell[name].median_us:.2f}" for name in ("ours", "torch", "cached")]
        ratios.append(f"{cell['dense'].smallest_us / cell['ours'].smallest_us:.2f}")
        shape = f"{n}×{k}" if n else "all 120"
        lines.append("| " + " | ".join([direction, layer, shape, str(m), *times, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def _time(row: Row) -> str:
    low, high = row.quartiles_us
    return f"{row.median_us:.0f} ({low:.0f}–{high:.0f})"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, few repeats, no files written")
    parser.add_argument("--name", default="cpu_linear", help="base name of the two files under results/")
    options = parser.parse_args()
    git = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    facts = {
        "commit": subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "hardware": hardware(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }
    rows = measure(options.quick)
    facts["load_after"] = os.getloadavg()[0]
    head = (
        "# CPU linears: ours beside dense ones\n\n"
        "Microseconds per call, median (quartiles): CPU time with one thread, clock with two. The last columns are\n"
        "dense/ours, dense/torch, dense/cached (above 1: we are faster) and dense/ours by the smallest times.\n"
        "benchmarks/cpu_linear.py says what is measured.\n\n"
        + "; ".join(f"{name} {value}" for name, value in facts.items())
    )
    if options.quick:
        print(table(rows, head))
        return
    RESULTS.mkdir(exist_ok=True)
    document = {"facts": facts, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{options.name}.md").write_text(table(rows, head))
    print(f"wrote {RESULTS / options.name}.json and .md")


if __name__ == "__main__":
    main()
