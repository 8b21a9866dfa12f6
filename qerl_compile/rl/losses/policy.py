"""What every policy loss shares: the probability ratio, and counts of clipped tokens.

The ratio of a token is exp(new - old log-probability). Two guards keep a bad token from spoiling a step:
* the difference is clamped to [-10, 10] before exp, so a ratio is at most 22026 (torchtitan clamps at the same value).
  Beyond it the gradient is zero, which is what clipping does long before for all but positive ratios with negative
  advantage;
* tokens outside the mask are replaced *before* exp. Multiplying by a zero mask afterwards would turn an infinite or
  NaN padding value into a NaN gradient.

Counts are sums over tokens, not means, so micro-batches of unequal length add up exactly.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

MAX_LOG_RATIO = 10.0


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a batch and how many were clipped; `total` over micro-batches gives a step's.

    The counts stay int64 scalars on the loss's device until `metrics` is called, so that counting never waits for it.

    Args:
        tokens: tokens in the mask.
        clipped_low: ratio below 1 - epsilon_low with negative advantage.
        clipped_high: ratio above 1 + epsilon_high with positive advantage.
    """

    tokens: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            self.tokens + other.tokens,
            self.clipped_low + other.clipped_low,
            self.clipped_high + other.clipped_high,
        )

    @staticmethod
    def total(parts: "Iterable[TokenCounts]") -> "TokenCounts":
        """The counts of a step from those of its micro-batches, at least one."""
        return reduce(add, parts)

    def metrics(self) -> dict[str, float]:
        """TRL's clip metrics: shares of all tokens."""
        tokens, low, high = max(int(self.tokens), 1), int(self.clipped_low), int(self.clipped_high)
        return {
            "clip_ratio/low_mean": low / tokens,
            "clip_ratio/high_mean": high / tokens,
            "clip_ratio/region_mean": (low + high) / tokens,
        }


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to call backward on (a float32 scalar) and the token counts of its batch."""

    loss: torch.Tensor
    counts: TokenCounts


def token_ratio(logp_BT: torch.Tensor, old_logp_BT: torch.Tensor | None, mask_BT: torch.Tensor) -> torch.Tensor:
    """Clamped probability ratios, float32 [B, T]; 1 outside the mask.

    Args:
        logp_BT: log-probabilities under the policy being trained, with gradient.
        old_logp_BT: those under the policy that sampled; None when it is the same one (ratio 1, gradient kept).
        mask_BT: bool [B, T], True on completion tokens, the end token included.
    """
    old_logp_BT = logp_BT if old_logp_BT is None else old_logp_BT
    difference_BT = torch.where(mask_BT, logp_BT.float() - old_logp_BT.detach().float(), 0.0)
    return difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
