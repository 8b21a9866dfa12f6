"""Whether a metric's value is a number that can be drawn: the one question that every reader of metrics asks.

A row of metrics.jsonl has text, booleans and None beside numbers, and NaN where a run went wrong. The report and the
sinks leave out the same ones, so they ask here. A boolean is an int to Python and no point of a curve; an integer can
be too large for a float.

What this module does not do: read numbers from text, or unpack tensors (sinks.py).
"""

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
