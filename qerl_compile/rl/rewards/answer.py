"""The binary rewards: 1 for the right answer, 0 for any other.

Binary on purpose. Partial credit from text overlap is what a policy learns to collect instead of answers, and group
normalisation needs no more than right and wrong.
"""

from collections.abc import Sequence
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import Extractor, extract, is_numeric_answer, to_number
from qerl_compile.rl.tasks.task import Task

Completion = str | list[dict[str, str]]


def completion_text(completion: Completion) -> str:
    """What the model wrote, whether it came as text or as messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


class AnswerReward:
    """Extract an answer by one rule and ask the task whether it is right.

    None is returned, instead of a number, where the task's judge failed on an answer; `failures` counts those and
    `last_failure` keeps the latest.

    Args:
        task: the judge, and the source of the rows.
        extractor: the rule that finds the answer; see `qerl_compile.rl.answers`.
    """

    __name__ = "answer"

    def __init__(self, task: Task, extractor: Extractor = "final") -> None:
        self.task = task
        self.extractor: Extractor = extractor
        self.failures, self.last_failure = 0, ""

    def __call__(self, *, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """TRL's call: one score per completion, from the columns of the task's rows."""
        lists = {name: values for name, values in columns.items() if is_column(values, len(completions))}
        rows = [{name: values[i] for name, values in lists.items()} for i in range(len(completions))]
        return [self.judge(completion, row) for completion, row in zip(completions, rows, strict=True)]

    def judge(self, completion: Completion, row: dict[str, Any]) -> float | None:
        """1.0 right, 0.0 wrong, None when the task's judge failed."""
        numeric = is_numeric_answer(row.get("answer"))
        answer = extract(completion_text(completion), self.extractor, numeric=numeric)
        try:
            return float(self.task.is_correct(answer, row))
        except TaskError as error:
            self.failures, self.last_failure = self.failures + 1, str(error)
            return None


def gsm8k(*, completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float | None]:
    """Whether each completion's final number is the one after `####` in `answer` (or `answer` itself).

    Needs no task, so it serves any dataset with GSM8K's columns, in TRL too. None where the reference is no number.
    """
    scores: list[float | None] = []
    for completion, reference in zip(completions, answer, strict=True):
        right = to_number(reference.rpartition("####")[2])
        given = to_number(extract(completion_text(completion), "final"))
        scores.append(None if right is None else float(given is not None and given == right))
    return scores


def is_column(values: object, count: int) -> bool:
    """Whether a keyword is a column of the batch (a list as long as it) and not something else passed along."""
    return isinstance(values, list | tuple) and len(values) == count
