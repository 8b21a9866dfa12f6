"""What a policy loss counts on the side: clipped tokens and the KL divergence, under TRL's names.

Counts are sums over tokens and not means, so those of micro-batches of unequal length, and of ranks, add up exactly.
They stay scalars on the loss's device until `metrics` is called: counting never waits for the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch


@dataclass(frozen=True)
class TokenCounts:
    """Counts of one micro-batch; `total` over micro-batches gives a step's.

    Args:
        tokens: tokens in the mask.
        clippable: what has a ratio: the tokens, or for `gspo` the sequences that have any.
        clipped_low: ratio below the lower bound with negative advantage.
        clipped_high: ratio above the upper bound with positive advantage.
        kl: sum of the tokens' KL estimates (k3), in nats; None without a reference.
    """

    tokens: torch.Tensor
    clippable: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor
    kl: torch.Tensor | None = None

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts.from_vector(self.vector() + other.vector())

    @staticmethod
    def total(parts: "Iterable[TokenCounts]") -> "TokenCounts":
        """The counts of a step from those of its micro-batches, at least one; all with a reference, or none."""
        return reduce(add, parts)

    def vector(self) -> torch.Tensor:
        """All counts as float64 [4], or [5] with `kl`, to be summed over ranks."""
        values = (self.tokens, self.clippable, self.clipped_low, self.clipped_high, self.kl)
        return torch.stack([value.double() for value in values if value is not None])

    @staticmethod
    def from_vector(vector: torch.Tensor) -> "TokenCounts":
        """The inverse of `vector`."""
        return TokenCounts(*vector.unbind())

    def metrics(self) -> dict[str, float]:
        """TRL's clip metrics, as shares of what has a ratio, and the mean KL of a token if there is a reference."""
        tokens, clippable, low, high, *kl = self.vector().tolist()
        clippable = max(clippable, 1)
        metrics = {
            "clip_ratio/low_mean": low / clippable,
            "clip_ratio/high_mean": high / clippable,
            "clip_ratio/region_mean": (low + high) / clippable,
        }
        return metrics | ({"kl": kl[0] / max(tokens, 1)} if kl else {})
