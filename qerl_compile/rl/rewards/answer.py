"""The binary rewards: 1 for the right answer, 0 for any other.

Binary on purpose. Partial credit from text overlap is what a policy learns to collect instead of answers, and group
normalisation needs no more than right and wrong.

Extraction and the comparison of numbers take linear time and at most 400 digits (answers.py), so these functions are
as safe as their judge. A file's judge is ours too. reasoning_gym's scorers are not: some hand the answer to sympy,
where `9**9**9` never ends. The registry therefore runs `answer` in a process of its own for those tasks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import Extractor, extract, is_numeric_answer, to_number
from qerl_compile.rl.rewards.calling import Completion, completion_text
from qerl_compile.rl.rewards.outcomes import Outcome, Outcomes
from qerl_compile.rl.tasks.task import Row, Task


class AnswerReward:
    """Extract an answer by one rule and ask the task whether it is right.

    Called as TRL calls, it returns None where the task's judge failed, for TRL knows no errors; `outcomes` tells the
    two apart. `failures` counts failures and `last_failure` keeps the latest.

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
        return [
            outcome.value for outcome in self.outcomes(len(completions), {"completions": completions, **columns}).each
        ]

    def outcomes(self, count: int, given: Mapping[str, Any]) -> Outcomes:
        """Score `count` completions; a judge that failed is an error."""
        lists = {name: values for name, values in given.items() if is_column(values, count)}
        rows = [{name: values[i] for name, values in lists.items()} for i in range(count)]
        pairs = zip(given["completions"], rows, strict=True)
        return Outcomes(tuple(self.outcome(completion, row) for completion, row in pairs))

    def outcome(self, completion: Completion, row: Row) -> Outcome:
        """Score one completion; `row` needs what the task's judge reads."""
        numeric = is_numeric_answer(row.get("answer"))
        answer = extract(completion_text(completion), self.extractor, numeric=numeric)
        try:
            return Outcome("score", float(self.task.is_correct(answer, row)))
        except TaskError as error:
            self.failures, self.last_failure = self.failures + 1, str(error)
            return Outcome("error", message=str(error))

    def judge(self, completion: Completion, row: Row) -> float | None:
        """1.0 right, 0.0 wrong, None when the task's judge failed."""
        return self.outcome(completion, row).value


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
