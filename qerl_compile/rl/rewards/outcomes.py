"""The three things that can come of scoring one completion: a score, a timeout, an error.

They are never merged. A timeout read as 0 teaches the policy that such an answer is wrong, an error read as 0 teaches
it whatever the bug says, and both look like learning. So only a score carries a number (or None for "not applicable",
TRL's word for a function that has nothing to say); the other two carry a message, take the completion out of its
group, and are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Kind = Literal["score", "timeout", "error"]


@dataclass(frozen=True)
class Outcome:
    """What one function made of one completion.

    Args:
        kind: "score", "timeout" or "error".
        value: the score, finite, or None for not applicable; None unless `kind` is "score".
        message: why there is no score; empty if `kind` is "score".
    """

    kind: Kind
    value: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Outcomes:
    """What one function made of a batch.

    Args:
        each: one outcome per completion.
        metrics: what the function gave to `log_metric`, name -> values in order.
        extras: what it gave to `log_extra`, column -> one value per completion, None where it gave none.
        repeats: calls for one completion alone, made because the call for the whole batch failed.
    """

    each: tuple[Outcome, ...]
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    repeats: int = 0


@runtime_checkable
class GivesOutcomes(Protocol):
    """A reward function that tells the three outcomes apart by itself."""

    def outcomes(self, count: int, given: Mapping[str, Any]) -> Outcomes:
        """Score `count` completions; `given` holds the keywords of TRL's call, lists of that length."""
        ...
