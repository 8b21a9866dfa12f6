r"""The reward `math`: whether a completion's answer equals the reference as mathematics, by the package math-verify.

    score_i = 1 if verify(parse(reference_i), parse(completion_i)) else 0

The reference comes first; the order matters to math-verify, which allows the second more forms than the first. It
finds the answer in the completion by itself (`\boxed{...}`, or the last formula or number), so no `--extract` applies.
The reference is column `answer`: LaTeX, which is taken as a whole unless it marks its formula itself (dollar signs,
`\boxed`), or a plain number. A reference in which math-verify finds nothing makes the reward not applicable (None).

math-verify bounds its own time with `signal.alarm`, which works only in a main thread and cannot stop one long sympy
operation. Its timeouts are switched off here, and this function runs only in a worker process, which can be killed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards.calling import Completion, completion_text, described
from qerl_compile.rl.rewards.outcomes import Outcome, Outcomes

MARKS = ("$", "\\boxed", "\\(", "\\[")


class MathReward:
    """math-verify with TRL's interface.

    Raises:
        TaskError: math-verify is not installed.
    """

    __name__ = "math"

    def __init__(self) -> None:
        try:
            from math_verify import parse, verify
        except ImportError as error:
            do = "Install it: pip install 'qerl-compile[tasks]'."
            got = f"{type(error).__name__}: {error}"
            raise TaskError(where="--reward math", expected="the package math-verify", got=got, do=do) from error
        for name in ("math_verify.parser", "math_verify.grader"):  # each call warns that its timeout is off
            logging.getLogger(name).setLevel(logging.ERROR)
        self.parse: Callable[..., list[Any]] = parse
        self.verify: Callable[..., bool] = verify
        self(completions=["$\\frac{1}{2}$"], answer=["0.5"])  # sympy and the grammar build their tables at first use

    def __call__(
        self, *, completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any
    ) -> list[float | None]:
        """TRL's call: 1.0, 0.0 or None for each completion; None also where math-verify failed."""
        given = {"completions": completions, "answer": answer}
        return [outcome.value for outcome in self.outcomes(len(completions), given).each]

    def outcomes(self, count: int, given: Mapping[str, Any]) -> Outcomes:
        """Score `count` completions; an exception inside math-verify is an error of that completion alone."""
        pairs = zip(given["completions"], given["answer"], strict=True)
        return Outcomes(tuple(self.outcome(completion_text(completion), str(answer)) for completion, answer in pairs))

    def outcome(self, text: str, reference: str) -> Outcome:
        """Whether the answer in `text` equals `reference`; not applicable if that holds no mathematics."""
        try:
            marked = any(mark in reference for mark in MARKS)
            gold = self._parse(reference if marked else f"${reference}$")  # else `2\\sqrt{2}` would be read as 2
            if not gold:
                return Outcome("score", None)
            right = self.verify(gold, self._parse(text), timeout_seconds=None, raise_on_error=True)
        except MemoryError:
            raise
        except Exception as error:
            return Outcome("error", message=f"{type(error).__name__}: {error} in math-verify, for {described(text)}")
        return Outcome("score", float(right))

    def _parse(self, text: str) -> list[Any]:
        return self.parse(text, parsing_timeout=None, raise_on_error=True)
