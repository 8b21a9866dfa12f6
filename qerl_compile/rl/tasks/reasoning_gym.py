"""Tasks of the package reasoning_gym: endless questions with exact answers, made as they are needed.

reasoning_gym makes item `i` of a dataset with seed `s` from `Random(s + i)`. We give every block of 256 positions a
dataset of its own, with a hashed seed, so that streams do not overlap by arithmetic. Inside a block each position owns
256 consecutive items and takes the first whose question falls on its side (training or held out, `held_out.py`).

Judging. `score_answer` of reasoning_gym returns partial credit in many shapes: 0.01 for anything, the share of the
text that is right, the first number of several. It is asked only about an answer already extracted, and only a score
of at least 0.99 counts. Where the reference is a number, three rules come first: an equal number is right; no number
is wrong; and a number of the other sign is wrong, because one of its scorers drops the minus.
Some scorers parse the answer with sympy, which evaluates it: run untrusted models in a container.
"""

from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import is_numeric_answer, to_number
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.rl.tasks.held_out import check_share, is_held_out, normalized, question_of
from qerl_compile.rl.tasks.task import Row, Task

POSITIONS_PER_BLOCK = 256
TRIES = 256
RIGHT = 0.99
HELD_OUT_SEED = 0
DEFAULT_SHARE = 0.5
OWNED = ("seed", "size")


class ReasoningGymTask(Task):
    """One reasoning_gym generator with fixed settings.

    Rows have the columns prompt (one user message), question, answer (str, or None where many answers are right) and
    metadata (the generator's own facts, such as `expression`).

    Args:
        spec: the text the task was given as, named in errors.
        name: the generator, such as `chain_sum`.
        options: its settings, and `held_out`, the share of questions kept for evaluation (0.5 unless given).

    Raises:
        TaskError: reasoning_gym is missing, the name or a setting is unknown or invalid, or no row can be made.
    """

    def __init__(self, spec: str, name: str, options: dict[str, Any]) -> None:
        self.spec, self.name = spec, name
        options = dict(options)
        self.share = check_share(options.pop("held_out", DEFAULT_SHARE), where=spec)
        self.options = options
        check_options(spec, name, options)
        self._block = lru_cache(maxsize=4)(self._make_block)
        self._judge = self._make_block(0, "judge", 0)
        self.train_row(seed=0, position=0)  # a generator that cannot make a row is refused now, not at step 1

    def train_row(self, seed: int, position: int) -> Row:
        """The training row at `position` of the stream `seed`; see `Task.train_row`."""
        return self._row(seed, "train", position, held_out=False)

    def held_out(self, count: int | None = None) -> list[Row]:
        """The first `count` held-out rows with different questions; see `Task.held_out`."""
        if count is None:
            do = "Give a number of evaluation items."
            raise TaskError(where=self.spec, expected="a count, the task being endless", got="None", do=do)
        rows: dict[str, Row] = {}
        draws = max(1000, 20 * count)
        for position in range(draws):
            if len(rows) == count:
                break
            row = self._row(HELD_OUT_SEED, "held out", position, held_out=True)
            rows.setdefault(normalized(row["question"]), row)
        if len(rows) < count:
            raise TaskError(
                where=self.spec,
                expected=f"{count} different held-out questions",
                got=f"{len(rows)} in {draws} draws with held_out={self.share}",
                do=f"Set train.eval_size to at most {len(rows)}, raise held_out, or choose settings with more of them.",
            )
        return list(rows.values())

    def holds_out(self, row: Row) -> bool:
        """Whether the row's question falls on the held-out side; see `Task.holds_out`."""
        return is_held_out(question_of(row), self.share)

    def is_correct(self, answer: str | None, row: Row) -> bool:
        """Whether an extracted answer is right, by number where the reference is one, else by reasoning_gym.

        Raises:
            TaskError: reasoning_gym's scorer failed on this answer, which is neither right nor wrong.
        """
        if answer is None:
            return False
        if is_numeric_answer(row["answer"]):
            given, reference = to_number(answer), to_number(row["answer"])
            if given is None or reference is None or given == reference:
                return given is not None and given == reference
            if (given < 0) != (reference < 0):
                return False
            answer = format(given, "f")
        try:
            return (
                self._judge.score_answer(answer, {key: row[key] for key in ("question", "answer", "metadata")}) >= RIGHT
            )
        except Exception as error:
            raise TaskError(
                where=f"{self.spec}, score_answer",
                expected="a score",
                got=f"{type(error).__name__}: {error} for the answer {answer[:80]!r}",
                do="Choose another task or a reward function of your own.",
            ) from error

    def _row(self, seed: int, stream: str, position: int, *, held_out: bool) -> Row:
        for item in self._items(seed, stream, position):
            if is_held_out(item["question"], self.share) == held_out:
                messages = [{"role": "user", "content": item["question"]}]
                return {"prompt": messages, **{key: item[key] for key in ("question", "answer", "metadata")}}
        raise TaskError(
            where=self.spec,
            expected=f"a question for the {stream} rows within {TRIES} draws",
            got="none",
            do="Choose settings with more different questions, or another held_out share.",
        )

    def _items(self, seed: int, stream: str, position: int) -> Iterator[dict[str, Any]]:
        block, offset = divmod(position, POSITIONS_PER_BLOCK)
        dataset = self._block(seed, stream, block)
        for index in range(offset * TRIES, (offset + 1) * TRIES):
            try:
                item = dataset[index]
            except Exception as error:
                do = "Check the settings against reasoning_gym's documentation of this generator."
                got = f"{type(error).__name__}: {error}"
                raise TaskError(where=self.spec, expected="a row", got=got, do=do) from error
            yield item

    def _make_block(self, seed: int, stream: str, block: int) -> Any:
        import reasoning_gym

        size = POSITIONS_PER_BLOCK * TRIES
        own_seed = derive_seed(seed, stream, block, bits=31)  # some generators seed numpy, which takes 32 bits
        try:
            return reasoning_gym.create_dataset(self.name, seed=own_seed, size=size, **self.options)
        except Exception as error:  # its validation is a mix of assert, TypeError and ValueError
            do = "Change that setting."
            got = f"{type(error).__name__}: {error}"
            raise TaskError(where=self.spec, expected="settings the generator accepts", got=got, do=do) from error


def check_options(spec: str, name: str, options: dict[str, Any]) -> None:
    """Refuse a missing package, an unknown generator, and settings that it does not have."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        do = "Run `pip install 'qerl-compile[tasks]'`."
        raise TaskError(where=spec, expected="the package reasoning_gym", got=str(error), do=do) from error
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        do = f"Did you mean {', '.join(near)}?" if len(near) <= 3 else f"Choose one of {', '.join(near)}."
        raise TaskError(where=spec, expected="a generator of reasoning_gym", got=repr(name), do=do)
    known = [field.name for field in fields(DATASETS[name][1]) if field.name not in OWNED]
    for key in options:
        if key in OWNED:
            do = "Remove it: rows are made from the run's seed, without end."
            raise TaskError(where=spec, expected="settings of the generator", got=repr(key), do=do)
        if key not in known:
            do = f"Use one of {', '.join([*known, 'held_out'])}."
            raise TaskError(where=spec, expected=f"a setting of {name}", got=repr(key), do=do)
