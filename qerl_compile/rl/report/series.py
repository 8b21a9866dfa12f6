"""Curves: a metric by step, its moving mean, and what several seeds of one recipe have in common.

A step that occurs twice, in a run that was resumed, counts as its later row has it. Values that are no finite number
leave a gap. A moving mean is of the last `width` values, fewer at the start, so it never looks ahead.

The spread across seeds is shown as the range from the lowest to the highest: with three seeds a standard deviation is
itself uncertain by half, and an interval made from it would pretend to know more. Only steps that every seed has
reached enter the mean, since a mean over changing members jumps where one drops out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qerl_compile.rl.finite import finite

Points = dict[int, float]
"""Step → value, in ascending order of steps."""

SMOOTHED_OVER = 20
"""A moving mean spans 1/20 of the curve."""


@dataclass(frozen=True)
class Spread:
    """The mean of several curves, and their lowest and highest, at the steps that all of them have."""

    mean: Points
    low: Points
    high: Points


def points(rows: Iterable[Mapping[str, Any]], metric: str) -> Points:
    """The curve of a metric; rows without it, or with a value that is no finite number, have no point."""
    found: Points = {}
    for row in rows:
        if metric in row:
            number = finite(row[metric])
            if number is None:
                found.pop(row["step"], None)  # the later row holds, also when it has a gap
            else:
                found[row["step"]] = number
    return dict(sorted(found.items()))


def smoothed(curve: Points) -> Points:
    """The moving mean over a twentieth of the curve's points."""
    values, width = list(curve.values()), max(1, round(len(curve) / SMOOTHED_OVER))
    windows = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return {step: math.fsum(window) / len(window) for step, window in zip(curve, windows, strict=True)}


def spread(curves: Sequence[Points]) -> Spread:
    """Mean, lowest and highest of at least one curve."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    at = {step: [curve[step] for curve in curves] for step in steps}
    return Spread(
        {step: math.fsum(values) / len(values) for step, values in at.items()},
        {step: min(values) for step, values in at.items()},
        {step: max(values) for step, values in at.items()},
    )
