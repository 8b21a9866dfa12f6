"""What a training run shows and writes while it goes: on rank 0 all of it, on other ranks nothing.

metrics.jsonl   every row                     samples.jsonl   the first completions of every evaluation
stderr          one progress line             --track         TensorBoard, trackio or W&B, as a courtesy
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_compile.cli.console import stderr
from qerl_compile.cli.progress import training_progress
from qerl_compile.rl.diagnosis import Diagnosis
from qerl_compile.rl.evaluate import Evaluation
from qerl_compile.rl.metrics import MetricsWriter, read_metrics
from qerl_compile.rl.proportions import Proportion
from qerl_compile.rl.sinks import sink

SAMPLES = 8
"""Completions of each evaluation that are kept; they are of the same questions every time."""


@dataclass
class Recorder:
    """Takes what a trainer reports; without targets it drops everything.

    Args:
        targets: functions that each take every row.
        samples: samples.jsonl; None for nowhere.
    """

    targets: list[Any] = field(default_factory=list)
    samples: MetricsWriter | None = None

    def report(self, row: dict[str, Any]) -> None:
        """Take a row of metrics."""
        for target in self.targets:
            target(row)

    def record(self, step: int, evaluation: Evaluation) -> None:
        """Take an evaluation with its completions."""
        if self.samples is not None:
            for sample in evaluation.samples(SAMPLES):
                self.samples.write({"step": step, **sample})

    def diagnosed(self, found: Diagnosis) -> None:
        """Tell why learning seems impossible."""
        if self.targets:
            stderr().print(str(found), style="yellow", highlight=False, markup=False)


@contextmanager
def recording(out: Path, steps: int, *, track: list[str], config: Mapping[str, Any], first: bool) -> Iterator[Recorder]:
    """Open the files, the sinks and the progress line of a run.

    Args:
        out: the run's directory.
        steps: of the whole run.
        track: kinds of sinks.
        config: what sinks show beside the curves.
        first: whether this is rank 0.
    """
    with ExitStack() as stack:
        if not first:
            yield Recorder()
            return
        metrics = stack.enter_context(MetricsWriter(out / "metrics.jsonl"))
        samples = stack.enter_context(MetricsWriter(out / "samples.jsonl"))
        sinks = [stack.enter_context(sink(kind, out, config)) for kind in track]
        show = stack.enter_context(training_progress(steps))
        yield Recorder([metrics.write, *sinks, show], samples)


def first_accuracy(out: Path) -> Proportion:
    """Return the held-out accuracy before the first step, as metrics.jsonl has it: a resumed run did not measure it."""
    row = next(row for row in read_metrics(out / "metrics.jsonl") if "eval/accuracy" in row)
    return Proportion(round(row["eval/accuracy"] * row["eval/items"]), int(row["eval/items"]))
