"""Optional copies of the metrics in TensorBoard, trackio or Weights & Biases.

metrics.jsonl is the record of a run; a sink is a courtesy to those who watch elsewhere, and is therefore never allowed
to matter: when it fails, at its start or later, it says so once and is left out from then on, and training goes on.
Only a package that is not installed is an error, since that is known before anything has begun.

What goes in: the numbers of a row, under the names that metrics.jsonl has and at the row's `step`. What does not: text,
None, and completions. A resumed run repeats the steps after its last checkpoint (and is another run of the same name
in W&B); what a program shows for a step that came twice is its own affair. `qerl-compile report` reads metrics.jsonl,
where the later row holds.
"""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from qerl_compile.errors import TaskError
from qerl_compile.rl.finite import finite

Kind = Literal["tensorboard", "trackio", "wandb"]
KINDS: tuple[str, ...] = get_args(Kind)
PROJECT = "qerl-compile"
INSTALL = {
    "tensorboard": "pip install 'qerl-compile[track]'",
    "trackio": "pip install trackio",
    "wandb": "pip install wandb",
}

Log = Callable[[dict[str, float], int], None]
Close = Callable[[], None]


class Sink:
    """Takes rows of metrics until it fails or is closed; a context manager.

    Args:
        kind: which program it writes for, named in the warning.
        start: opens it; returns the functions that log numbers at a step, and that close it.
    """

    def __init__(self, kind: str, start: Callable[[], tuple[Log, Close]]) -> None:
        self.kind = kind
        self._log: Log | None = None
        self._close: Close | None = None
        self._guard(lambda: self._open(start))

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Pass on the numbers of a row that has an integer `step`; does nothing once the sink has failed."""
        log, step = self._log, row.get("step")
        if log is None or not isinstance(step, int):
            return
        numbers = {
            name: number for name, value in row.items() if name != "step" and (number := as_number(value)) is not None
        }
        self._guard(lambda: log(numbers, step))

    def close(self) -> None:
        """Finish what was written. A second call does nothing."""
        close, self._log, self._close = self._close, None, None
        if close is not None:
            self._guard(close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, start: Callable[[], tuple[Log, Close]]) -> None:
        self._log, self._close = start()

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as fault:  # whatever another program raises, it must not end a training run
            self._log = self._close = None
            text = f"{self.kind} failed and is left out from here on ({type(fault).__name__}: {fault}); "
            warnings.warn(text + "metrics.jsonl has everything", RuntimeWarning, stacklevel=3)


def sink(kind: str, run_dir: str | Path, config: Mapping[str, Any]) -> Sink:
    """Open a sink for a run.

    Args:
        kind: tensorboard (writes RUN/tensorboard), trackio (its own local store) or wandb (RUN/wandb and its service).
        run_dir: the run's directory; its name is the run's name.
        config: what to show beside the curves, such as the recipe; anything JSON can hold.

    Raises:
        TaskError: as `check_sink`.
    """
    module = check_sink(kind)
    opener = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[kind]
    return Sink(kind, lambda: opener(module, Path(run_dir), dict(config)))


def check_sink(kind: str) -> Any:
    """Import what a sink needs, before anything else is done.

    Returns:
        The module.

    Raises:
        TaskError: the kind is unknown, or its package is not installed.
    """
    where = f"--track {kind}"
    if kind not in KINDS:
        raise TaskError(where=where, expected=f"one of {', '.join(KINDS)}", got=repr(kind), do="Name one of these.")
    try:
        return importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as fault:
        do = f"Run {INSTALL[kind]}."
        raise TaskError(where=where, expected=f"the package {kind}", got=str(fault), do=do) from fault


def _tensorboard(module: Any, run_dir: Path, config: dict[str, Any]) -> tuple[Log, Close]:
    writer = module.SummaryWriter(str(run_dir / "tensorboard"))
    text = json.dumps(config, indent=2, default=str)
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))  # Markdown for verbatim

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run must not lose what it told

    return log, writer.close


def _trackio(module: Any, run_dir: Path, config: dict[str, Any]) -> tuple[Log, Close]:
    run = module.init(project=PROJECT, name=run_dir.resolve().name, config=config, resume="allow", embed=False)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _wandb(module: Any, run_dir: Path, config: dict[str, Any]) -> tuple[Log, Close]:
    run = module.init(project=PROJECT, name=run_dir.resolve().name, dir=str(run_dir), config=config)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def as_number(value: Any) -> float | None:
    """A number as a float; None for text, booleans, and what is not finite.

    One-element tensors and arrays count as numbers, as they do in metrics.jsonl.
    """
    return finite(value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value)
