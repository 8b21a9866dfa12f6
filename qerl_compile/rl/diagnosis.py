"""When learning is impossible, say why: a named diagnosis with three completions to look at.

A group-relative update needs groups whose rewards differ, and a gradient. A run that has had neither for W steps
will not get better by waiting, and its curves only say that nothing happens. What is behind it is usually one of six
things, told apart here by the metrics of those steps and by what the model wrote, in the order cause before effect:

    reward_failing         no completion got a score: every call timed out or raised, or no function applied
    all_truncated          no completion ended before max_new_tokens
    parser_never_matched   the extraction rule found an answer in no completion
    collapsed              every prompt gets one and the same completion, or all of a prompt's are the same
    constant_reward        no group's rewards differ, for another reason; all 1 is named before all the others but the
                           first, since a task that is learnt also ends in samples that are alike
    no_gradient            rewards differ, and yet the gradient is exactly 0

A run in which some group still has signal and a gradient is never diagnosed, however oddly it looks: a model that is
always cut off can still learn if its answer comes first. Steps that broke off (numbers that are not finite) are another
matter and are told where they happen. Distillation teaches without any reward: do not ask then.

Pure functions of rows and samples; `Watch` only remembers the last W steps and speaks when the diagnosis changes.
What this module does not do: predict, or stop a run.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qerl_compile.rl.answers import Extractor, extract, is_numeric_answer

WINDOW = 5
"""Steps. One step without signal happens by chance, five in a row with 16 groups do not."""
SHOWN = 3
SHOWN_CHARACTERS = 200
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A completion with what it was asked, and the reward it got (None where there was no score).

    Args:
        prompt: as text; samples of one group have the same.
        completion: as text, without special tokens.
        reward: the total; None for none.
        answer: the task's right answer, which tells whether a number is looked for.
    """

    prompt: str
    completion: str
    reward: float | None
    answer: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Why nothing can be learnt, what to do, and completions that show it."""

    name: str
    explanation: str
    advice: str
    samples: tuple[Sample, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.explanation} {self.advice}"]
        for sample in self.samples:
            text = repr(sample.completion[:SHOWN_CHARACTERS]) + (
                "…" if len(sample.completion) > SHOWN_CHARACTERS else ""
            )
            reward = "no reward" if sample.reward is None else f"reward {sample.reward:g}"
            lines.append(f"  …{sample.prompt[-40:]!r} → {text} ({reward})")
        return "\n".join(lines)


class Watch:
    """Remembers the last steps of a run and tells each new diagnosis once.

    Args:
        extractor: the rule that finds answers; None when no reward extracts any.
        window: W, steps.
    """

    def __init__(self, extractor: Extractor | None, window: int = WINDOW) -> None:
        self.extractor: Extractor | None = extractor
        self._rows: deque[Row] = deque(maxlen=window)
        self._samples: deque[Sequence[Sample]] = deque(maxlen=window)
        self._last: str | None = None

    def __call__(self, row: Row, samples: Sequence[Sample]) -> Diagnosis | None:
        """Take a step's metrics and completions; return a diagnosis if there is one and the last was another."""
        self._rows.append(row)
        self._samples.append(samples)
        if len(self._rows) < (self._rows.maxlen or 0):
            return None
        found = diagnose(self._rows, [sample for step in self._samples for sample in step], self.extractor)
        changed = found is not None and found.name != self._last
        self._last = None if found is None else found.name
        return found if changed else None


def diagnose(rows: Sequence[Row], samples: Sequence[Sample], extractor: Extractor | None) -> Diagnosis | None:
    """Say why the steps of `rows` could teach nothing, or return None if at least one could.

    Args:
        rows: metrics of the last W training steps, under the names of metrics.jsonl; at least one.
        samples: completions of these steps, the more the better.
        extractor: the rule that finds answers; None when no reward extracts any.
    """
    if any("frac_reward_zero_std" not in row for row in rows):  # a step that broke off; it is told elsewhere
        return None
    has_signal = [_number(row, "frac_reward_zero_std") < 1 for row in rows]
    has_gradient = [_number(row, "grad_norm", math.nan) != 0 for row in rows]  # NaN is a fault of another kind
    if any(signal and gradient for signal, gradient in zip(has_signal, has_gradient, strict=True)):
        return None
    steps = f"the last {len(rows)} steps" if len(rows) > 1 else "the last step"
    shown = tuple(samples[:: max(1, len(samples) // SHOWN)][:SHOWN])
    for name, finding in (
        ("reward_failing", _reward_failing(rows, steps)),
        ("constant_reward", _all_solved(rows, has_signal, steps)),
        ("all_truncated", _all_truncated(rows, steps)),
        ("parser_never_matched", _parser_never_matched(samples, extractor, steps)),
        ("collapsed", _collapsed(samples, steps)),
        ("no_gradient", _no_gradient(has_signal, steps)),
        ("constant_reward", _constant_reward(rows, has_signal, steps)),
    ):
        if finding is not None:
            return Diagnosis(name, *finding, shown)
    return None


Finding = tuple[str, str] | None  # explanation, advice


def _reward_failing(rows: Sequence[Row], steps: str) -> Finding:
    if not all(math.isnan(_number(row, "reward", math.nan)) for row in rows):
        return None
    counts = {
        kind: int(sum(_number(row, name) for row in rows for name in row if name.endswith(f"/{kind}")))
        for kind in ("timeouts", "errors")
    }
    if not any(counts.values()):
        return (
            f"In {steps} no reward function applied to any completion.",
            "Return a number where None is returned now.",
        )
    what = f"{counts['timeouts']} timeouts and {counts['errors']} errors"
    return (
        f"In {steps} no completion got a score: {what}.",
        "Call the reward function by hand on a completion below, or raise train.reward_timeout.",
    )


def _all_solved(rows: Sequence[Row], has_signal: Sequence[bool], steps: str) -> Finding:
    if any(has_signal) or any(_number(row, "reward", math.nan) != 1 for row in rows):
        return None
    return f"In {steps} every completion got reward 1.", "The task is learnt: stop, or take a harder one."


def _all_truncated(rows: Sequence[Row], steps: str) -> Finding:
    if any(_number(row, "completions/clipped_ratio") < 1 for row in rows):
        return None
    return (
        f"In {steps} every completion was cut off at train.max_new_tokens before it ended.",
        "Raise train.max_new_tokens, or ask for short answers with --system or --assistant-prefix.",
    )


def _parser_never_matched(samples: Sequence[Sample], extractor: Extractor | None, steps: str) -> Finding:
    if extractor is None or not samples:
        return None
    for sample in samples:
        numeric = is_numeric_answer(sample.answer)
        if extract(sample.completion, extractor, numeric=numeric) is not None:
            return None
    return (
        f"In {steps} the rule {extractor!r} found an answer in none of {len(samples)} completions.",
        "Choose another --extract, or tell the model with --system how to write its answer.",
    )


def _collapsed(samples: Sequence[Sample], steps: str) -> Finding:
    groups: dict[str, list[str]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample.completion)
    if len(groups) > 1 and len({sample.completion for sample in samples}) == 1:
        return (
            f"In {steps} all {len(groups)} prompts got one and the same completion.",
            "The policy has collapsed: go back to an earlier checkpoint with a lower train.learning_rate.",
        )
    if groups and all(len(texts) > 1 and len(set(texts)) == 1 for texts in groups.values()):
        return (
            f"In {steps} all samples of a prompt were the same, for each of {len(groups)} prompts.",
            "The policy no longer explores: raise train.temperature, or lower train.learning_rate and start again.",
        )
    return None


def _no_gradient(has_signal: Sequence[bool], steps: str) -> Finding:
    if not all(has_signal):
        return None
    return (
        f"In {steps} rewards differed, and the gradient was exactly 0.",
        "Look for what switches it off: mask_truncated with nothing but cut-off completions, or reward_weight 0.",
    )


def _constant_reward(rows: Sequence[Row], has_signal: Sequence[bool], steps: str) -> Finding:
    if any(has_signal):
        return None
    means = [_number(row, "reward", math.nan) for row in rows]
    low, high = min(means), max(means)
    if low == high == 0:
        what, do = (
            "every completion got reward 0",
            "Take an easier task, or a reward that also tells the near from the far.",
        )
    elif low == high:
        what, do = (
            f"every completion got reward {low:g}",
            "Check the reward function: it does not look at the completion.",
        )
    else:
        what = f"no group's rewards differed (means {low:g} to {high:g})"
        do = "Raise train.group_size or train.temperature, or take prompts that are neither sure nor hopeless."
    return f"In {steps} {what}.", do


def _number(row: Row, name: str, missing: float = 0.0) -> float:
    """A metric as a float; NaN where it is null or not finite, `missing` where it is not there."""
    value = row.get(name, missing)
    return float(value) if isinstance(value, int | float) else math.nan
