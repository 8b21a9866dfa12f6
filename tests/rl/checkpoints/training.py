"""The trainer on the toy task, stopped and resumed: by a request after a given step, or by SIGTERM at any moment."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qerl_compile.recipe import Recipe
from qerl_compile.rl.checkpoints import Interrupt, identity, latest, restore, save
from qerl_compile.rl.metrics import MetricsWriter, latest_rows, read_metrics
from qerl_compile.rl.trainer import Stopped
from tests.rl.checkpoints.killing import ended, forked
from tests.rl.checkpoints.world import same, state_of
from tests.rl.toy import toy_model, toy_recipe, toy_trainer

TIMES = ("time", "tokens_per_s", "_time", "memory")
"""In the names of metrics that are never the same twice."""


def recipe(steps: int, name: str = "qerl-nvfp4-aqn", **changes: Any) -> Recipe:
    """Of the toy: noise, decay of the learning rate and weight decay on, so that a step too many or too few shows."""
    settings = {"train__learning_rate_schedule": "cosine", "train__warmup_ratio": 0.1, "train__weight_decay": 0.1}
    settings |= {"train__steps": steps, "train__checkpoint_every": 0, "train__eval_every": 2}
    return toy_recipe(name, **{**settings, **changes})


@dataclass(frozen=True, eq=False)
class End:
    """How a run stands: parameters, optimizer and generators; and its metrics without times."""

    state: dict[str, Any]
    rows: list[dict[str, Any]]

    def differences(self, other: "End") -> list[str]:
        """What is not the same: names of state, and rows."""
        parts = [name for name in self.state if not same(self.state[name], other.state[name])]
        return parts + differing_rows(self.rows, other.rows)


def differing_rows(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Rows that only one of two runs has, by step and first name that differs."""
    found = []
    for index in range(max(len(rows), len(others))):
        mine, other = (each[index] if index < len(each) else {} for each in (rows, others))
        names = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
        found += [f"row {index}: {name}: {mine.get(name)} and {other.get(name)}" for name in names[:1]]
    return found


def train(out: Path, rules: Recipe, stop: Callable[[Any], bool] = lambda trainer: False, **fields: Any) -> End:
    """Train in `out` from its newest checkpoint, if there is one, as the command does; `fields` are the trainer's.

    Raises:
        Stopped: `stop`, asked with the trainer, said so; a checkpoint was saved.
    """
    with MetricsWriter(out / "metrics.jsonl") as metrics:
        trainer, _ = toy_trainer(rules, report=metrics.write, **fields)
        who = identity(trainer.model, rules, base="toy")
        trainer.save = lambda _: save(
            out, who, trainer.progress, trainer.model, trainer.optimizer, generators=trainer.generators
        )
        trainer.stop = lambda: stop(trainer)
        found, rejected = latest(out)
        assert rejected == []
        if found is not None:
            trainer.go_on(restore(found, who, trainer.model, trainer.optimizer))
        trainer.train()
    return End(state_of(trainer.model, trainer.optimizer), stable_rows(out))


def stable_rows(out: Path) -> list[dict[str, Any]]:
    """The rows that hold, without what is never the same twice."""
    rows = latest_rows(read_metrics(out / "metrics.jsonl"))
    return [{name: value for name, value in row.items() if not any(t in name for t in TIMES)} for row in rows]


def stopped_after(out: Path, rules: Recipe, step: int) -> End:
    """Train until `step` is finished, then go on in a trainer of its own, whose generators stand elsewhere."""
    try:
        train(out, rules, stop=lambda trainer: trainer.progress.step == step)
    except Stopped as request:
        assert request.step == step
    else:
        raise AssertionError("it did not stop")
    random.seed(99)
    torch.manual_seed(99)
    return train(out, rules)


@dataclass(frozen=True)
class Sigterms:
    """What many SIGTERMs led to.

    Args:
        codes: exit codes of the processes that got one, with how often each came.
        finished: processes that had finished when it came.
        at_steps: how many different steps they stopped after.
        waits_s: seconds from the signal to the end, in order.
        runs: runs that were finished in the end.
        same_as_uninterrupted: how many of those end with the bits and the metrics of a run that nobody stopped.
    """

    codes: dict[int, int]
    finished: int
    at_steps: int
    waits_s: list[float]
    runs: int
    same_as_uninterrupted: int


def sigterm_often(folder: Path, count: int, steps: int, seed: int = 0) -> Sigterms:
    """Send `count` SIGTERMs to training processes, each at a moment drawn at random; let every run come to its end."""
    rules, draw = recipe(steps), random.Random(seed)  # noqa: S311
    seed_of_process()
    train(folder / "warm", rules)  # compiles
    started = time.perf_counter()
    straight = train(folder / "straight", rules)
    duration = time.perf_counter() - started
    codes: Counter[int] = Counter()
    stops: set[int] = set()
    waits: list[float] = []
    sent = finished = runs = alike = 0
    while sent < count:
        out = folder / str(runs)
        while True:
            child = forked(lambda out=out: _until_asked(out, rules))
            if sent >= count:
                assert ended(child) == 0
                break
            _wait_for(out / "ready")
            time.sleep(draw.uniform(0, duration / 4))
            at = time.perf_counter()
            os.kill(child, signal.SIGTERM)
            code = ended(child)
            wait = time.perf_counter() - at
            (out / "ready").unlink()
            if (out / "done").exists():  # the signal came too late
                finished += 1
                break
            sent += 1
            waits.append(wait)
            codes[code] += 1
            found, rejected = latest(out)
            assert found is not None
            assert rejected == []
            stops.add(found.progress.step)
        runs += 1
        end = torch.load(out / "done", weights_only=True)  # written by our own child a moment ago
        differing = differing_rows(stable_rows(out), straight.rows)
        alike += same(end, straight.state["parameters"]) and not differing
    return Sigterms(dict(codes), finished, len(stops), sorted(waits), runs, alike)


def seed_of_process() -> None:
    """Nothing of ours draws from the global generators but the making of the model; where they stand is compared."""
    toy_model(recipe(1).name)  # made once, by that name
    random.seed(0)
    torch.manual_seed(0)


def _until_asked(out: Path, rules: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    try:
        with Interrupt() as request:
            (out / "ready").touch()
            end = train(out, rules, stop=lambda _: request.requested)
            torch.save(end.state["parameters"], out / "done")
    except Stopped:
        os._exit(request.exit_code)


def _wait_for(file: Path) -> None:
    limit = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < limit
        time.sleep(0.005)
