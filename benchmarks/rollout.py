"""Rollout speed on a GPU: our engine on NVFP4 and on bf16, against vLLM's figures for the same chip.

    python benchmarks/rollout.py [--models 7B,32B] [--recipes nvfp4,bf16] [--sizes 1,8,...] [--json OUT] [--limit S]

Random-weight models of Qwen2.5's shapes, rank-32 adapters on all seven linears, noise on, prompts of 256 tokens (all
different: nothing is shared), 256 new tokens. As vLLM was measured (design/rollout_baseline.md): a decode step is
(T(256) - T(1)) / 255, tokens per second include the prefill. Beside that:

    floor      bytes that a step must read (packed weights, head, adapters, live keys and values) at this card's copy
               bandwidth, measured in the same run, as a share of the step
    prefill    64 prompts of 1024 tokens, one new token
    ragged     256 requests with prompts of 64 to 1024 tokens on 64 rows, refilled
    mismatch   the trainer's log-probabilities of sampled tokens against the recorded ones
    repeat     whether a second call gives the same tokens and log-probabilities, bit by bit
"""

import argparse
import gc
import json
import pathlib
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks import gpu_timing
from benchmarks.random_models import SHAPES, random_model
from benchmarks.rollout_report import VLLM
from qerl_compile.kernels import nvfp4_workspace
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.rollout import Sampling
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.token_logps import token_logps
from qerl_compile.transforming import resample_noise

PROMPT, NEW = 256, 256


def prompts(count: int, lengths: tuple[int, int], seed: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(0, vocabulary, (size,), generator=generator).tolist()) for size in sizes]


def sampling(new: int, seed: int = 0) -> Sampling:
    return Sampling(new, (-2,), 0, seed=(seed, "benchmark"))


def timed(sampler: PagedSampler, asked: list[tuple[int, ...]], new: int) -> tuple[float, Any]:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    rollouts = sampler.generate(asked, 1, sampling(new))
    torch.cuda.synchronize()
    return time.perf_counter() - begin, rollouts


def step_bytes(model: Any, rows: int) -> int:
    """What a decode step reads at least: every tensor of layers and head once, and the live keys and values."""
    config = model.config
    seen: dict[int, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        master = name.endswith(("lora_A", "lora_B"))
        if "embed_tokens" not in name and not master and tensor.stride() != (0, 0):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = config.num_hidden_layers * 2 * config.num_key_value_heads * head * 2
    return sum(seen.values()) + rows * (PROMPT + NEW // 2) * position


def measure(size: str, recipe: str, sizes: list[int], bandwidth: float, options: Any) -> dict[str, Any]:
    begin = time.time()
    model = random_model(size, recipe, layers=options.layers)
    built = time.time() - begin
    resample_noise(model, 1e-2, torch.Generator().manual_seed(0))
    vocabulary = model.config.vocab_size
    weights = torch.cuda.memory_allocated()
    cells: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "model": size, "recipe": recipe, "layers": model.config.num_hidden_layers, "built_s": built, "cells": cells,
        "weights_gib": weights / 2**30,
    }  # fmt: skip
    sampler = PagedSampler(model, rows=max(sizes))
    for rows in sorted(sizes, reverse=True):
        asked = prompts(rows, (PROMPT, PROMPT), rows, vocabulary)
        torch.cuda.reset_peak_memory_stats()
        sampler.rows = rows
        # The largest first, and whole: where pages and lines grow, graphs are captured anew.
        warm, _ = timed(sampler, asked, NEW if rows == max(sizes) else 4)
        one, _ = timed(sampler, asked, 1)
        whole, rollouts = timed(sampler, asked, NEW)
        step = (whole - one) / (NEW - 1)
        least = step_bytes(model, rows)
        cells.append(
            {
                "rows": rows, "warm_s": warm, "T1_s": one, "T256_s": whole, "step_ms": step * 1e3,
                "tokens_per_s": rows * NEW / whole, "prefill_tokens_per_s": rows * PROMPT / one,
                "floor_ms": least / bandwidth * 1e3, "floor_share": least / bandwidth / step,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "metrics": rollouts.metrics,
            }
        )  # fmt: skip
        print(describe(size, recipe, cells[-1]), flush=True)
    sampler.rows = 64
    asked = prompts(64, (1024, 1024), 1, vocabulary)
    seconds = min(timed(sampler, asked, 1)[0] for _ in range(2))
    result["prefill_tokens_per_s"] = 64 * 1024 / seconds
    print(f"{size} {recipe} prefill 64 x 1024: {result['prefill_tokens_per_s']:.0f} tok/s", flush=True)
    if f"{size} {recipe}" in options.extras.split(","):
        extras(result, model, sampler, vocabulary)
    return result


def extras(result: dict[str, Any], model: Any, sampler: PagedSampler, vocabulary: int) -> None:
    ragged = prompts(256, (64, 1024), 2, vocabulary)
    timed(sampler, ragged[:64], 4)
    for name in ("ragged", "ragged_again"):  # the first compiles kernels for sizes not met before
        seconds, rollouts = timed(sampler, ragged, NEW)
        result[name] = {"tokens_per_s": 256 * NEW / seconds, "seconds": seconds, "metrics": rollouts.metrics}
    asked = prompts(8, (PROMPT, PROMPT), 3, vocabulary)
    first, again = (sampler.generate(asked, 2, sampling(NEW)) for _ in range(2))
    result["repeat_equal"] = tuple(first) == tuple(again)
    advantages = torch.ones(len(first))
    batches = micro_batches(first, advantages, max_tokens=4096, pad_id=0, device=torch.device("cuda"))
    differences = []
    with torch.no_grad():
        for batch in batches:
            logps_BC, _ = token_logps(model, batch, 1.0)
            differences.append((logps_BC - batch.sampling_logp_BC)[batch.mask_BC])
    difference = torch.cat(differences).abs().double()
    quantiles = torch.quantile(difference.float().cpu(), torch.tensor([0.5, 0.9, 0.99]))
    result["mismatch"] = {
        "tokens": difference.numel(), "mean": difference.mean().item(), "max": difference.max().item(),
        "median, 90 %, 99 %": [round(float(q), 6) for q in quantiles],
    }  # fmt: skip
    print({key: result[key] for key in ("ragged", "ragged_again", "repeat_equal", "mismatch")}, flush=True)


def describe(size: str, recipe: str, cell: dict[str, Any]) -> str:
    speed, step = VLLM.get((size, recipe), {}).get(cell["rows"], (float("nan"),) * 2)
    return (
        f"{size} {recipe} x{cell['rows']}: {cell['tokens_per_s']:.0f} tok/s "
        f"({cell['tokens_per_s'] / speed:.2f} of vLLM), step {cell['step_ms']:.2f} ms (vLLM {step}), "
        f"floor {cell['floor_share']:.0%}, prefill "
        f"{cell['prefill_tokens_per_s']:.0f} tok/s, peak {cell['peak_gib']:.1f} GiB, warm {cell['warm_s']:.1f} s"
    )


WARM_UP = """
import sys
sys.path.insert(0, ".")
from benchmarks import rollout as r
size, recipe, rows = sys.argv[1:]
model = r.random_model(size, recipe, layers=1)
for count in rows.split(","):
    sampler = r.PagedSampler(model, rows=int(count))
    sampler.generate(r.prompts(int(count), (r.PROMPT, r.PROMPT), 0, 1000), 1, r.sampling(2))
"""


def warm_up(models: list[str], recipes: list[str], sizes: list[int]) -> None:
    """Compile what will be needed into the caches on disk: models of one layer, in processes side by side."""
    rows = {"nvfp4": list(map(str, sizes))}  # these kernels differ by size; bf16 needs Inductor's graphs only
    jobs = [
        subprocess.Popen([sys.executable, "-c", WARM_UP, model, recipe, some], stderr=subprocess.PIPE)
        for model in models
        for recipe in recipes
        for some in rows.get(recipe, [",".join(map(str, sizes))])
    ]
    for job in jobs:
        _, errors = job.communicate()
        if job.returncode:
            print("# warm-up:", errors.decode()[-1500:], flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="7B,32B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--recipes", default="nvfp4,bf16")
    parser.add_argument("--sizes", default="1,8,16,64,256")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--extras", default="7B nvfp4,7B bf16", help="which also get ragged, repeat and mismatch")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no new model is begun")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json", default="benchmarks/results/rollout.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    begin = time.time()
    models, recipes = options.models.split(","), options.recipes.split(",")
    sizes = [int(size) for size in options.sizes.split(",")]
    warm_up(models, recipes, sizes)
    print(f"warm-up {time.time() - begin:.0f} s", flush=True)
    ceilings = gpu_timing.ceilings(gpu_timing.GpuClock())
    print(torch.cuda.get_device_name(), ceilings, flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": options.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "ceilings": ceilings, "models": [],
    }  # fmt: skip
    for model in models:
        for recipe in recipes:
            if time.time() - begin > options.limit:
                print(f"# time limit: {model} {recipe} not measured")
                continue
            try:
                result["models"].append(measure(model, recipe, sizes, ceilings["copy_tb_per_s"] * 1e12, options))
            except torch.OutOfMemoryError as fault:
                print(f"# {model} {recipe}: {str(fault)[:200]}", flush=True)
            torch._dynamo.reset()  # compiled graphs hold on to their model
            nvfp4_workspace.release()
            gc.collect()
            torch.cuda.empty_cache()
            pathlib.Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
            print(f"# {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
