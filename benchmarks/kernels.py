"""All kernels side by side on one GPU, in one process: bfloat16 cuBLAS, ours, humming, bitsandbytes NF4, torchao.

    python benchmarks/kernels.py [--json FILE] [--markdown FILE] [--limit SECONDS]

Peers that are not installed, or fail, are reported and left out. Weights and activations are random. Two timings per
cell: *plain*, one call between two events with L2 flushed before (triton.testing.do_bench, launch gaps included), and
*replay*, one CUDA graph that walks over copies of the weight (same number of copies for every column) without launch
gaps. Both give the median and, as spread, the 20th and 80th percentile (plain) or the extremes (replay).

Backward is dx = dy · w of the same packed weight. humming and torchao have none; bitsandbytes dequantizes.
"""

# Lambdas here are called before the loop goes on: they may see its variables.
# ruff: noqa: B023

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from qerl_compile.kernels import cuda, nvfp4_dequantize, nvfp4_quantize, nvfp4_two_step, ops

SHAPES = (
    ("32B gate/up", 27648, 5120),
    ("32B down", 5120, 27648),
    ("32B q/o", 5120, 5120),
    ("32B k/v", 1024, 5120),
    ("7B gate/up", 18944, 3584),
    ("7B down", 3584, 18944),
    ("7B q/o", 3584, 3584),
    ("7B k/v", 512, 3584),
)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
BACKWARD_TOKENS = (1, 64, 256, 1024, 4096, 8192)
REPLAYS = 9
Linear = Callable[[Tensor], Tensor]


def replay(calls: list[Callable[[], object]]) -> list[float]:
    """[median, least, most] microseconds per call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return [statistics.median(times), min(times), max(times)]


def plain(call: Callable[[], object]) -> list[float]:
    """[median, 20th, 80th percentile] microseconds of a single call with a cold L2."""
    return [t * 1e3 for t in triton.testing.do_bench(call, warmup=3, rep=12, quantiles=[0.5, 0.2, 0.8])]


def bf16(w_NK: Tensor) -> Linear:
    return lambda x: torch.mm(x, w_NK.T)


def ours(w_NK: Tensor) -> Linear:
    codes, block, global_scale = ops.quantize(w_NK)
    decode_scale = global_scale.reciprocal()
    return lambda x: cuda.linear(x, codes, block, decode_scale)


def humming(w_NK: Tensor) -> Linear:
    from humming.layer import HummingLayer

    codes, block, global_scale = ops.quantize(w_NK)
    layer = HummingLayer(
        shape_n=w_NK.shape[0],
        shape_k=w_NK.shape[1],
        weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        torch_dtype=torch.bfloat16,
    ).cuda()
    tensors = {"weight": codes, "weight_scale": block, "weight_scale_2": global_scale.reciprocal()}
    layer.load_from_tensors(tensors)
    layer.transform()
    return lambda x: layer(x)


def bitsandbytes(w_NK: Tensor) -> Linear:
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(w_NK, blocksize=64, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def torchao(w_NK: Tensor) -> Linear:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(w_NK.shape[1], w_NK.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    linear.weight.data.copy_(w_NK)
    model = torch.nn.Sequential(linear)
    quantize_(model, NVFP4WeightOnlyConfig())
    return lambda x: model(x)


COLUMNS: dict[str, Callable[[Tensor], Linear]] = {
    "bf16": bf16,
    "ours": ours,
    "humming": humming,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}
SLOW = ("torchao",)  # milliseconds a call: one copy, few tokens' worth of cells


def forward_cells(name: str, w_NK: Tensor, dead: set[str], emit: Callable[[dict[str, Any]], None]) -> None:
    n, k = w_NK.shape
    copies = max(2, min(12, math.ceil(1.6e8 / (n * k * 0.5625))))
    layers: dict[str, list[Linear]] = {}
    for column, make in COLUMNS.items():
        if column in dead:
            continue
        try:
            layers[column] = [make(w_NK) for _ in range(1 if column in SLOW else copies)]
        except Exception as error:
            dead.add(column)
            print(f"# {column} left out: {error!r:.200}", flush=True)
    codes, block, global_scale = ops.quantize(w_NK)
    dense = ops.dequantize(codes[:512], block[:512], global_scale.reciprocal(), torch.float64)
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").bfloat16()
        exact = x[:512].double() @ dense.T
        cell: dict[str, Any] = {"direction": "forward", "layer": name, "n": n, "k": k, "m": m}
        for column, copied in layers.items():
            if column in SLOW and m not in (1, 64, 1024, 4096):
                continue
            with torch.no_grad():
                try:
                    y = copied[0](x)[:512, :512].double()
                    cell[column] = {"plain": plain(lambda f=copied[0]: f(x))}
                    cell[column]["replay"] = replay([lambda f=f: f(x) for f in copied])
                    cell[column]["error"] = ((y - exact).norm() / exact.norm()).item()
                except Exception as error:
                    print(f"# {column} {name} m={m}: {error!r:.160}", flush=True)
        emit(cell)


def backward_cells(name: str, w_NK: Tensor, dead: set[str], emit: Callable[[dict[str, Any]], None]) -> None:
    n, k = w_NK.shape
    codes, block, global_scale = ops.quantize(w_NK)
    decode_scale = global_scale.reciprocal()
    for m in BACKWARD_TOKENS:
        dy = torch.randn(m, n, device="cuda").bfloat16()
        x = torch.randn(m, k, device="cuda").bfloat16()
        cell: dict[str, Any] = {"direction": "dx", "layer": name, "n": n, "k": k, "m": m}
        cell["bf16"] = {"plain": plain(lambda: torch.mm(dy, w_NK))}
        cell["ours"] = {"plain": plain(lambda: fresh_dx(dy, codes, block, decode_scale))}
        if m >= 1024:  # recompute, then backward: the pair that checkpointing makes of every layer
            cell["bf16 pair"] = {"plain": plain(lambda: (torch.mm(x, w_NK.T), torch.mm(dy, w_NK)))}
            cell["ours pair"] = {"plain": plain(lambda: pair(x, dy, codes, block, decode_scale))}
        if "bitsandbytes" not in dead:
            try:
                import bitsandbytes.functional as functional

                packed, state = functional.quantize_4bit(w_NK, blocksize=64, quant_type="nf4")
                cell["bitsandbytes"] = {"plain": plain(lambda: dy @ functional.dequantize_4bit(packed, state))}
            except Exception as error:
                print(f"# bitsandbytes dx {name} m={m}: {error!r:.160}", flush=True)
        emit(cell)


def fresh_dx(dy: Tensor, codes: Tensor, block: Tensor, decode_scale: Tensor) -> Tensor:
    """dx with nothing left in the scratch by the call before."""
    from qerl_compile.kernels import nvfp4_workspace

    nvfp4_workspace.forget()
    return cuda.linear_dx(dy, codes, block, decode_scale)


def pair(x: Tensor, dy: Tensor, codes: Tensor, block: Tensor, decode_scale: Tensor) -> Tensor:
    """Recompute and backward of one linear: one dequantize pass serves both."""
    from qerl_compile.kernels import nvfp4_workspace

    nvfp4_workspace.forget()
    nvfp4_two_step.linear(x, codes, block, decode_scale)
    return nvfp4_two_step.linear_dx(dy, codes, block, decode_scale)


def bandwidth() -> dict[str, float]:
    """TB/s of a device copy, of dequantize, and of quantize with and without its maximum pass; 27648 x 5120."""
    n, k = 27648, 5120
    weights = [(torch.randn(n, k, device="cuda") * 0.02).bfloat16() for _ in range(2)]
    out = torch.empty_like(weights[0])
    codes, block, global_scale = ops.quantize(weights[0])
    decode_scale = global_scale.reciprocal()
    packed, dense = n * k * 0.5625, n * k * 2
    times = {
        "copy": (2 * dense, replay([lambda w=w: out.copy_(w) for w in weights])),
        "dequantize": (
            packed + dense,
            replay([lambda: nvfp4_dequantize.dequantize_into(out, codes, block, decode_scale)] * 2),
        ),
        "quantize (encode pass)": (
            packed + dense,
            replay([lambda w=w: nvfp4_quantize.encode(w, global_scale) for w in weights]),
        ),
        "quantize (maximum pass)": (dense, replay([lambda w=w: nvfp4_quantize.amax(w) for w in weights])),
    }
    return {name: moved / time[0] / 1e6 for name, (moved, time) in times.items()}


def markdown(cells: list[dict[str, Any]], head: str, rates: dict[str, float]) -> str:
    """The tables of docs: one per layer and direction, medians in microseconds."""
    lines = [head, "", "Bandwidth, TB/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()), ""]
    for direction in ("forward", "dx"):
        for layer in dict.fromkeys(c["layer"] for c in cells):
            rows = [c for c in cells if c["layer"] == layer and c["direction"] == direction]
            if not rows:
                continue
            names = list(dict.fromkeys(name for row in rows for name in row if isinstance(row[name], dict)))
            lines.append(f"### {layer}, {rows[0]['n']} x {rows[0]['k']}, {direction}")
            lines.append("| M | " + " | ".join(names) + " | bf16 / ours |")
            lines.append("|---" * (len(names) + 2) + "|")
            for row in rows:
                text = []
                for name in names:
                    times = row.get(name)
                    both = (
                        [f"{times[mode][0]:.1f}" for mode in ("replay", "plain") if mode in times] if times else ["-"]
                    )
                    text.append(" / ".join(both))
                mode = "replay" if "replay" in row["ours"] else "plain"
                ratio = row["bf16"][mode][0] / row["ours"][mode][0]
                lines.append(f"| {row['m']} | " + " | ".join(text) + f" | {ratio:.2f} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="benchmarks/results/kernels.json")
    parser.add_argument("--markdown", default="benchmarks/results/kernels.md")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new layer is begun")
    options = parser.parse_args()
    begin = time.time()
    torch.manual_seed(0)
    cells: list[dict[str, Any]] = []
    dead: set[str] = set()

    def emit(cell: dict[str, Any]) -> None:
        cells.append(cell)
        columns = {name: times for name, times in cell.items() if isinstance(times, dict)}
        shown = {
            name: [round(v[0], 1) for v in times.values() if isinstance(v, list)] for name, times in columns.items()
        }
        print(cell["layer"], cell["direction"], cell["m"], shown, flush=True)

    rates = bandwidth()
    print(rates, flush=True)
    for name, n, k in SHAPES:
        if time.time() - begin > options.limit:
            print(f"# time limit: {name} and later layers not run", flush=True)
            break
        w_NK = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
        forward_cells(name, w_NK, dead, emit)
        backward_cells(name, w_NK, dead, emit)
    device = torch.cuda.get_device_name()
    head = (
        f"{device}, torch {torch.__version__}, triton {triton.__version__}. Microseconds, medians: replay / plain for "
        "forward, plain for dx. One run of benchmarks/kernels.py; spreads and errors are in the JSON."
    )
    result = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "tb_per_s": rates}
    pathlib.Path(options.json).write_text(json.dumps({**result, "cells": cells}), encoding="utf-8")
    pathlib.Path(options.markdown).write_text(markdown(cells, head, rates), encoding="utf-8")
    print(f"total {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
