"""A share of right answers with its 95 % interval.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half   = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)            z = 1.96

Wilson's interval (JASA 22, 1927). The usual p ± z sqrt(p(1-p)/n) has width 0 at 0 % and 100 % and is far too narrow
for the hundred or so items of an evaluation; this one stays inside [0, 1] and covers as it says.

It speaks of the items, as a sample of all such items: the spread over training seeds is another thing, and larger.
"""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """`correct` of `total` items.

    Raises:
        ValueError: total is not positive, or correct is not in 0..total.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.correct <= self.total:
            raise ValueError(f"expected 0 <= correct <= total and total >= 1, got {self.correct} of {self.total}")

    @property
    def rate(self) -> float:
        """correct / total."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        return wilson(self.rate, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({self.correct}/{self.total})"


def wilson(rate: float, total: int) -> tuple[float, float]:
    """Lower and upper end of the 95 % interval of a share.

    Args:
        rate: the share, in [0, 1].
        total: how many items it is of, at least 1.
    """
    n, p, zz = total, rate, Z95 * Z95
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z95 / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low = 0.0 if p == 0 else centre - half  # exactly 0 and 1 in arithmetic without rounding
    high = 1.0 if p == 1 else centre + half
    return low, high
