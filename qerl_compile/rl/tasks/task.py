"""What a task is: endless training rows, a held-out set that they never touch, and a judge of answers.

A row is one row of a TRL dataset: a dict with `prompt` (a string, or a list of `{"role", "content"}` messages) and any
other columns, which reward functions receive by name.

Training rows are a pure function of (seed, position). Position counts the prompts that a run has used, so a run
resumes from one integer, and a loop that draws extra prompts in some step only advances it further.

Training and held-out rows never share a question, whatever the seeds, the run, or the number of items asked for:
* a procedural task splits its *questions* by their hash (`held_out.py`), and both streams draw until a question
  falls on their side;
* a file is split by the same hash, or takes a second file as its held-out set and leaves that file's questions out;
* a curriculum trains on no question that any of its stages holds out.
Only the text is compared. Two wordings of one problem, or `3 + 4` and `4 + 3`, count as two questions.

A spec is how a task is written on the command line:

    rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1
    rg:basic_arithmetic:operators=+|-,held_out=0.3
    train.jsonl
    train.jsonl:held_out=test.jsonl
    rg:chain_sum:max_digits=1 -> rg:chain_sum:max_digits=2 @0.9        a curriculum (curriculum.py)
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.tasks.options import parse_options

Row = dict[str, Any]
ARROW = "->"
FORMS = "Write rg:NAME[:key=value,...] or FILE.jsonl[:held_out=FILE.jsonl]."


class Task(ABC):
    """A source of prompts with known answers. Attribute `spec` is the text it was made from."""

    spec: str

    @staticmethod
    def parse(spec: str) -> "Task":
        """The task that `spec` describes; see `parse_task`."""
        return parse_task(spec)

    @abstractmethod
    def train_row(self, seed: int, position: int) -> Row:
        """The training row at `position` (0-based, endless) of the stream that `seed` names."""

    @abstractmethod
    def held_out(self, count: int | None = None) -> list[Row]:
        """The first `count` held-out rows, all with different questions, the same for every seed and run.

        Args:
            count: how many; None means all, which only a finite task can give.

        Raises:
            TaskError: the task has fewer than `count`.
        """

    def holds_out(self, row: Row) -> bool:
        """Whether a row, of this task or of another, asks a question that this task keeps for evaluation.

        A curriculum asks, so that no stage trains on what another is evaluated with. No, unless a task says otherwise.
        """
        return False

    @abstractmethod
    def is_correct(self, answer: str | None, row: Row) -> bool:
        """Whether `answer`, already extracted from a completion, is right for `row`. None is never right."""

    def train_rows(self, seed: int, start: int, count: int) -> list[Row]:
        """Training rows at positions `start` to `start + count - 1`."""
        return [self.train_row(seed, position) for position in range(start, start + count)]


def parse_task(spec: str) -> Task:
    """Build a task from its command-line form.

    Args:
        spec: `rg:NAME[:k=v,...]` for a reasoning_gym generator, `FILE.jsonl[:k=v,...]` for a file. `held_out` is the
            share of questions kept for evaluation, or for a file another file. `A -> B @REWARD` is a curriculum.

    Raises:
        TaskError: the form is unknown, a package is missing, or the task itself is unusable.
    """
    if ARROW in spec:
        from qerl_compile.rl.tasks.curriculum import Curriculum

        return Curriculum.from_spec(spec)
    if spec.startswith("rg:"):
        from qerl_compile.rl.tasks.reasoning_gym import ReasoningGymTask

        name, _, options = spec[3:].partition(":")
        return ReasoningGymTask(spec, name, parse_options(options, where=spec))
    file = re.fullmatch(r"(?P<path>.+?\.jsonl)(?::(?P<options>.*))?", spec, flags=re.DOTALL)
    if file:
        from qerl_compile.rl.tasks.jsonl import JsonlTask

        return JsonlTask(spec, file["path"], parse_options(file["options"] or "", where=spec))
    raise TaskError(where="--task", expected="a reasoning_gym task or a .jsonl file", got=repr(spec), do=FORMS)


def columns(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """Rows as the columns that reward functions take: every key except `prompt`, None where a row lacks it."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    return {name: [row.get(name) for row in rows] for name in names}
