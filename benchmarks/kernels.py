"""The benchmark of record: all kernels side by side on one GPU, in one process, columns of a cell in turn.

    python benchmarks/kernels.py --commit HASH [--layers "32B gate/up,7B q/o"] [--tokens 1,64] [--directions forward,dx]
                                 [--columns bf16,ours,humming] [--limit SECONDS] [--json FILE] [--markdown FILE]

Columns are peers.py; how a cell is timed is gpu_timing.py; what is printed last, and whether a target is met, is
kernel_report.py. Directions:

    forward   y = x · wᵀ
    dx        dy · w of the same packed weight, dequantized anew at every call where it is dequantized
    pair      forward and dx of one linear in a row, what activation checkpointing makes of each layer's backward; as
              single calls one dequantized weight serves both
    lora      forward with h · Bᵀ of rank 32 added, on two layers

Everything is built and compiled before the first cell is timed, on all cores. A competitor that is not installed or
fails is named and left out. Weights and activations are random; each column's first result is compared with the product
in float64. The JSON is written after every layer, so a run that is cut off leaves what it had.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import triton
from torch import Tensor

if __name__ == "__main__":
    # In place of this folder, whose kernels.py would pass for a package that transformers and bitsandbytes look for.
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
from benchmarks import gpu_timing, kernel_report, peers, precompile
from benchmarks.candidates import RUNTIME_KEYS
from qerl_compile.kernels import dispatch, nvfp4_dequantize, nvfp4_quantize, ops
from qerl_compile.kernels.cuda_device import capability_and_multiprocessors

SHAPES = (
    ("32B gate/up", 27648, 5120),
    ("32B down", 5120, 27648),
    ("32B q/o", 5120, 5120),
    ("7B gate/up", 18944, 3584),
    ("7B down", 3584, 18944),
    ("7B q/o", 3584, 3584),
    ("32B k/v", 1024, 5120),
    ("7B k/v", 512, 3584),
)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
DIRECTIONS = ("forward", "dx", "pair", "lora")
SLOW_CELLS = {("32B gate/up", 1), ("32B gate/up", 64), ("32B gate/up", 1024), ("32B q/o", 1), ("7B q/o", 64)}
SLOW_ROUNDS = 3
HOST_TOKENS = (1, 64, 256)
LORA_LAYERS, LORA_TOKENS, RANK = ("32B gate/up", "7B q/o"), (1, 16, 64, 256, 1024), 32
CHECKED = 512  # rows and columns of a result that are compared with float64
LIMIT = 1e-2  # relative error above which one of ours is called wrong


@dataclass
class Layer:
    """A weight in the form of every competitor, and the corner of it that results are checked against."""

    name: str
    n: int
    k: int
    linears: dict[str, list[peers.Linear]]
    rows_NK: Tensor  # float64, the first CHECKED rows
    columns_NK: Tensor  # float64, the first CHECKED columns


def build(name: str, n: int, k: int, columns: list[str], dead: set[str]) -> Layer:
    """The layer, without competitors that fail; they are added to `dead`."""
    w_NK = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
    linears = {}
    for column in columns:
        if column in dead or (column in peers.SLOW and not any(layer == name for layer, _ in SLOW_CELLS)):
            continue
        try:
            linears[column] = peers.COLUMNS[column](w_NK, gpu_timing.copies_for(n, k))
        except Exception as error:
            dead.add(column)
            print(f"# {column} left out: {error!r:.200}", flush=True)
    codes, block, global_scale = ops.quantize(w_NK)
    decode_scale = global_scale.reciprocal()
    rows_NK = ops.dequantize(codes[:CHECKED], block[:CHECKED], decode_scale, torch.float64)
    left = codes[:, : CHECKED // 2].contiguous(), block[:, : CHECKED // 16].contiguous()
    return Layer(name, n, k, linears, rows_NK, ops.dequantize(*left, decode_scale, torch.float64))


def inputs(layer: Layer, m: int) -> dict[str, tuple[Tensor, ...]]:
    """Random arguments of each direction."""
    x_MK, dy_MN, h_MR = (torch.randn(m, c, device="cuda", dtype=torch.bfloat16) for c in (layer.k, layer.n, RANK))
    lora_B_NR = (torch.randn(layer.n, RANK, device="cuda") * 0.02).bfloat16()
    return {"forward": (x_MK,), "dx": (dy_MN,), "pair": (x_MK, dy_MN), "lora": (x_MK, h_MR, lora_B_NR)}


def calls_of(layer: Layer, direction: str, m: int, arguments: tuple[Tensor, ...]) -> dict[str, list[gpu_timing.Work]]:
    """By column, one call per copy of the weight."""
    calls = {}
    for column, linears in layer.linears.items():
        operations = [getattr(linear, direction) for linear in linears]
        if operations[0] is None or (column in peers.SLOW and (layer.name, m) not in SLOW_CELLS):
            continue
        calls[column] = [lambda f=f: f(*arguments) for f in operations]
    return calls


def relative_error(layer: Layer, direction: str, arguments: tuple[Tensor, ...], result: Tensor) -> float:
    """Of the checked corner, in the Frobenius norm."""
    got = result[:CHECKED, :CHECKED].double()
    if direction in ("forward", "lora"):
        exact = arguments[0][:CHECKED].double() @ layer.rows_NK.T
    else:
        exact = arguments[-1][:CHECKED].double() @ layer.columns_NK
    if direction == "lora":
        exact += arguments[1][:CHECKED].double() @ arguments[2][:CHECKED].double().T
    return ((got - exact).norm() / exact.norm()).item()


def measure(layer: Layer, direction: str, m: int, clock: gpu_timing.Clock) -> dict[str, Any]:
    """One cell: every column under replay and as a single call."""
    arguments = inputs(layer, m)[direction]
    calls = calls_of(layer, direction, m, arguments)
    capture = gpu_timing.Capture()
    graphs, sizes = {}, {}
    cell: dict[str, Any] = {"direction": direction, "layer": layer.name, "n": layer.n, "k": layer.k, "m": m}
    for column in list(calls):
        try:
            error = relative_error(layer, direction, arguments, calls[column][0]())
            many = calls[column] if column in peers.SLOW else gpu_timing.repeated(calls[column], 8 if m <= 512 else 2)
            graphs[column], sizes[column] = capture(many).replay, len(many)
        except Exception as failure:
            print(f"# {column} {direction} {layer.name} M={m}: {failure!r:.160}", flush=True)
            calls.pop(column)
            continue
        cell[column] = {"error": error}
        if column == "ours" and not error < LIMIT:
            print(f"# WRONG {direction} {layer.name} M={m}: {error:.1e}", flush=True)
    fewer = dict.fromkeys(peers.SLOW, SLOW_ROUNDS)
    rounds = 15 if m <= 512 else 9
    replayed = gpu_timing.interleaved(graphs, rounds, clock, calls=sizes, fewer=fewer)
    singles = {column: copies[0] for column, copies in calls.items()}
    held = getattr(layer.linears["ours"][0], f"held_{direction}", None) if "ours" in singles and m >= 1024 else None
    before = {}
    if held is not None:  # a graph remembers no weight, so as a single call only
        singles[kernel_report.HELD] = before[kernel_report.HELD] = lambda: held(*arguments)
        cell[kernel_report.HELD] = {}
    plain = gpu_timing.interleaved(singles, rounds + 4, clock, fewer=fewer, before=before, drain=True)
    for column, times in plain.items():
        cell[column]["plain"] = times
    for column, times in replayed.items():
        cell[column]["replay"] = times
        if direction == "forward" and m in HOST_TOKENS and column not in peers.SLOW:
            cell[column]["host"] = gpu_timing.host_us(calls[column][0])
    return cell


def warm_up(names: list[str], tokens: list[int], directions: list[str], humming: bool) -> None:
    """Compile: humming's kernels of every layer, and ours, one call for each that may be a new one."""
    capability, multiprocessors = capability_and_multiprocessors(0)
    shapes = [shape for shape in SHAPES if shape[0] in names]
    jobs: dict[object, precompile.Job] = {(n, k): precompile.Job("humming", n, k) for _, n, k in shapes if humming}
    for name, n, k in shapes:
        for m in tokens:
            for way in {"forward", *("dx" for d in directions if d != "forward")}:
                choice = dispatch.choose(way, n, k, m, capability, multiprocessors)
                kind = sorted((key, value) for key, value in choice.items() if key not in RUNTIME_KEYS)
                ranks = (0, RANK) if way == "forward" and name in LORA_LAYERS and m in LORA_TOKENS else (0,)
                for rank in ranks:
                    key = (way, str(kind), rank, m == 1, m % 16 == 0, n % 128, k % 256)
                    jobs.setdefault(key, precompile.Job(way, n, k, m, None, rank))
    failures = precompile.precompile(list(jobs.values()))
    print(*(f"# warm-up {failure}" for failure in failures), sep="\n", flush=True)


def bandwidth(clock: gpu_timing.Clock) -> dict[str, float]:
    """TB/s of dequantize, and of quantize's two passes; 27648 x 5120."""
    n, k = 27648, 5120
    w_NK = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
    out = torch.empty_like(w_NK)
    codes, block, global_scale = ops.quantize(w_NK)
    decode_scale = global_scale.reciprocal()
    packed, dense = n * k * 0.5625, n * k * 2
    passes: dict[str, tuple[float, Callable[[], object]]] = {
        "copy": (2 * dense, lambda: out.copy_(w_NK)),
        "dequantize": (packed + dense, lambda: nvfp4_dequantize.dequantize_into(out, codes, block, decode_scale)),
        "quantize (encode pass)": (packed + dense, lambda: nvfp4_quantize.encode(w_NK, global_scale)),
        "quantize (maximum pass)": (dense, lambda: nvfp4_quantize.amax(w_NK)),
    }
    capture = gpu_timing.Capture()
    graphs = {}
    for name, (_, call) in passes.items():
        call()
        graphs[name] = capture([call] * 4).replay
    times = gpu_timing.interleaved(graphs, 9, clock, calls=dict.fromkeys(graphs, 4))
    return {name: round(moved / times[name][0] / 1e6, 2) for name, (moved, _) in passes.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="benchmarks/results/kernels.json")
    parser.add_argument("--markdown", default="benchmarks/results/kernels.md")
    parser.add_argument("--commit", default="unknown", help="of the sources that run; .git may not be there to ask")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new cell is begun")
    listed = {"layers": [s[0] for s in SHAPES], "tokens": TOKENS, "directions": DIRECTIONS, "columns": peers.COLUMNS}
    for name, values in listed.items():
        parser.add_argument(f"--{name}", default=",".join(map(str, values)), help="separated by commas")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    begin = time.time()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    names, columns, directions = (getattr(options, o).split(",") for o in ("layers", "columns", "directions"))
    tokens = [int(m) for m in options.tokens.split(",")]
    clock = gpu_timing.GpuClock()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]},
        "commit": options.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ceilings": gpu_timing.ceilings(clock),
        "bandwidth": bandwidth(clock),
        "smi": gpu_timing.smi(),
        "smi_by_layer": {},
        "cells": [],
    }
    print(*kernel_report.head(result), result["bandwidth"], sep="\n", flush=True)
    dead: set[str] = set()
    warm_up(names, tokens, directions, "humming" in columns)
    compiled = time.time() - begin
    layers = [build(*shape, columns, dead) for shape in SHAPES if shape[0] in names]
    print(f"compiled in {compiled:.0f} s, built after {time.time() - begin:.0f} s", flush=True)
    skipped = 0
    for layer in layers:
        for direction in directions:
            for m in tokens:
                if direction == "lora" and (layer.name not in LORA_LAYERS or m not in LORA_TOKENS):
                    continue
                if time.time() - begin > options.limit:
                    skipped += 1
                    continue
                result["cells"].append(measure(layer, direction, m, clock))
        result["smi_by_layer"][layer.name] = gpu_timing.smi()
        layer.linears.clear()
        torch.cuda.empty_cache()
        pathlib.Path(options.json).write_text(json.dumps(result), encoding="utf-8")
        pathlib.Path(options.markdown).write_text(kernel_report.markdown(result), encoding="utf-8")
        print(f"{layer.name}: {time.time() - begin:.0f} s", flush=True)
    if skipped:
        print(f"# time limit: {skipped} cells not measured", flush=True)
    print(kernel_report.closing(result))
    print(f"total {time.time() - begin:.0f} s; {len(result['cells'])} cells in {options.json} and {options.markdown}")


if __name__ == "__main__":
    main()
