"""Reward functions that do their worst, one after the other, and what comes of each.

    python benchmarks/hostile_rewards.py [--timeout 2]      prints the table, writes results/hostile_rewards.md

Every function of tests/rl/rewards/hostile.py scores a batch of 8 completions in a process of its own, once all good and
once with one completion to which it does its worst. The script fails if an outcome is not the expected one, if another
completion lost its score (unless the function breaks the interface), if the next call fails, or if a process is left.
Processes are found by a mark in their environment, which all descendants inherit.
"""

# ruff: noqa: E402  # a script: it finds its neighbours before it imports them
import argparse
import os
import platform
import statistics
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from qerl_compile.rl.rewards import IsolatedReward
from tests.rl.rewards import hostile
from tests.rl.rewards.hostile import CASES, Case
from tests.rl.rewards.marked import NAME, left_behind, marked

GOOD = ["fine"] * 7
PLAIN_CALLS, RESTARTS = 2000, 100


@dataclass(frozen=True)
class Result:
    """What came of one case.

    Args:
        outcome: of the bad completion, and its message.
        kept: how many of the 7 others have a score.
        seconds: the whole batch, repeats included.
        processes: of this function after that call; a supervisor and a worker are 2.
        left: processes after `close`.
        grown_mib: resident memory of this process, after less before.
        faults: what is not as expected.
    """

    outcome: str
    kept: int
    seconds: float
    processes: int
    left: int
    grown_mib: float
    faults: tuple[str, ...]


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def measured(case: Case, timeout: float) -> Result:
    """Run one case."""
    mark = uuid.uuid4().hex
    os.environ[NAME] = mark
    before = resident_mib()
    function = {"kind": "file", "path": hostile.__file__, "name": case.name}
    reward = IsolatedReward(case.name, function, timeout=timeout).load()
    assert all(o.value == 4.0 for o in reward.outcomes(7, {"completions": GOOD}).each)  # noqa: S101
    start = time.perf_counter()
    each = reward.outcomes(8, {"completions": [*GOOD[:3], "bad", *GOOD[3:]]}).each
    seconds = time.perf_counter() - start
    again = reward.outcomes(7, {"completions": GOOD}).each
    now = len(marked(mark))
    reward.close()
    left = len(left_behind(mark))
    bad, kept = each[3], sum(o.kind == "score" for i, o in enumerate(each) if i != 3)
    faults = [
        *([] if case.is_right(bad.kind, bad.message) else [f"not {case.kind}: {case.message}"]),
        *([f"{7 - kept} others lost their score"] if kept != (0 if case.costs_all else 7) else []),
        *(["the next call failed"] if any(o.value != 4.0 for o in again) else []),
        *([f"{left} processes left"] if left else []),
    ]
    said = bad.message.split(" (hostile.py")[0]
    shown = f"{bad.kind}: {said[:70]}" if bad.message else f"{bad.kind} {bad.value}"
    return Result(shown, kept, seconds, now, left, resident_mib() - before, tuple(faults))


def plain_call_us() -> tuple[float, float]:
    """Median and 99th percentile of a good call with one short completion, in µs."""
    reward = IsolatedReward("loop", {"kind": "file", "path": hostile.__file__, "name": "loop"}, timeout=10).load()
    times = []
    for _ in range(PLAIN_CALLS):
        start = time.perf_counter()
        reward.outcomes(1, {"completions": ["fine"]})
        times.append((time.perf_counter() - start) * 1e6)
    reward.close()
    return statistics.median(times), sorted(times)[int(0.99 * PLAIN_CALLS)]


def restart_ms() -> float:
    """Median of a call that ends the process and a good call after it, in ms."""
    reward = IsolatedReward("exits", {"kind": "file", "path": hostile.__file__, "name": "exits"}, timeout=10).load()
    times = []
    for _ in range(RESTARTS):
        start = time.perf_counter()
        reward.outcomes(1, {"completions": ["bad"]})
        reward.outcomes(1, {"completions": ["fine"]})
        times.append((time.perf_counter() - start) * 1e3)
    reward.close()
    return statistics.median(times)


def main() -> int:
    """Run every case; 1 if one of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for a batch")
    timeout = parser.parse_args().timeout
    rows = []
    for case in CASES:
        result = measured(case, timeout)
        rows.append((case, result))
        print(f"{case.name:24} {result.seconds:6.2f} s  {result.outcome}  {'; '.join(result.faults)}", flush=True)
    median, p99 = plain_call_us()
    good = sum(not result.faults for _, result in rows)
    restart = restart_ms()
    lines = [
        "# Hostile reward functions and what came of them",
        "",
        f"Written by `python benchmarks/hostile_rewards.py --timeout {timeout:g}` on {platform.machine()} with",
        f"{os.cpu_count()} cores, Python {platform.python_version()}. {good} of {len(rows)} cases went as they should.",
        "",
        f"8 completions a batch, one of them bad, {timeout:g} s for the batch and {timeout / 4:g} s for one",
        "alone. *Others* is how many of the 7 good ones kept their score. *Processes* are those there after a good",
        "call that follows (a supervisor and a worker are 2), and after `close`. *RSS* is the growth of the trainer's",
        "resident memory over the case.",
        "",
        f"A good call with one completion: median {median:.0f} µs, 99th percentile {p99:.0f} µs ({PLAIN_CALLS} calls).",
        f"A call in which the process dies (os._exit) and then a good call in a new process: median {restart:.1f} ms.",
        "",
        "| it | outcome of the bad completion | others | batch, s | processes | RSS, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case, r in rows:
        outcome = (r.outcome + "".join(f" **{fault}**" for fault in r.faults)).replace("|", "\\|")
        cells = (case.does, outcome, f"{r.kept} of 7", f"{r.seconds:.2f}")
        lines.append(f"| {' | '.join(cells)} | {r.processes}, {r.left} | {r.grown_mib:.1f} |")
    out = REPOSITORY / "benchmarks" / "results" / "hostile_rewards.md"
    out.write_text("\n".join(lines) + "\n")
    print(f"{good} of {len(rows)} cases as they should be; table in {out.relative_to(REPOSITORY)}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
