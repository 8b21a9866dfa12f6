"""The ablation of QeRL on a real model: bf16 or NVFP4, with and without noise, three seeds each, on a curriculum.

    python benchmarks/rl_study.py run    [--out DIR] [--recipes …] [--seeds 0,1,2] [--steps 100] [--parallel 6]
    python benchmarks/rl_study.py report [--out DIR]     benchmarks/results/rl_study.{json,md}, DIR/study.html

SmolLM2-135M-Instruct learns chain_sum with one-digit terms, then, from a mean reward of 0.85 on, two-digit ones;
held-out items are of both, half and half. All recipes share one learning rate, so that what differs is the base and
the noise. Each run is `qerl-compile train --resume` in a process of its own: finished runs are left alone, runs that
were cut off go on from their checkpoint, and new seeds are added to what is there. So the study may be taken in several
sittings.

`prepare` writes the two tasks as JSONL, for machines without reasoning_gym.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("bf16-lora", "bf16-lora-aqn", "nvfp4-lora", "qerl-nvfp4-aqn")
PREFIX = "{expression} ="
ADVANCE_AT = 0.85
SETTINGS = {
    "train.learning_rate": 2e-4,
    "train.learning_rate_schedule": "constant",
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.prompts_per_step": 16,
    "train.group_size": 8,
    "train.max_new_tokens": 8,
    "train.micro_batch_tokens": 16384,
    "train.rollout_batch": 128,
    "train.rollout_memory_gib": 2,
    "train.dynamic_sampling_rounds": 2,
    "train.eval_every": 20,
    "train.eval_size": 120,
    "train.checkpoint_every": 20,
}
TASKS = {"sums1.jsonl": (1, 160, 0.45), "sums2.jsonl": (2, 3000, 0.1)}  # digits of terms, questions, share held out


def prepare(folder: Path) -> None:
    """Write the tasks as reasoning_gym words them, each question once."""
    import reasoning_gym

    folder.mkdir(parents=True, exist_ok=True)
    for name, (digits, count, _) in TASKS.items():
        given = {"min_terms": 2, "max_terms": 2, "min_digits": digits, "max_digits": digits}
        source = reasoning_gym.create_dataset("chain_sum", size=20 * count, seed=1, **given)
        rows: dict[str, dict[str, str]] = {}
        for item in source:
            expression = item["metadata"]["expression"]
            rows.setdefault(
                expression, {"prompt": item["question"], "answer": item["answer"], "expression": expression}
            )
            if len(rows) == count:
                break
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        print(f"{folder / name}: {len(rows)} questions")


def command(out: Path, recipe: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    settings = {**SETTINGS, "train.steps": options.steps, "train.seed": seed}
    settings |= dict(pair.split("=", 1) for pair in options.set)
    words = [sys.executable, "-m", "qerl_compile.cli", "train", options.model, "--recipe", recipe, "--resume"]
    for task, (_, _, share) in TASKS.items():
        words += ["--task", f"{options.tasks / task}:held_out={share}"]
    words += ["--advance-at", str(ADVANCE_AT), "--assistant-prefix", PREFIX, "--inner", options.inner, "-o", str(out)]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return words


def run(options: argparse.Namespace) -> None:
    """Train whatever is not finished, a few processes at a time."""
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(recipe, int(seed)) for seed in options.seeds.split(",") for recipe in options.recipes.split(",")]
    waiting = [(r, s) for r, s in wanted if not (options.out / f"{r}-{s}" / "adapter").is_dir()]
    begin, running = time.time(), {}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    while waiting or running:
        while waiting and len(running) < options.parallel:
            recipe, seed = waiting.pop(0)
            out = options.out / f"{recipe}-{seed}"
            log = (options.out / f"{recipe}-{seed}.log").open("ab")
            words = command(out, recipe, seed, options)
            running[out] = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        for out, process in list(running.items()):
            if process.poll() is None:
                if time.time() - begin > options.limit:
                    process.terminate()  # saves a checkpoint; the next sitting goes on
                    process.wait()
                continue
            del running[out]
            print(f"{time.time() - begin:5.0f} s  {out.name}: exit {process.returncode}", flush=True)
        if time.time() - begin > options.limit:
            waiting.clear()
        time.sleep(0.2)


def summary(out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per run: what the metrics say."""
    from qerl_compile.rl.metrics import read_metrics

    rows = []
    for folder in sorted(out.glob("*-[0-9]*")):
        name = re.fullmatch(r"(.+)-(\d+)", folder.name)
        if name is None or not (folder / "metrics.jsonl").is_file():
            continue
        by_step = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if "reward" in row}
        steps = [by_step[step] for step in sorted(by_step)]
        evaluations = [row for row in read_metrics(folder / "metrics.jsonl") if "eval/accuracy" in row]
        if not steps or not evaluations:
            continue
        learnt = [row for row in steps if "entropy" in row]
        keep = ("step", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/items")
        mismatch = "sampling/sampling_logp_difference/mean"
        rows.append(
            {
                "recipe": name[1], "seed": int(name[2]), "steps": steps[-1]["step"],
                "finished": evaluations[-1]["step"] == options.steps,
                "evaluations": [{key: row[key] for key in keep} for row in evaluations],
                "entropy_first10": statistics.mean(row["entropy"] for row in learnt[:10]),
                "entropy_last10": statistics.mean(row["entropy"] for row in learnt[-10:]),
                "mismatch_mean": statistics.mean(row[mismatch] for row in learnt),
                "mismatch_max": max(row["sampling/sampling_logp_difference/max"] for row in learnt),
                "step_s_median": statistics.median(row["step_time"] for row in steps[2:] or steps),
                "rollout_s_median": statistics.median(row["time/rollout"] for row in steps[2:] or steps),
                "advanced_at_step": next((r["step"] for r in steps if r.get("curriculum/stage")), None),
                "no_signal_mean": statistics.mean(row["frac_reward_zero_std"] for row in steps),
                "peak_cuda_mib": max(row.get("memory/peak_cuda_mib", 0) for row in steps),
            }
        )  # fmt: skip
    return rows


def table(study: dict[str, Any]) -> str:
    """The study as Markdown: one line per recipe, with the range over seeds."""
    lines = [
        f"SmolLM2-135M-Instruct, chain_sum 2 x 1 digit then 2 x 2 digits (from a reward of {ADVANCE_AT}), "
        f"{study['device']}, torch {study['torch']}, commit {study['commit']}, {study['date']}. Held-out accuracy on "
        "120 items, half of each kind; mean over seeds, in brackets each seed's, with Wilson's 95 % interval of the "
        "pooled answers; all twelve runs shared the card, so seconds per step are not those of one run alone."
        if study["device"] != "cpu"
        else "",
        "",
        "| recipe | seeds | steps | before | after | 95 % | entropy first → last 10 | mismatch mean (max) | two digits "
        "from step | groups without signal | s/step (rollout) |",
        "|" + "---|" * 11,
    ]
    from qerl_compile.rl.proportions import Proportion

    for recipe in dict.fromkeys(row["recipe"] for row in study["runs"]):
        rows = [row for row in study["runs"] if row["recipe"] == recipe]
        first = [row["evaluations"][0]["eval/accuracy"] for row in rows]
        last = [row["evaluations"][-1]["eval/accuracy"] for row in rows]
        items = [row["evaluations"][-1]["eval/items"] for row in rows]
        pooled = Proportion(round(sum(a * n for a, n in zip(last, items, strict=True))), int(sum(items)))
        low, high = pooled.interval

        def mean(key: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.mean(row[key] for row in rows)

        seeds = ", ".join(f"{x:.1%}" for x in last)
        lines.append(
            f"| {recipe} | {len(rows)} | {min(row['steps'] for row in rows)} | {statistics.mean(first):.1%} | "
            f"{statistics.mean(last):.1%} ({seeds}) | {low:.1%} – {high:.1%} | "
            f"{mean('entropy_first10'):.2f} → {mean('entropy_last10'):.2f} | {mean('mismatch_mean'):.4f} "
            f"({max(row['mismatch_max'] for row in rows):.2f}) | "
            f"{', '.join(str(row['advanced_at_step'] or 'never') for row in rows)} | {mean('no_signal_mean'):.0%} | "
            f"{mean('step_s_median'):.2f} ({mean('rollout_s_median'):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def report(options: argparse.Namespace) -> None:
    """Write the table, the numbers behind it and the HTML page of all runs."""
    study = {
        "command": f"python benchmarks/rl_study.py run --steps {options.steps} --parallel 12",
        "settings": SETTINGS, "advance_at": ADVANCE_AT, "device": options.device_name, "torch": options.torch_version,
        "commit": options.commit, "date": datetime.now(UTC).date().isoformat(), "host": platform.machine(),
        "runs": summary(options.out, options),
    }  # fmt: skip
    results = ROOT / "benchmarks" / "results"
    (results / "rl_study.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    (results / "rl_study.md").write_text(table(study), encoding="utf-8")
    print(table(study))
    runs = [str(options.out / f"{row['recipe']}-{row['seed']}") for row in study["runs"]]
    page = options.out / "study.html"
    page.unlink(missing_ok=True)
    words = [sys.executable, "-m", "qerl_compile.cli", "report", *runs, "-o", str(page)]
    subprocess.run(words, check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "report"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--tasks", type=Path, default=ROOT / "runs" / "study-tasks", help="folder of the JSONL files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--parallel", type=int, default=6)
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--limit", type=float, default=1e9, help="seconds after which runs are stopped with a checkpoint"
    )
    parser.add_argument("--device-name", default="cpu")
    parser.add_argument("--torch-version", default="")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.tasks)
    else:
        {"run": run, "report": report}[options.what](options)


if __name__ == "__main__":
    main()
