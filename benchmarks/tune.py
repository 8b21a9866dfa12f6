"""Measure every candidate kernel on this GPU and write qerl_compile/kernels/tables/sm_XY.json.

    python benchmarks/tune.py [--only REGEX] [--merge] [--limit SECONDS] [--out TABLE.json] [--log LOG.json]

"adapted" cells are timed as a decode step has them: an ordinary kernel writes x, then lead_in.py's launch and the
product follow, with the sum of the layer in its epilogue where K > N; the next kernel of that kind waits for all of it.
Alone, back to back, a product's end hides behind the next one's beginning, and other forms win.

A cell is a direction, a weight and a bucket of tokens, named as in "forward 27648x5120 64"; `--only` picks cells by
that name, and with `--merge` the other entries of the present table stay. Candidates are in candidates.py.

A cell in four steps. Each candidate must give the same bits five times and agree with the product in float64 (from 32
tokens on: with the two-step path). All are then replayed twice as CUDA graphs over cold copies of the weight; what is
1.25 times slower than the best is dropped. The rest take turns for nine rounds (gpu_timing.py) and the best median
wins, except that the choice of the present table stays if it is within 1 %: tables should not change by noise.

The table is written after every weight, so a run that is cut off leaves what it had. The log holds every time.
"""

import argparse
import inspect
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])  # in place of this folder
from benchmarks import candidates, gpu_timing, precompile
from benchmarks.candidates import Choice
from qerl_compile.kernels import cuda, dispatch, ops, reference

SHAPES = (
    *((27648, 5120), (5120, 27648), (55296, 5120), (5120, 5120), (7168, 5120), (1024, 5120)),  # Qwen2.5-32B
    *((18944, 3584), (3584, 18944), (37888, 3584), (3584, 3584), (4608, 3584), (512, 3584)),  # Qwen2.5-7B
    *((576, 576), (192, 576), (960, 576), (1536, 576), (3072, 576), (576, 1536)),  # SmolLM2-135M
)
BUCKETS = tuple(bucket for bucket in dispatch.BUCKETS if bucket <= 4096)
ADAPTERS = {  # ranks of what rollouts fuse, with rank-32 adapters (stacked, up to a power of two)
    **{(55296, 5120): 64, (7168, 5120): 128, (5120, 5120): 32, (5120, 27648): 32},
    **{(37888, 3584): 64, (4608, 3584): 128, (3584, 3584): 32, (3584, 18944): 32},
}
DIRECTIONS = ("forward", "adapted", "dx")
LIMIT = 8e-3  # relative error; twice what the GPU tests allow, which look at more
SLACK = 1.25  # times the best, after two replays
LOYALTY = 1.01  # times the best, within which the present choice stays
CHECKED = 512  # rows of a result that are compared
Table = dict[str, dict[str, dict[str, Choice]]]


@dataclass(eq=False)
class Weight:
    """A random packed weight and what its product should be."""

    n: int
    k: int

    def __post_init__(self) -> None:
        w_NK = torch.randn(self.n, self.k, device="cuda", dtype=torch.bfloat16) * 0.02
        codes, block, global_scale = ops.quantize(w_NK)
        self.packed = codes, block
        self.decode_scale = global_scale.reciprocal()

    @property
    def ends_layer(self) -> bool:
        """Whether it is a down projection, whose product is added to what its layer began with."""
        return self.k > self.n

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor, Tensor]:
        """A [R, K], B [N, R], and something to add to y [16, N]."""
        rank = ADAPTERS[self.n, self.k]
        shapes = ((rank, self.k), (self.n, rank), (16, self.n))
        a, b, residual = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02 for shape in shapes)
        return a, b, residual

    @cached_property
    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales, distinct memory that L2 does not hold."""
        codes, block = self.packed
        return [(codes.clone(), block.clone()) for _ in range(gpu_timing.copies_for(self.n, self.k))]

    @cached_property
    def exact_NK(self) -> Tensor:
        """float64."""
        return reference._wide_products(*self.packed, torch.float32).double() * self.decode_scale.double()

    def shrink(self) -> None:
        """Give the copies and the float64 weight back."""
        for large in ("copies", "exact_NK"):
            self.__dict__.pop(large, None)

    def input(self, direction: str, m: int) -> Tensor:
        """x or dy."""
        return torch.randn(m, self.n if direction == "dx" else self.k, device="cuda", dtype=torch.bfloat16)

    def call(self, direction: str, x: Tensor, choice: Choice, copy: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """One product."""
        if direction == "adapted":
            a, b, residual = self.adapter
            added = residual[: x.shape[0]] if self.ends_layer else None
            packed = copy or self.packed
            return cuda.adapted_linear(x * 1, *packed, self.decode_scale, a, b, added, choice=choice)
        launch = cuda.linear if direction == "forward" else cuda.linear_dx
        return launch(x, *(copy or self.packed), self.decode_scale, choice=choice)


def rejected(weight: Weight, direction: str, x: Tensor, choice: Choice, expected: Tensor | None) -> str:
    """Why the candidate must not be used; empty if it may."""
    y = weight.call(direction, x, choice)
    if not all(torch.equal(y, weight.call(direction, x, choice)) for _ in range(4)):
        return "not deterministic"
    if expected is None:
        return ""
    got = y[:: stride(x.shape[0])].double()
    error = ((got - expected).norm() / expected.norm()).item()
    return "" if error < LIMIT else f"wrong: {error:.1e}"


def stride(m: int) -> int:
    """Of the rows that are compared, at most CHECKED of all parts."""
    return -(-m // CHECKED)


def expectation(weight: Weight, direction: str, x: Tensor) -> Tensor:
    """Some rows of the product."""
    rows = x[:: stride(x.shape[0])]
    if direction == "adapted":
        a, b, residual = weight.adapter
        y = rows.double() @ weight.exact_NK.T + (rows.double() @ a.double().T) @ b.double().T
        return y + residual[: x.shape[0]].double() if weight.ends_layer else y
    if x.shape[0] <= 16:
        return rows.double() @ (weight.exact_NK.T if direction == "forward" else weight.exact_NK)
    return weight.call(direction, rows.contiguous(), dispatch.TWO_STEP).double()


def cells_of(n: int, k: int) -> list[tuple[str, int]]:
    """Directions and buckets of a weight. Rollouts have two rows at least, and lead_in.py 16 at most."""
    rows = {"forward": BUCKETS, "adapted": (2, 8, 16) if (n, k) in ADAPTERS else (), "dx": BUCKETS}
    return [(direction, m) for direction in DIRECTIONS for m in rows[direction]]


def survivors(times: dict[str, gpu_timing.Times]) -> list[str]:
    """Those within SLACK of the best."""
    best = min(least for _, least, _ in times.values())
    return [name for name, (_, least, _) in times.items() if least <= SLACK * best]


def winner(times: dict[str, gpu_timing.Times], incumbent: Choice | None) -> str:
    """The fastest by median, or the incumbent if it is as good as that."""
    best = min(times, key=lambda name: times[name][0])
    present = candidates.name(incumbent) if incumbent else ""
    return present if present in times and times[present][0] <= LOYALTY * times[best][0] else best


def merged(base: Table, tuned: Table) -> Table:
    """The base with the tuned cells in place of its own; buckets in ascending order."""
    table: Table = {direction: dict(base.get(direction, {})) for direction in DIRECTIONS}
    for direction, rows in tuned.items():
        for shape, row in rows.items():
            both = {**table[direction].get(shape, {}), **row}
            table[direction][shape] = dict(sorted(both.items(), key=lambda item: int(item[0])))
    return table


def tune_cell(
    weight: Weight, direction: str, m: int, choices: list[Choice], incumbent: Choice | None, clock: gpu_timing.Clock
) -> tuple[Choice | None, dict[str, gpu_timing.Times]]:
    """The best choice and every candidate's times; None if no candidate may be used."""
    if len(choices) == 1:
        return choices[0], {}
    x = weight.input(direction, m)
    expected = expectation(weight, direction, x)
    capture = gpu_timing.Capture()
    graphs: dict[str, Callable[[], object]] = {}
    size = 0
    for choice in choices:
        try:
            if reason := rejected(weight, direction, x, choice, None if choice == dispatch.TWO_STEP else expected):
                print(f"# {reason}: {direction} {weight.n}x{weight.k} {m} {choice}", flush=True)
                continue
            calls = [lambda copy=copy, choice=choice: weight.call(direction, x, choice, copy) for copy in weight.copies]
            calls = gpu_timing.repeated(calls, 8 if m <= 512 else 2)
            graphs[candidates.name(choice)], size = capture(calls).replay, len(calls)
        except Exception as error:
            print(f"# failed: {direction} {weight.n}x{weight.k} {m} {choice}: {error!r:.200}", flush=True)
    if not graphs:
        return None, {}
    sizes = dict.fromkeys(graphs, size)
    times = gpu_timing.interleaved(graphs, 2, clock, calls=sizes)
    kept = {name: graphs[name] for name in survivors(times)}
    finals = gpu_timing.interleaved(kept, 9, clock, calls=sizes)
    return json.loads(winner(finals, incumbent)), times | finals


def warm_up(cells: list[tuple[str, Weight, int, list[Choice]]]) -> None:
    """Compile every form; the same form with other divisibilities of N, K and M is another one."""
    jobs = {}
    for direction, weight, m, choices in cells:
        for choice in choices if len(choices) > 1 else ():
            rank = ADAPTERS[weight.n, weight.k] if direction == "adapted" else 0
            residual = rank > 0 and weight.ends_layer
            key = (direction, candidates.form(choice), weight.n % 128, weight.k % 256, rank, residual)
            jobs.setdefault(key, precompile.Job(direction, weight.n, weight.k, m, choice, rank, residual))
    failures = precompile.precompile(list(jobs.values()))
    print(*(f"# {failure}" for failure in failures), sep="\n", flush=True)
    print(f"{len(jobs)} forms", end=" ", flush=True)


def routed(choices: list[Choice]) -> list[Choice]:
    """Without kernels that cuda.py does not name: it would run two-step for them, and the table would be wrong."""
    source = inspect.getsource(cuda)
    return [choice for choice in choices if choice == dispatch.TWO_STEP or f'"{choice["kernel"]}"' in source]


def present_table(capability: tuple[int, int]) -> Table:
    """The checked-in table, also the incumbents."""
    return dispatch._table(capability) or {direction: {} for direction in DIRECTIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='cells whose name matches, e.g. "forward (27648|5120)x.* (1|8|16)$"')
    parser.add_argument("--merge", action="store_true", help="keep the present table's other cells")
    parser.add_argument("--out", default="", help="default: this device's table in qerl_compile/kernels/tables")
    parser.add_argument("--log", default=None)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new cell is begun")
    options = parser.parse_args()
    begin = time.time()
    capability = torch.cuda.get_device_capability()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    out = options.out or f"qerl_compile/kernels/tables/sm_{capability[0]}{capability[1]}.json"
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    clock = gpu_timing.GpuClock()
    present = present_table(capability)
    cells: list[tuple[str, Weight, int, list[Choice]]] = []
    for n, k in SHAPES:
        names = [(d, m) for d, m in cells_of(n, k) if re.search(options.only, f"{d} {n}x{k} {m}")]
        weight = Weight(n, k) if names else None
        for direction, m in names:
            incumbent = present.get(direction, {}).get(f"{n}x{k}", {}).get(str(m))
            choices = routed(candidates.of(direction, n, k, m, multiprocessors, incumbent))
            cells.append((direction, weight, m, choices))
    warm_up(cells)
    print(f"of {len(cells)} cells compiled in {time.time() - begin:.0f} s", flush=True)
    tuned: Table = {direction: {} for direction in DIRECTIONS}
    log: list[dict[str, Any]] = []
    for weight in dict.fromkeys(cell[1] for cell in cells):
        shape = f"{weight.n}x{weight.k}"
        for direction, _, m, choices in (cell for cell in cells if cell[1] is weight):
            if time.time() - begin > options.limit:
                print(f"# time limit: {direction} {shape} {m} not tuned", flush=True)
                continue
            incumbent = present.get(direction, {}).get(shape, {}).get(str(m))
            choice, times = tune_cell(weight, direction, m, choices, incumbent, clock)
            if choice is not None:
                tuned[direction].setdefault(shape, {})[str(m)] = choice
                log.append({"direction": direction, "n": weight.n, "k": weight.k, "m": m, "times": times})
        weight.shrink()
        torch.cuda.empty_cache()
        table = merged(present if options.merge else {}, tuned)
        pathlib.Path(out).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        if options.log:
            pathlib.Path(options.log).write_text(json.dumps(log), encoding="utf-8")
        print(*summary_lines(shape, tuned, log, time.time() - begin), sep="\n", flush=True)


def summary_lines(shape: str, tuned: Table, log: list[dict[str, Any]], seconds: float) -> list[str]:
    """Per direction: bucket, kernel and microseconds of the winners."""
    lines = []
    for direction in DIRECTIONS:
        parts = []
        for bucket, choice in tuned.get(direction, {}).get(shape, {}).items():
            cell = next(
                c for c in log if (c["direction"], f"{c['n']}x{c['k']}", c["m"]) == (direction, shape, int(bucket))
            )
            times = cell["times"].get(candidates.name(choice))
            parts.append(f"{bucket}:{choice['kernel'][:6]}" + (f" {times[0]:.1f}" if times else ""))
        if parts:
            lines.append(f"{shape} {direction} [{seconds:.0f} s] " + ", ".join(parts))
    return lines


if __name__ == "__main__":
    main()
