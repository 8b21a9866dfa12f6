"""Several reward functions, one number per completion.

    total_i = sum over the functions f that apply to i of  weight_f * f_i

A function that returns None for a completion does not apply to it and is left out of its sum. If none applies the
total is NaN, and the advantage (advantages.py) of that completion is 0. This is TRL's rule.

A function that ran out of time or failed on completion i leaves its total NaN too, whatever the others say: half a sum
is not comparable with the whole sums of its group. So the completion gets advantage 0 and takes no part in its group's
mean and deviation. `Scores` counts such failures; if a function failed on every completion there is nothing to learn
from, and that is an error.

Functions in this process (Python objects given to the trainer) are trusted to end. Their exceptions and wrong values
are raised, as errors in the user's own program.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards.calling import RewardFunction, as_list, as_number, call, reward_name
from qerl_compile.rl.rewards.outcomes import GivesOutcomes, Kind, Outcome, Outcomes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Failure:
    """One completion for which one function has no score.

    Args:
        function: its name.
        completion: index into the N completions.
        kind: "timeout" or "error".
        message: what happened.
    """

    function: str
    completion: int
    kind: Kind
    message: str


@dataclass(frozen=True)
class Scores:
    """What the reward functions said.

    Args:
        names: the functions' names, in order.
        per_function_NF: float64 [N, F], NaN where a function does not apply or failed.
        total_N: float64 [N], the weighted sum, NaN where no function applies or any failed.
        failures: the timeouts and errors.
        metrics: what functions gave to `log_metric`, each name averaged over its values.
        extras: what they gave to `log_extra`, column -> N values, None where there is none.
        repeats: calls for single completions that followed a failed call for all, by function.
    """

    names: tuple[str, ...]
    per_function_NF: "torch.Tensor"
    total_N: "torch.Tensor"
    failures: tuple[Failure, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    repeats: Mapping[str, int] = field(default_factory=dict)

    def count(self, name: str, kind: Kind) -> int:
        """How many completions ended as `kind` ("timeout" or "error") in the function `name`."""
        return sum(failure.function == name and failure.kind == kind for failure in self.failures)


def score(
    functions: Sequence[RewardFunction],
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    weights: Sequence[float] | None = None,
) -> Scores:
    """Call every function and add up.

    Args:
        functions: at least one.
        prompts: N prompts as in the rows, one per completion.
        completions: N completions, strings or lists of messages.
        completion_ids: N lists of token ids, the end token included.
        columns: the other columns of the N rows.
        weights: one finite factor per function; all 1 when None.

    Raises:
        TaskError: weights do not fit, a function has a score for no completion because of timeouts and errors, or a
            function in this process returned the wrong number of values or one that is not finite.
            An exception raised inside a function in this process keeps its own type; the function's name is added as
            a note.
    """
    import torch  # not at the top: the processes of rewards import this package and have no use for it

    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
        do = "Give one finite number per reward function."
        raise TaskError(where="reward weights", expected=f"{len(functions)} numbers", got=repr(weights), do=do)
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
    found = [ask(function, len(completions), given) for function in functions]
    names = tuple(reward_name(function) for function in functions)
    per_function = torch.tensor(
        [[math.nan if each.value is None else each.value for each in outcomes.each] for outcomes in found],
        dtype=torch.float64,
    )
    per_function = per_function.reshape(len(functions), len(completions)).T
    failures = tuple(
        Failure(name, i, outcome.kind, outcome.message)
        for name, outcomes in zip(names, found, strict=True)
        for i, outcome in enumerate(outcomes.each)
        if outcome.kind != "score"
    )
    failed_N = torch.zeros(len(completions), dtype=torch.bool)
    failed_N[[failure.completion for failure in failures]] = True
    total = (per_function * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1)
    total = total.masked_fill(per_function.isnan().all(dim=1) | failed_N, math.nan)
    repeats = {name: outcomes.repeats for name, outcomes in zip(names, found, strict=True)}
    return Scores(names, per_function, total, failures, averaged(found), joined(found), repeats)


def ask(function: RewardFunction, count: int, given: Mapping[str, Any]) -> Outcomes:
    """One function's outcomes, of which at least one is a score."""
    where = f"reward function {reward_name(function)}"
    if not isinstance(function, GivesOutcomes):
        try:
            output, remarks = call(function, count, given)
        except Exception as error:
            error.add_note(f"in the reward function {reward_name(function)}")
            raise
        values = [
            as_number(value, where=f"{where}, completion {i}")
            for i, value in enumerate(as_list(output, count, where=where))
        ]
        return Outcomes(tuple(Outcome("score", value) for value in values), remarks.metrics, remarks.extras)
    outcomes = function.outcomes(count, given)
    kinds = Counter(outcome.kind for outcome in outcomes.each)
    if count and not kinds["score"]:
        raise TaskError(
            where=where,
            expected="a score for at least one completion of the step",
            got=f"{kinds['timeout']} timeouts and {kinds['error']} errors; the first: {outcomes.each[0].message}",
            do="Correct the function, or give it more time with train.reward_timeout.",
        )
    return outcomes


def averaged(found: Sequence[Outcomes]) -> dict[str, float]:
    """The mean of what was logged under each name, over all functions."""
    values: dict[str, list[float]] = {}
    for outcomes in found:
        for name, more in outcomes.metrics.items():
            values.setdefault(name, []).extend(more)
    return {name: sum(each) / len(each) for name, each in values.items()}


def joined(found: Sequence[Outcomes]) -> dict[str, list[Any]]:
    """The columns of all functions; of two with one name, the later function's."""
    return {column: values for outcomes in found for column, values in outcomes.extras.items()}
