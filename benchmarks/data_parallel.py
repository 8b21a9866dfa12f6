"""Data parallel training: one GPU against several, the same steps of the same run.

    python benchmarks/data_parallel.py --json OUT                                        one rank
    torchrun --nproc-per-node 2 benchmarks/data_parallel.py --json OUT                   two
    python benchmarks/data_parallel.py --compare ONE TWO                                 the table

Random weights of a Qwen2.5 shape in NVFP4, rank-32 adapters, noise on, 128 sequences a step of which every group has
signal: the reward is a number made of the completion's tokens, which no task could give so cheaply. What is compared:
seconds per step, and how far the adapters are from each other: between ranks (to the bit) and between one rank and two
(to rounding, which AdamW's first steps amplify: an element whose gradient is rounding makes a full step).
"""

import argparse
import hashlib
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_models import random_model
from qerl_compile.recipe import Recipe
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.ranks import Ranks
from qerl_compile.rl.trainer import Trainer
from tests.rl.toy import Echo, words

SETTINGS = {
    "steps": 10,
    "learning_rate": 1e-5,
    "learning_rate_schedule": "constant",
    "warmup_ratio": 0.0,
    "prompts_per_step": 16,
    "group_size": 8,
    "max_new_tokens": 256,
    "micro_batch_tokens": 4096,
    "rollout_batch": 128,
    "eval_size": 4,
}


class Task(Echo):
    """Prompts of 64 words, each prompt another."""

    def train_row(self, seed: int, position: int) -> dict[str, Any]:
        """A prompt made of its position."""
        names = ("say", "now", "red", "green", "blue", "grey")
        return {"prompt": " ".join(names[(position * 31 + i * i) % 6] for i in range(64)), "answer": "red"}


def reward(completion_ids: Any, **_: Any) -> list[float]:
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def measure(options: argparse.Namespace) -> None:
    ranks = Ranks.join()
    device = str(ranks.device) if ranks.size > 1 else ("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(options.size, "nvfp4", layers=options.layers, inner=options.inner, device=device)
    overrides = {**SETTINGS, **dict(pair.split("=") for pair in options.set)}
    recipe = Recipe.named("qerl-nvfp4-aqn").with_overrides(f"train.{key}={value}" for key, value in overrides.items())
    trainer = Trainer(
        model, words(), recipe, Task(), [reward], PromptFormat(), "text", lambda row: None, ranks=ranks
    )  # fmt: skip
    rows = []
    for step in range(1, options.steps + 1):
        rows.append(trainer.step(step))
        print(f"rank {ranks.rank}: step {step} took {rows[-1]['step_time']:.2f} s", flush=True)
    adapters = [parameter.detach().cpu() for parameter in trainer.parameters]
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in adapters)).digest()
    mine = torch.tensor(list(digest), dtype=torch.float64)[None]
    equal = len({tuple(row.tolist()) for row in ranks.gather(mine)}) == 1
    if not ranks.is_first:
        return
    flat = torch.cat([t.flatten() for t in adapters])
    names = ("step_time", "time/rollout", "time/update", "rollout/tokens_per_s", "grad_norm", "entropy", "reward")
    result = {
        "ranks": ranks.size, "device": torch.cuda.get_device_name() if "cuda" in device else "cpu",
        "torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds"), "size": options.size,
        "commit": options.commit, "adapters_equal_between_ranks": equal,
        "steps": [{name: row[name] for name in names} for row in rows],
    }  # fmt: skip
    Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    torch.save(flat[:: options.thin].clone(), options.json + ".pt")
    print(json.dumps(result["steps"][-1]), "equal between ranks:", equal)


def compare(one: str, two: str) -> None:
    results = [json.loads(Path(name).read_text(encoding="utf-8")) for name in (one, two)]
    alone, shared = (torch.load(name + ".pt") for name in (one, two))
    print(f"{results[0]['size']}, {results[0]['device']}, commit {results[0]['commit']}, {results[0]['date']}")
    print("| ranks | s/step | rollout | update | speed-up | gradient norms | adapters equal between ranks |")
    print("|---|---|---|---|---|---|---|")
    base = statistics.median(row["step_time"] for row in results[0]["steps"][1:])
    for result in results:
        steps = result["steps"][1:]  # the first compiles
        seconds = [statistics.median(r[name] for r in steps) for name in ("step_time", "time/rollout", "time/update")]
        norms = ", ".join(f"{row['grad_norm']:.5f}" for row in result["steps"])
        cells = [f"{x:.2f}" for x in seconds] + [f"{base / seconds[0]:.2f}", norms]
        print(f"| {result['ranks']} | {' | '.join(cells)} | {result['adapters_equal_between_ranks']} |")
    print(f"\nadapters of two ranks against one: |difference| / |adapters| = "
          f"{float((shared - alone).norm() / alone.norm()):.2e}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7B")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--thin", type=int, default=16, help="keep every so-many-th adapter element for the comparison")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training settings")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json", default="data_parallel.json")
    parser.add_argument("--compare", nargs=2, metavar=("ONE", "TWO"))
    options = parser.parse_args()
    if options.compare:
        compare(*options.compare)
    else:
        measure(options)


if __name__ == "__main__":
    main()
