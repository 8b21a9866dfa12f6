"""Tasks from a JSONL file: one JSON object a line, checked in full before anything starts.

Two forms of row:
* `question` and `answer`, as in GSM8K. The question becomes a user message; if the answer holds `####`, what follows
  the last one is the answer and the whole text is kept in the column `solution`.
* `prompt` and `answer`. A string prompt is used as it is, without chat template; a list of messages gets one. This is
  TRL's rule.
Further columns are passed on to reward functions.

Each epoch visits every training row once, in an order that is a function of (seed, epoch). Held-out rows are a share
of the file by question hash (`held_out=0.1` unless given) or another file (`held_out=test.jsonl`), whose questions
are then left out of training; `left_out` says how many were.
"""

import json
import math
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import is_numeric_answer, to_number
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.rl.tasks.held_out import check_share, is_held_out, normalized, question_of
from qerl_compile.rl.tasks.task import Row, Task

DEFAULT_SHARE = 0.1
FINAL = "####"
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
MEND = "Correct or remove this line."


class JsonlTask(Task):
    """A file of questions with answers.

    Args:
        spec: the text the task was given as, named in errors.
        path: the file, absolute or relative to the working directory.
        options: `held_out`, a share in (0, 0.9] or the path of another file. No other option exists.

    Raises:
        TaskError: a file or line is unusable (named with its number), or one side of the split is empty.
    """

    def __init__(self, spec: str, path: str, options: dict[str, Any]) -> None:
        self.spec = spec
        unknown = [key for key in options if key != "held_out"]
        if unknown:
            do = f"Remove {unknown[0]!r}."
            raise TaskError(where=spec, expected="no option but held_out", got=repr(unknown[0]), do=do)
        rows = read_rows(Path(path))
        held_out = options.get("held_out", DEFAULT_SHARE)
        if isinstance(held_out, str) and held_out.endswith(".jsonl"):
            kept = read_rows(Path(held_out))
            questions = {question_of(row) for row in kept}
            train = [row for row in rows if question_of(row) not in questions]
        else:
            share = check_share(held_out, where=spec)
            kept = [row for row in rows if is_held_out(question_of(row), share)]
            train = [row for row in rows if not is_held_out(question_of(row), share)]
        self.left_out = len(rows) - len(train)
        self._questions = {question_of(row) for row in kept}
        self._train, self._held_out = train, [kept[i] for i in permutation(0, "held out", len(kept))]
        for side, found in (("training", train), ("held-out", kept)):
            if not found:
                do = "Give a larger file, another share, or held_out=OTHER.jsonl."
                raise TaskError(where=spec, expected=f"at least one {side} row", got=f"0 of {len(rows)} rows", do=do)

    def train_row(self, seed: int, position: int) -> Row:
        """The training row at `position` of the stream `seed`, epoch after epoch; see `Task.train_row`."""
        epoch, offset = divmod(position, len(self._train))
        return dict(self._train[permutation(seed, epoch, len(self._train))[offset]])

    def held_out(self, count: int | None = None) -> list[Row]:
        """The first `count` held-out rows in a fixed shuffled order, or all; see `Task.held_out`."""
        if count is not None and count > len(self._held_out):
            do = f"Set train.eval_size to at most {len(self._held_out)}, or raise held_out."
            got = f"{len(self._held_out)}"
            raise TaskError(where=self.spec, expected=f"{count} held-out rows", got=got, do=do)
        return [dict(row) for row in self._held_out[:count]]

    def holds_out(self, row: Row) -> bool:
        """Whether the row's question is one of the held-out ones; see `Task.holds_out`."""
        return question_of(row) in self._questions

    def is_correct(self, answer: str | None, row: Row) -> bool:
        """Equal as numbers where the reference is one, else equal as words."""
        if answer is None:
            return False
        if is_numeric_answer(row["answer"]):
            given = to_number(answer)
            return given is not None and given == to_number(row["answer"])
        return normalized(answer) == normalized(row["answer"])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int | str, length: int) -> tuple[int, ...]:
    """The numbers 0 to length - 1 in the order of one epoch."""
    order = list(range(length))
    Random(derive_seed(seed, "order", epoch)).shuffle(order)  # noqa: S311 - an order, not a secret
    return tuple(order)


def read_rows(path: Path) -> list[Row]:
    """Every row of a file, or a TaskError that names the first line at fault."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        do = "Give the path of a UTF-8 JSONL file."
        raise TaskError(where=str(path), expected="a readable file", got=str(error), do=do) from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{path}, line {number}"
        row = read_row(line, where)
        first = seen.setdefault(question_of(row), number)
        if first != number:
            refuse(where, "each question once", f"the question of line {first} again")
        rows.append(row)
    if not rows:
        raise TaskError(where=str(path), expected="at least one row", got="an empty file", do="Add rows.")
    return rows


def read_row(line: str, where: str) -> Row:
    """One line as a row with `prompt` and `answer`, and the file's other columns as they are."""
    try:
        data = json.loads(line, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
        if "\\ud" in line.lower():  # half of a surrogate pair is valid JSON, and no text
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        refuse(where, "one JSON object", f"{error} in {line[:80]!r}", error)
    if not isinstance(data, dict):
        refuse(where, "a JSON object", type(data).__name__)
    taken = [name for name in RESERVED if name in data]
    if taken:
        refuse(where, "column names that reward functions do not use already", repr(taken[0]))
    answer = data.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = format(Decimal(repr(answer)), "f")  # 1e-05 would be no number to those who read answers
    if not isinstance(answer, str) or not answer.strip():
        refuse(where, "an answer, as text or number", repr(answer))
    row = {**data, "answer": answer.strip()}
    if FINAL in answer:
        row["solution"], row["answer"] = answer, answer.rpartition(FINAL)[2].strip()
        if not row["answer"]:
            refuse(where, f"an answer after {FINAL}", "nothing")
    if "prompt" not in data:
        question = data.get("question")
        if not isinstance(question, str) or not question.strip():
            refuse(where, "a question or a prompt, as text", repr(question))
        row["prompt"] = [{"role": "user", "content": question}]
    elif not is_prompt(data["prompt"]):
        refuse(where, "a prompt as text or as a list of {role, content} messages", repr(data["prompt"])[:80])
    return row


def is_prompt(prompt: object) -> bool:
    """Whether `prompt` is text that is not blank, or a list of messages that ends with the user's."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    if not isinstance(prompt, list) or not prompt:
        return False
    roles = [m.get("role") for m in prompt if isinstance(m, dict) and isinstance(m.get("content"), str)]
    return len(roles) == len(prompt) and all(isinstance(role, str) for role in roles) and roles[-1] == "user"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; a key given twice is an error, where json.loads would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def finite(text: str) -> float:
    """A JSON number with a point or an exponent; one that no float holds is an error, where json.loads says inf."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is more than a float holds")
    return value


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def refuse(where: str, expected: str, got: str, cause: Exception | None = None) -> NoReturn:
    """Raise the TaskError for one line of a file."""
    raise TaskError(where=where, expected=expected, got=got, do=MEND) from cause
