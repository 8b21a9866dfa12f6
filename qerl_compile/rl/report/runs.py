"""What a report knows of a run, from the files in its directory.

metrics.jsonl is required: without it there is nothing to report, and a line in its middle that is no JSON is an error
that names the line. A torn last line is what a run that is going on, or was killed, leaves behind; it is passed over.
Everything else may be missing, damaged or from another version: the run is reported without it and a note says so.
Files are judged by what they hold and by nothing else, so the directory of a running training can be read.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_compile.errors import QerlError, TaskError
from qerl_compile.recipe import Recipe
from qerl_compile.rl.metrics import decode, read_metrics
from qerl_compile.rl.report.series import Points, points

ACCURACY = "eval/accuracy"


@dataclass(frozen=True)
class Accuracy:
    """A greedy evaluation: step, share of right answers, 95 % interval (None if the row lacks it)."""

    step: int
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ReportedRun:
    """One run.

    Args:
        name: what the page calls it.
        path: its directory.
        rows: of metrics.jsonl, in order.
        samples: rows of samples.jsonl.
        recipe: the recipe as used; None if it cannot be read.
        model: base model, or "unknown".
        task: task spec, or "unknown".
        finished: whether it wrote its adapter.
        notes: what is missing or strange, one sentence each.
    """

    name: str
    path: Path
    rows: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...] = ()
    recipe: Recipe | None = None
    model: str = "unknown"
    task: str = "unknown"
    finished: bool = False
    notes: tuple[str, ...] = field(default=())

    def points(self, metric: str) -> Points:
        """The curve of a metric: step → value."""
        return points(self.rows, metric)

    @property
    def recipe_name(self) -> str:
        """The recipe's name, or the directory's where the recipe cannot be read."""
        return self.name if self.recipe is None else self.recipe.name

    @property
    def group(self) -> tuple[str, str, str]:
        """Runs with the same recipe name, base and task are taken for seeds of one experiment."""
        return self.recipe_name, self.model, self.task

    @property
    def steps(self) -> int:
        """The last training step that was done; 0 for none."""
        return max(self.points("reward") or self.points("step_time") or [0])

    @property
    def planned_steps(self) -> int | None:
        """Steps in the recipe."""
        return None if self.recipe is None else self.recipe.train.steps

    @property
    def seed(self) -> int | None:
        """Seed in the recipe."""
        return None if self.recipe is None else self.recipe.train.seed

    @property
    def accuracies(self) -> list[Accuracy]:
        """Every greedy evaluation in order of steps."""
        low, high = self.points(f"{ACCURACY}_low"), self.points(f"{ACCURACY}_high")
        values = self.points(ACCURACY)
        return [Accuracy(step, values[step], low.get(step), high.get(step)) for step in values]

    def median(self, metric: str) -> float | None:
        """The median of a metric over steps, without the first step if there are others: it compiles."""
        values = list(self.points(metric).values())
        values = values[1:] or values
        return statistics.median(values) if values else None

    @property
    def peak_memory(self) -> tuple[str, float] | None:
        """("GPU" or "process", MiB): the largest peak that was recorded."""
        for kind, metric in (("GPU", "memory/peak_cuda_mib"), ("process", "memory/peak_rss_mib")):
            values = self.points(metric).values()
            if values:
                return kind, max(values)
        return None


def read_run(path: str | Path, name: str | None = None) -> ReportedRun:
    """Read a run directory, finished or not.

    Args:
        path: the directory.
        name: what to call the run; None is the directory's name.

    Raises:
        TaskError: there is no metrics.jsonl, it holds no row, or a line before its last is no JSON object.
    """
    root, notes = Path(path), list[str]()
    file = root / "metrics.jsonl"
    if not file.is_file():
        do = "Give the directory that `qerl-compile train -o` writes."
        got = "no such file" if root.is_dir() else "no such directory"
        raise TaskError(where=str(file), expected="the metrics of a training run", got=got, do=do)
    rows = read_metrics(file)
    if not rows:
        do = "Wait for the first evaluation of the run to end."
        raise TaskError(where=str(file), expected="at least one complete row", got="none", do=do)
    strange = sum(not is_step(row.get("step")) for row in rows)
    if strange:
        notes.append(f"{strange} of {len(rows)} rows of metrics.jsonl have no usable step and are left out.")
    told = [
        f"Step {row['step']}{what}: {row[key]}"
        for row in rows
        for key, what in (("diagnosis", ""), ("update/fault", " changed nothing"))
        if key in row and is_step(row.get("step"))
    ]
    about = _about(root / "run.json", notes)
    finished = (root / "adapter").is_dir()
    run = ReportedRun(
        name or root.resolve().name,
        root,
        tuple(row for row in rows if is_step(row.get("step"))),
        tuple(_samples(root / "samples.jsonl", notes)),
        _recipe(root / "recipe.yaml", notes),
        about.get("model", "unknown"),
        about.get("task", "unknown"),
        finished,
    )
    if not finished:
        of = f" of {run.planned_steps}" if run.planned_steps else ""
        notes.append(f"No adapter yet: the run is going on, or was cut off, at step {run.steps}{of}.")
    return ReportedRun(**{**vars(run), "notes": (*notes, *told)})


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """A name for each path: its last part, with as many parents as it takes to tell the paths apart."""
    parts = [Path(path).resolve().parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise TaskError(where="report", expected="different runs", got="one directory twice", do="Name every run once.")


def is_step(value: object) -> bool:
    """Whether a row's `step` is a step number."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _about(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        row = decode(file.read_bytes())
    except OSError as fault:
        notes.append(f"run.json cannot be read ({fault.strerror}), so base and task are unknown.")
        return {}
    if row is None:
        notes.append("run.json is damaged, so base and task are unknown.")
        return {}
    absent = [key for key in ("model", "task") if not isinstance(row.get(key), str)]
    if absent:
        notes.append(f"run.json does not name {' and '.join(absent)}.")
    return {key: value for key, value in row.items() if key not in absent}


def _recipe(file: Path, notes: list[str]) -> Recipe | None:
    try:
        return Recipe.from_file(file)
    except QerlError as fault:
        notes.append(f"The recipe cannot be read: {fault}")
        return None


def _samples(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not file.is_file():
        notes.append("There is no samples.jsonl, so no completions are shown.")
        return []
    try:
        rows = read_metrics(file)
    except TaskError as fault:
        notes.append(f"No completions are shown: {fault}")
        return []
    whole = [row for row in rows if is_step(row.get("step")) and isinstance(row.get("completion"), str)]
    if len(whole) < len(rows):
        notes.append(f"{len(rows) - len(whole)} rows of samples.jsonl are no samples and are left out.")
    return whole
