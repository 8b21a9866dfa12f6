"""avg@n and pass@k of n samples per item, with 95 % intervals that know which samples belong together.

    avg@n  = mean over items of  c / n
    pass@k = mean over items of  1 - C(n - c, k) / C(n, k)           c of the item's n samples are right, k <= n

The second is the unbiased estimator of Chen et al. (arXiv 2107.03374, equation 1): the share of the k-subsets of an
item's samples that hold a right one. `1 - (1 - c/n)^k`, which is seen often, is too low. avg@n estimates pass@1.

Samples of one item are alike: an easy item is right eight times of eight. Their n * I answers are not so many
independent ones, and an interval that takes them for it is far too narrow. So the interval is of the mean of I item
values, by the bootstrap over items (whole items are drawn with replacement: Efron and Tibshirani 1993, chapter 13;
for evaluations of language models Miller, arXiv 2411.00640). It is seeded, so the same answers give the same interval.
Where all items have one value there is nothing to resample and the bootstrap would claim certainty; there the interval
is Wilson's of that rate on I items, which is wider than the truth and never narrower.

Like Proportion's, these intervals speak of the items, not of training seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch

from qerl_compile.rl.proportions import wilson
from qerl_compile.rl.seeds import derive_seed

RESAMPLES = 2000
DRAWN_AT_ONCE = 2**20  # indices: 8 MB


@dataclass(frozen=True)
class Mean:
    """The mean of item values in [0, 1], with its 95 % interval over items."""

    value: float
    low: float
    high: float

    def metrics(self, name: str) -> dict[str, float]:
        """Return the mean and the interval's ends as `name`, `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that at least one of k samples, drawn from an item's without replacement, is right.

    Args:
        samples: n, how many the item has.
        right: c, how many of them are right.
        k: 1 <= k <= n.

    Raises:
        ValueError: the numbers do not fit each other.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"expected 0 <= right <= samples and 1 <= k <= samples, got {right}, {samples}, k = {k}")
    return 1 - comb(samples - right, k) / comb(samples, k)


def mean_over_items(values_I: Sequence[float]) -> Mean:
    """The mean of the items' values with the interval described above.

    Args:
        values_I: one number in [0, 1] per item, at least one.

    Raises:
        ValueError: there is none, or one is out of range.
    """
    if not values_I or not all(0 <= value <= 1 for value in values_I):
        raise ValueError(f"expected at least one value, each in [0, 1], got {list(values_I)[:8]}")
    items = len(values_I)
    mean = sum(values_I) / items
    if min(values_I) == max(values_I):
        return Mean(values_I[0], *wilson(values_I[0], items))
    item_values = torch.tensor(values_I, dtype=torch.float64)
    generator = torch.Generator().manual_seed(derive_seed("bootstrap", items))
    rows, means = max(1, DRAWN_AT_ONCE // items), []
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), items)
        means.append(item_values[torch.randint(items, shape, generator=generator)].mean(dim=1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Mean(mean, low, high)
