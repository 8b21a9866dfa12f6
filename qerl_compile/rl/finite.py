"""Whether a metric's value is a number that can be drawn: the one question that every reader of metrics asks."""

import math


def finite(value: object) -> float | None:
    """`value` as a float; None for text, booleans, None, NaN, infinities and integers beyond a float's range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
