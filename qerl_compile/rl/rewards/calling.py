"""One call of a reward function: TRL's keywords go in, a list of checked numbers comes out.

The interface is TRL 1.16's (`GRPOTrainer._calculate_rewards`): `prompts`, `completions`, `completion_ids` and every
column as keywords, and three helpers.
* `trainer_state` is None: this is not a transformers Trainer. Functions that read it must allow for that.
* `log_metric(name, value)` keeps a number; the values of a step are averaged into the metrics under that name.
* `log_extra(column, values)` keeps one value per completion, for the table of samples.

A function may be `async def`: what it returns is awaited here, in an event loop of its own.

What comes back is checked before it is used. A value must be a finite number or None. Python's, numpy's and torch's
numbers and booleans will do; text, NaN and infinity will not, since a reward that silently becomes 0 teaches the
policy something. A list of the wrong length or no list at all is a fault of the function, not of a completion.
"""

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.wording import shown

RewardFunction = Callable[..., Any]
Completion = str | list[dict[str, str]]


def completion_text(completion: Completion) -> str:
    """What the model wrote, whether it came as text or as messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def reward_name(function: RewardFunction) -> str:
    """The name under which a function's reward is logged."""
    return getattr(function, "__name__", type(function).__name__)


class Remarks:
    """What a function says besides its scores, through the two helpers that TRL passes.

    Args:
        count: completions in the batch.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number; those of one name are averaged over the step."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep one value per completion; numbers, booleans and None as they are, anything else as text."""
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}, ...) needs {self.count} values, one per completion")
        self.extras[str(column)] = [
            value if isinstance(value, bool | int | float) else text_or_none(value) for value in values
        ]


def call(function: RewardFunction, count: int, given: Mapping[str, Any]) -> tuple[Any, Remarks]:
    """Call with TRL's keywords; return what came back, unchecked, and the remarks. Exceptions pass through."""
    remarks = Remarks(count)
    output = function(**given, trainer_state=None, log_metric=remarks.log_metric, log_extra=remarks.log_extra)
    return (settled(output) if inspect.isawaitable(output) else output), remarks


def settled(output: Awaitable[Any]) -> Any:
    """The result of what an `async def` function returned."""
    import asyncio  # as the next line: 35 ms at the start of every worker, for the few that need it
    from concurrent.futures import ThreadPoolExecutor

    async def wait() -> Any:
        return await output

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # the caller is inside a loop, as in a notebook: a second one needs a thread
        return pool.submit(asyncio.run, wait()).result()


def as_list(output: Any, count: int, *, where: str) -> list[Any]:
    """A function's output as a list of `count` values, which are not looked at.

    Raises:
        TaskError: it is no list, tuple, array or tensor, or its length is another.
    """
    values = output.tolist() if hasattr(output, "tolist") else output
    if not isinstance(values, list | tuple):
        do = "Return a list with one number per completion."
        raise TaskError(where=where, expected="a list of numbers", got=type(output).__name__, do=do)
    if len(values) != count:
        do = "Return one number per completion."
        raise TaskError(where=where, expected=f"{count} values", got=f"{len(values)}", do=do)
    return list(values)


def as_number(value: Any, *, where: str) -> float | None:
    """One value of a function's list as a finite float, or None for not applicable.

    Raises:
        TaskError: it is neither.
    """
    if value is None:
        return None
    single = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    try:
        number = float(single) if isinstance(single, Real) else math.nan
    except OverflowError:  # an integer above 1.8e308
        number = math.inf
    if math.isfinite(number):
        return number
    do = "Return a number, or None where the reward does not apply."
    raise TaskError(where=where, expected="a finite number", got=described(value), do=do)


def described(value: Any) -> str:
    """The value in a few words, also if its `repr` fails, as a stranger's may."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print more than 4300 digits
    try:
        return shown(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be printed"


def text_or_none(value: Any) -> str | None:
    """None, or at most 10,000 characters of the value as text."""
    if value is None:
        return None
    return value[:10_000] if isinstance(value, str) else described(value)
