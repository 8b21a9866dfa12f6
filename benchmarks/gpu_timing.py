"""Timing on a GPU so that ratios hold: every competitor of a cell in turn, round after round.

Under its power limit a GPU's clock drifts by 5 to 10 % within minutes. Competitors that are timed one after the other
see different clocks, and their ratio is off by as much. Here a *round* times each competitor once, in an order that
changes from round to round, and the median is taken over rounds: a slow minute hurts all alike.

A sample is: overwrite L2, event, the work, event. The overwriting makes every sample begin with cold caches and keeps
the GPU busy while the host enqueues the work, so that launching is hidden as far as it takes less than the overwriting
(65 µs on an H200, 90 on an H100). Two kinds of work are timed:

    replay   a captured CUDA graph that makes the call several times, over copies of the weight that together exceed
             L2, without gaps; rounds are enqueued without waiting
    plain    one call from Python; the host waits for an idle GPU before each sample, so that none runs ahead of
             another. A call whose host time exceeds the overwriting shows it here.

`host_us` tells the host's time apart: the wall time of calls that nobody waits for.

The GPU is behind `Clock`, so that tests can put a simulated one in its place.
"""

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Work = Callable[[], object]
Times = list[float]  # median, least and most over rounds, µs per call

L2_BYTES = 256 << 20  # four times an H200's L2, as triton.testing.do_bench overwrites
COLD_BYTES = 1.2e8  # what the packed copies of a weight add up to at least: twice the largest L2 (60 MB)
HOST_CALLS = 60
SMI_FIELDS = (
    *("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit"),
    "temperature.gpu",
)


class Clock(Protocol):
    """What timing needs of a device."""

    def flush(self) -> None:
        """Enqueue overwriting L2."""

    def now(self) -> Any:
        """Enqueue a time stamp."""

    def wait(self) -> None:
        """Until everything enqueued is done."""

    def us_between(self, begin: Any, end: Any) -> float:
        """Microseconds between two time stamps that have passed."""
        ...


class GpuClock:
    """CUDA events on the current stream."""

    def __init__(self) -> None:
        self._overwritten = torch.empty(L2_BYTES // 4, dtype=torch.int32, device="cuda")

    def flush(self) -> None:
        """Enqueue overwriting L2."""
        self._overwritten.zero_()

    def now(self) -> torch.cuda.Event:
        """Enqueue an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Synchronize."""
        torch.cuda.synchronize()

    def us_between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Of two recorded events."""
        return begin.elapsed_time(end) * 1e3


def order(names: Sequence[str], turn: int) -> list[str]:
    """The competitors of one round: rotated, and every other round backwards, so that neighbours change too."""
    shift = turn % len(names) if names else 0
    rotated = [*names[shift:], *names[:shift]]
    return rotated if turn % 2 == 0 else rotated[::-1]


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    clock: Clock,
    *,
    calls: Mapping[str, int] | None = None,
    fewer: Mapping[str, int] | None = None,
    before: Mapping[str, Work] | None = None,
    drain: bool = False,
) -> dict[str, Times]:
    """Time all works in turn.

    Args:
        works: by competitor.
        rounds: samples of each.
        clock: of the device.
        calls: calls that one sample of a work makes, 1 where absent.
        fewer: competitors that take part in this many rounds only.
        before: what precedes each sample of a competitor, not timed.
        drain: wait for an idle GPU before each sample.

    Returns:
        Microseconds per call: median, least, most.
    """
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in order(list(works), turn):
            if turn >= (fewer or {}).get(name, rounds):
                continue
            if before and name in before:
                before[name]()
            if drain:
                clock.wait()
            clock.flush()
            begin = clock.now()
            works[name]()
            spans[name].append((begin, clock.now()))
        clock.wait()
    return {
        name: summary([clock.us_between(begin, end) / (calls or {}).get(name, 1) for begin, end in spans[name]])
        for name in works
    }


def summary(samples: Sequence[float]) -> Times:
    """[median, least, most], in nanosecond steps: the JSON is read by people too."""
    return [round(value, 3) for value in (statistics.median(samples), min(samples), max(samples))]


def copies_for(n: int, k: int, most: int = 128) -> int:
    """Copies of a packed [n, k] weight that together do not fit in L2; 0.5625 bytes per weight."""
    return max(2, min(most, math.ceil(COLD_BYTES / (n * k * 0.5625))))


def repeated(calls: Sequence[Work], least: int) -> list[Work]:
    """The calls over and over, whole turns, at least `least`: the start of a graph weighs less on each."""
    return list(calls) * max(1, math.ceil(least / len(calls)))


class Capture:
    """Makes graphs that share one memory pool and one stream.

    The graphs of one Capture may only be replayed one after the other, on one stream, and their results are never read:
    they share the memory of temporaries and outputs.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []  # failed ones too: a pool without a graph cannot be used again

    def __call__(self, calls: Sequence[Work]) -> torch.cuda.CUDAGraph:
        """A graph that makes the calls in order; one was made before, so that nothing is compiled meanwhile.

        Not by `torch.cuda.graph`, which empties the allocator's cache each time: a tuning captures thousands.
        """
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        with torch.cuda.stream(stream):
            calls[0]()
            graph.capture_begin(pool=self._pool)
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


_STREAMS: list[torch.cuda.Stream] = []


def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: workspaces are kept per stream."""
    if not _STREAMS:
        _STREAMS.append(torch.cuda.Stream())
    return _STREAMS[0]


def host_us(call: Work) -> float:
    """Microseconds of host time per call, while the GPU lags behind."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    passed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return round(passed / HOST_CALLS * 1e6, 1)


def ceilings(clock: Clock) -> dict[str, float]:
    """What this card reaches today: TB/s of a copy (read plus written), TFLOP/s of bfloat16 at 8192 cubed."""
    source = torch.randn(1 << 28, device="cuda").bfloat16()
    target = torch.empty_like(source)
    a, b = (source[: 1 << 26].view(8192, 8192), source[1 << 26 : 1 << 27].view(8192, 8192))
    works = {"copy": lambda: [target.copy_(source) for _ in range(4)], "mm": lambda: [a @ b for _ in range(4)]}
    for work in works.values():
        work()
    times = interleaved(works, 7, clock, calls={"copy": 4, "mm": 4})
    return {
        "copy_tb_per_s": round(2 * source.nbytes / times["copy"][0] / 1e6, 3),
        "bf16_tflop_per_s": round(2 * 8192**3 / times["mm"][0] / 1e6, 1),
    }


def smi() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them now; empty where it cannot."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI_FIELDS, [field.strip() for field in answer.splitlines()[0].split(",")], strict=False))
