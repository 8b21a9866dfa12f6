"""Several reward functions, one number per completion.

    total_i = sum over the functions f that apply to i of  weight_f * f_i

A function that returns None for a completion does not apply to it and is left out of its sum. If none applies the
total is NaN, and the advantage (advantages.py) of that completion is 0. This is TRL's rule.

What comes back is checked before it is used: the right number of values, each a finite number or None. NaN is an
error and never read as 0, since a reward that silently becomes 0 teaches the policy something.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qerl_compile.errors import TaskError

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Scores:
    """What the reward functions said.

    Args:
        names: the functions' names, in order.
        per_function_NF: float64 [N, F], NaN where a function does not apply.
        total_N: float64 [N], the weighted sum, NaN where no function applies.
    """

    names: tuple[str, ...]
    per_function_NF: torch.Tensor
    total_N: torch.Tensor


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
        TaskError: a function returned the wrong number of values or one that is not finite, or weights do not fit.
            An exception raised inside a function keeps its own type; the function's name is added as a note.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
        do = "Give one finite number per reward function."
        raise TaskError(where="reward weights", expected=f"{len(functions)} numbers", got=repr(weights), do=do)
    names = tuple(reward_name(function) for function in functions)
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
    values = []
    for name, function in zip(names, functions, strict=True):
        try:
            output = function(**given)
        except Exception as error:
            error.add_note(f"in the reward function {name}")
            raise
        values.append(checked(output, len(completions), where=f"reward function {name}"))
    per_function = torch.tensor(values, dtype=torch.float64).reshape(len(functions), len(completions)).T
    total = (per_function * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1)
    return Scores(names, per_function, total.masked_fill(per_function.isnan().all(dim=1), math.nan))


def checked(output: Any, count: int, *, where: str) -> list[float]:
    """A reward function's output as floats, NaN for None, or a TaskError that says what is wrong with it."""
    values = output.tolist() if hasattr(output, "tolist") else output  # a tensor or array will do
    if not isinstance(values, list | tuple):
        do = "Return a list, and do not make the function async."
        raise TaskError(where=where, expected="a list of numbers", got=type(output).__name__, do=do)
    if len(values) != count:
        do = "Return one number per completion."
        raise TaskError(where=where, expected=f"{count} values", got=f"{len(values)}", do=do)
    for i, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            do = "Return a number, or None where the reward does not apply."
            raise TaskError(where=f"{where}, completion {i}", expected="a finite number", got=repr(value), do=do)
    return [math.nan if value is None else float(value) for value in values]


def reward_name(function: RewardFunction) -> str:
    """The name under which a function's reward is logged."""
    return getattr(function, "__name__", type(function).__name__)
