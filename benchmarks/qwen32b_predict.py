"""What `qerl-compile plan` says of each measured step, from its shape and settings alone, beside what was measured.

A prediction needs no device, so none is spent on it: rows are read, predictions are added to them, and the file is
written again. The model that is asked about is on the meta device; nothing in a row but its settings is looked at.
"""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.qwen32b_grpo import recipe_of
from benchmarks.qwen32b_rows import GB, read
from benchmarks.random_models import empty_model
from qerl_compile.rl.footprint import Predictor

PHASES = ("after_load", "rollout", "update")


def run(options: argparse.Namespace) -> None:
    """Add predictions to the rows of every file, and print them."""
    for path in options.json:
        rows = read([path])
        for row in rows:
            if row["part"] == "grpo":
                row["predicted_bytes"] = predicted(row)
                print(describe(row), flush=True)
        Path(path).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def predicted(row: dict[str, Any]) -> dict[str, int]:
    """Bytes of each phase's peak."""
    recipe = recipe_of(row["recipe"], row["settings"])
    predictor = _predictor(row["size"], row["layers"], row["recipe"])
    found = predictor.footprint(row["device_bytes"], prompt_tokens=row["prompt_tokens"], train=recipe.train)
    return {"after_load": found.after_load, "rollout": found.rollout_peak, "update": found.training_peak}


@cache
def _predictor(size: str, layers: int, recipe: str) -> Predictor:
    return Predictor(empty_model(size, layers), recipe_of(recipe, {}))


def describe(row: dict[str, Any]) -> str:
    """Predicted, measured, and their ratio, in one line."""
    cells = [
        f"{name} {guess / GB:.2f} GB, measured {size / GB:.2f}" + (f" ({guess / size:.2f})" if size else "")
        for name in PHASES
        for guess, size in [(row["predicted_bytes"][name], row["peak_bytes"][name])]
    ]
    return f"{row['size']} {row['recipe']} {row['rows']} x {row['new']}: {'; '.join(cells)}"
