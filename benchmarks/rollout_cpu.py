"""Rollouts of SmolLM2-135M on one CPU thread: our engine beside Hugging Face's `generate`.

    python benchmarks/rollout_cpu.py [--rounds 3]      about 25 minutes, writes results/rollout_cpu.{json,md}
    python benchmarks/rollout_cpu.py --quick           one round of the small cells, writes nothing

How it is measured. All competitors of a cell run in turn, round after round, each round in another order; the median
and the smallest time are kept. Times are CPU time of the one thread, which leaves out what other users of the machine
take. Every competitor has run the cell's shapes before, so nothing is compiled in a measured call.

Competitors
    ours       PagedSampler on the transformed model (NVFP4, rank-32 adapters that are not zero)
    hf         HuggingFaceSampler, `generate` with a DynamicCache, on the very same model object
    plain      HuggingFaceSampler on the bf16 checkpoint, without adapters: what a user had before

All three draw at temperature 1 and record log-probabilities.

Cells
    uniform    prompts of 64 tokens, 64 new ones, no end token: 1, 8 and 32 sequences at a time
    ragged     prompts of 16 to 128 tokens, at most 64 new ones, sixteen frequent tokens end a completion; three times
               as many requests as rows. Engines draw different tokens, so lengths differ: compare tokens per second.

Prompts are random tokens, all different: no page is shared. In a group they would be, which only helps ours.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
import torch

import qerl_compile
from qerl_compile.rl.rollout import PagedSampler, Sampler, Sampling
from qerl_compile.rl.rollout.hf import HuggingFaceSampler
from qerl_compile.smollm2 import smollm2_directory

RESULTS = Path(__file__).parent / "results"
RECIPE, NEW = "qerl-nvfp4-aqn", 64
COMPETITORS = ("ours", "hf", "plain")


@dataclass(frozen=True)
class Cell:
    """What is asked of every competitor."""

    name: str
    rows: int
    prompts: list[tuple[int, ...]]
    ends: tuple[int, ...] = ()


def random_prompts(count: int, shortest: int, longest: int, seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(20, 40_000, (length,), generator=generator).tolist()) for length in lengths]


def models() -> tuple[Any, Any]:
    """The transformed model with adapters that matter, and the plain one."""
    from transformers import AutoModelForCausalLM

    model = qerl_compile.load("smollm2", RECIPE, inner="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.02, generator=generator)
    plain: Any = AutoModelForCausalLM.from_pretrained(smollm2_directory(), dtype=torch.bfloat16)
    return model, plain.eval()


def frequent_tokens(sampler: Sampler, prompts: list[tuple[int, ...]]) -> tuple[int, ...]:
    drawn = sampler.generate(prompts, 1, Sampling(NEW, (), 0, seed=("pilot",)))
    counts = Counter(token for rollout in drawn for token in rollout.completion_ids)
    return tuple(token for token, _ in counts.most_common(16))


def run(sampler: Sampler, cell: Cell, seed: int) -> dict[str, float]:
    """One call: its time in seconds, and what it brought."""
    wall, begin = time.perf_counter(), time.thread_time()
    rollouts = sampler.generate(cell.prompts, 1, Sampling(NEW, cell.ends, 0, seed=(seed, "benchmark")))
    took, wall = time.thread_time() - begin, time.perf_counter() - wall
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    return {"cpu_s": took, "wall_s": wall, "tokens": tokens, "tokens_per_s": tokens / took}


def measure(rounds: int, quick: bool) -> list[dict[str, Any]]:
    model, plain = models()
    pilot = PagedSampler(model, rows=16)
    ends = frequent_tokens(pilot, random_prompts(16, 16, 128, 7))
    cells = [Cell("uniform", rows, random_prompts(rows, 64, 64, rows)) for rows in (1, 8, 32)]
    cells += [Cell("ragged", rows, random_prompts(3 * rows, 16, 128, rows), ends) for rows in (8, 32)]
    results = []
    for cell in cells[:2] if quick else cells:
        samplers: dict[str, Sampler] = {
            "ours": PagedSampler(model, rows=cell.rows),
            "hf": HuggingFaceSampler(model, batch=cell.rows),
            "plain": HuggingFaceSampler(plain, batch=cell.rows),
        }
        for sampler in samplers.values():
            sampler.generate(cell.prompts, 1, Sampling(2, (), 0))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in COMPETITORS}
        for turn in range(rounds):
            for name in (*COMPETITORS[turn % 3 :], *COMPETITORS[: turn % 3]):
                runs[name].append(run(samplers[name], cell, turn))
        results.append({"cell": cell.name, "rows": cell.rows, "requests": len(cell.prompts), "runs": runs})
        print(line(results[-1]), flush=True)
    return results


def speeds(result: dict[str, Any], pick: Any = statistics.median) -> dict[str, float]:
    return {name: pick([run["tokens_per_s"] for run in runs]) for name, runs in result["runs"].items()}


def line(result: dict[str, Any]) -> str:
    middle, best = speeds(result), speeds(result, max)
    mean = {name: sum(r["tokens"] for r in runs) / len(runs) for name, runs in result["runs"].items()}
    lengths = ", ".join(f"{mean[name] / result['requests']:.0f}" for name in COMPETITORS)
    values = [f"{middle[name]:.1f} ({best[name]:.1f})" for name in COMPETITORS]
    ratios = [f"**{middle['ours'] / middle[name]:.2f}** ({best['ours'] / best[name]:.2f})" for name in ("hf", "plain")]
    what = f"{result['cell']}, {result['requests']} on {result['rows']} rows"
    return f"| {' | '.join([what, *values, *ratios, lengths])} |"


def table(report: dict[str, Any]) -> str:
    head = (
        f"SmolLM2-135M, {RECIPE}, inner eager, {report['rounds']} rounds, one thread, commit {report['commit']}, "
        f"{report['date']}, {report['cpu']}, torch {report['torch']}, transformers {report['transformers']}, load "
        f"{report['load_before']:.1f} to {report['load_after']:.1f}.\n\n"
        "Output tokens per second of CPU time: median (best) over the rounds.\n"
    )
    columns = ("cell", "ours", "hf, same model", "hf, plain bf16", "ours / hf", "ours / plain", "mean lengths")
    return (
        "\n".join([head, f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *map(line, report["cells"])]) + "\n"
    )


def cpu() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    report: dict[str, Any] = {
        "commit": subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": cpu(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": 1 if options.quick else options.rounds,
        "load_before": os.getloadavg()[0],
    }
    report["cells"] = measure(report["rounds"], options.quick)
    report["load_after"] = os.getloadavg()[0]
    print(table(report))
    if not options.quick:
        RESULTS.joinpath("rollout_cpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        RESULTS.joinpath("rollout_cpu.md").write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
