"""Seconds to the first training step: from empty caches, and again in a new process with what the first one left.

Each of the two is a process of its own: it imports, makes the model, and takes two GRPO steps of the same shape. The
second step is the first one without compiling, so their difference is what compiling cost. `TORCHINDUCTOR_CACHE_DIR`
and `TRITON_CACHE_DIR` begin as empty directories of this run's own; nothing that was compiled before is found. With
`--caches DIR` they stay, as DIR/TORCHINDUCTOR_CACHE_DIR and DIR/TRITON_CACHE_DIR, for what is measured next.

Completions are short (64 tokens): CUDA graphs and kernels of a decode step do not depend on how many follow.

`warm` is the opposite: it fills the ordinary caches for several models at once, two layers of each in processes side by
side, so that measurements that follow do not wait for compilers one after the other. It takes the steps of `grpo` with
short completions.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.qwen32b_grpo import STEP, Bench, Shape
from benchmarks.qwen32b_rows import append

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
COUNTERS = {"inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass"),
            "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")}  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Be a child, or start the two and add their row."""
    if options.child:
        print(json.dumps(child(options)), flush=True)
        return
    if options.caches and Path(options.caches).exists():
        raise SystemExit(
            f"--caches {options.caches}: name a directory that does not exist yet, or it would not be cold"
        )
    with tempfile.TemporaryDirectory(prefix="qwen32b-") as passing:
        environment = {name: f"{options.caches or passing}/{name}" for name in CACHES}
        found = {name: _child(sys.argv[1:], environment) for name in ("cold", "warm")}
    about = found["cold"].pop("about")
    found["warm"].pop("about")
    append(options.json, {**about, **found})
    for name, each in found.items():
        print(f"{options.size} {options.recipe} {name}: {each}", flush=True)


def _child(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.qwen32b", *arguments, "--child"]
    began = time.time()
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": time.time() - began}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """Two steps; seconds of each part, and what was compiled."""
    import torch

    bench, shape = Bench(options), Shape.read(options.shape)
    trainer = bench.trainer(shape)
    steps = []
    for step in (STEP, STEP + 1):
        begin = time.perf_counter()
        metrics = trainer.step(step)
        bench.watch.wait()
        total = time.perf_counter() - begin
        steps.append({"rollout_s": metrics["time/rollout"], "update_s": metrics["time/update"], "total_s": total})
    counters = torch._dynamo.utils.counters
    return {
        "about": bench.about("compile", shape), "built_s": bench.built_s,
        "first": steps[0], "second": steps[1], "compiling_s": steps[0]["total_s"] - steps[1]["total_s"],
        "graphs": sum(compiler.graphs for compiler in bench.model.qerl.compilers),
        "dynamo_graphs": counters["stats"]["unique_graphs"],
        "caches": {key: counters[part][key] for part, keys in COUNTERS.items() for key in keys},
    }  # fmt: skip


def warm(options: argparse.Namespace) -> None:
    """Fill the caches for every size and recipe at once; the steps that are taken for it are thrown away."""
    begin = time.time()
    with tempfile.TemporaryDirectory(prefix="qwen32b-") as folder:
        jobs = {
            f"{size} {recipe}": subprocess.Popen(
                [sys.executable, "-m", "benchmarks.qwen32b", "grpo", "--size", size, "--recipe", recipe,
                 "--layers", str(options.layers or 2), "--inner", options.inner, "--device", options.device,
                 "--shapes", options.shapes, "--json", f"{folder}/{size}-{recipe}.json",
                 "--recompute" if options.recompute else "--no-recompute"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for size in options.sizes.split(",")
            for recipe in options.recipes.split(",")
        }  # fmt: skip
        for what, job in jobs.items():
            _, errors = job.communicate()
            print(f"# warm {what}: {'done' if not job.returncode else errors[-1500:]}", flush=True)
    print(f"# warm: {time.time() - begin:.0f} s", flush=True)
