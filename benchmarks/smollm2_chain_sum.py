"""The README's main job under several recipes, side by side: accuracy before and after, seconds per step, peak memory.

    python benchmarks/smollm2_chain_sum.py [--steps 30] [--inner eager] [--only qerl-nvfp4-aqn …]

Every row is one `qerl-compile train` in a process of its own, on the same task, prompt and seeds; only the rules of
the recipe differ. Accuracies are greedy, on 100 held-out questions, with Wilson's 95 % interval: one run of one seed,
so differences between rows of less than the intervals mean nothing. Step times are medians after the second step
(graphs are captured in the first two); the machine's load before and after is written down beside them.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from qerl_compile.rl.metrics import read_metrics

ROOT = Path(__file__).parent.parent
TASK = "rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
RECIPES = {
    "qerl-nvfp4-aqn": [],
    "nvfp4-lora": ["noise=null"],
    "bf16-lora-aqn": ["quantize=[]"],
    "bf16-lora": ["quantize=[]", "noise=null"],
}


def run(name: str, overrides: list[str], steps: int, inner: str, out: Path) -> dict[str, object]:
    """Train once and return the row of the table."""
    command = [sys.executable, "-m", "qerl_compile.cli", "train", "smollm2", "-o", str(out), "--inner", inner]
    command += ["--recipe", str(ROOT / "examples" / "smollm2-chain-sum.yaml"), "--task", TASK]
    command += ["--assistant-prefix", "{expression} ="]
    for override in [*overrides, f"train.steps={steps}"]:
        command += ["--set", override]
    before = os.getloadavg()[0]
    subprocess.run(command, check=True)
    rows = read_metrics(out / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/accuracy" in row]
    trained = [row for row in rows if "step_time" in row]
    steady = trained[2:] or trained
    return {
        "recipe": name,
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "evaluations": [
            {key: value for key, value in row.items() if key in ("step", "eval/items") or "accuracy" in key}
            for row in evaluations
        ],
        "step_s_median": statistics.median(row["step_time"] for row in steady),
        "step_s": [round(row["step_time"], 3) for row in trained],
        "rollout_s_median": statistics.median(row["time/rollout"] for row in steady),
        "update_s_median": statistics.median(row["time/update"] for row in steady),
        "peak_rss_mib": max(row["memory/peak_rss_mib"] for row in trained),
        "entropy_first": trained[0].get("entropy"),
        "entropy_last": next((row["entropy"] for row in reversed(trained) if "entropy" in row), None),
        "noise_sites": trained[-1].get("noise/sites", 0),
    }


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    lines = [
        f"SmolLM2-135M, chain_sum 2x1 digit, {report['steps']} steps, commit {report['commit']}, {report['date']}, "
        f"{report['cpu']}, {report['cores']} cores, torch {report['torch']}, inner {report['inner']}.",
        "",
        "| recipe | held-out accuracy before | after | s/step (rollout + update) | peak RSS | noisy norms |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        first, last = (
            f"{e['eval/accuracy']:.0%} [{e['eval/accuracy_low']:.0%}, {e['eval/accuracy_high']:.0%}]"
            for e in (row["evaluations"][0], row["evaluations"][-1])
        )
        times = f"{row['step_s_median']:.1f} ({row['rollout_s_median']:.1f} + {row['update_s_median']:.1f})"
        memory = f"{row['peak_rss_mib'] / 1024:.1f} GiB"
        lines.append(f"| {row['recipe']} | {first} | {last} | {times} | {memory} | {row['noise_sites']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args()
    import torch

    git = shutil.which("git") or "git"
    commit = subprocess.run(
        [git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    report = {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
        "inner": arguments.inner,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            out = Path(folder, name)
            report["rows"].append(run(name, RECIPES[name], arguments.steps, arguments.inner, out))
    results = ROOT / "benchmarks" / "results"
    (results / "smollm2_chain_sum.json").write_text(json.dumps(report, indent=1) + "\n")
    (results / "smollm2_chain_sum.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
