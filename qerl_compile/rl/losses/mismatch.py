"""How far the sampler's log-probabilities are from the trainer's, in numbers that add up.

The sampler drew the tokens from q; the trainer, before any update, gives them p. They differ by kernels (4-bit rollouts
against dequantised training), by batch shape, and by the noise, which only the rollout has. Over completion tokens:

    difference       |log p - log q|, mean and max                                                    (TRL's names)
    mismatch_kl/k1   mean of log q - log p: estimates KL(q || p), unbiased, may be negative on few tokens
    mismatch_kl/k3   mean of exp(d) - d - 1 with d = log p - log q: the same, never negative, with less variance
    ratio            p / q, or the weights made of it (`correction.py`): min, mean, max               (TRL's names)

Both estimators: Schulman, "Approximating KL Divergence" (2020). Both log-probabilities must be of the
temperature-scaled distribution without top-k or top-p, or the ratio is off by the mass that was cut away (TRL #6789).

Numbers of micro-batches are combined with `+`, those of ranks by reducing `sums` and `peaks`. Tokens whose sampling
log-probability is NaN (unknown to the engine) are left out of differences and KL, as in TRL.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from qerl_compile.rl.losses.kl import k3


@dataclass(frozen=True)
class Mismatch:
    """Mismatch of some tokens: float64 on the device of the log-probabilities until `metrics` is called.

    Args:
        sums: [8], to be added over micro-batches and ranks: tokens compared, their |difference|, k1, k3; ratios, their
            total; tokens in the mask, and those of them whose weight was truncated or set to 0.
        peaks: [3], of which the maximum is taken: |difference|, ratio, minus ratio; -inf where there is none.
    """

    sums: torch.Tensor
    peaks: torch.Tensor

    def __add__(self, other: "Mismatch") -> "Mismatch":
        return Mismatch(self.sums + other.sums, torch.maximum(self.peaks, other.peaks))

    @staticmethod
    def total(parts: "Iterable[Mismatch]") -> "Mismatch":
        """The mismatch of a step from that of its micro-batches; of none, as on a rank without rows, on the CPU."""
        parts = list(parts)
        if not parts:
            return Mismatch(torch.zeros(8, dtype=torch.float64), torch.full((3,), -torch.inf, dtype=torch.float64))
        return reduce(add, parts)

    def metrics(self) -> dict[str, float]:
        """Means, extremes and the share of corrected tokens; 0 where there is nothing to compare, as in TRL."""
        compared, difference, k1, k3_sum, ratios, ratio_sum, tokens, corrected = self.sums.tolist()
        largest_difference, largest, minus_smallest = self.peaks.tolist()
        compared_or_1, ratios_or_1 = max(compared, 1), max(ratios, 1)
        return {
            "sampling/sampling_logp_difference/mean": difference / compared_or_1,
            "sampling/sampling_logp_difference/max": largest_difference if compared else 0.0,
            "sampling/mismatch_kl/k1": k1 / compared_or_1,
            "sampling/mismatch_kl/k3": k3_sum / compared_or_1,
            "sampling/importance_sampling_ratio/min": -minus_smallest if ratios else 0.0,
            "sampling/importance_sampling_ratio/mean": ratio_sum / ratios_or_1,
            "sampling/importance_sampling_ratio/max": largest if ratios else 0.0,
            "sampling/corrected_tokens": corrected / max(tokens, 1),
        }


def measure(
    logp_BT: torch.Tensor,
    sampling_logp_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    ratio: torch.Tensor,
    corrected_BT: torch.Tensor,
) -> Mismatch:
    """The mismatch of one micro-batch.

    Args:
        logp_BT: float64 [B, T], the trainer's, without gradient.
        sampling_logp_BT: float64 [B, T], the sampler's; NaN where unknown.
        mask_BT: bool [B, T], completion tokens.
        ratio: [B, T] of tokens, or [B, 1] of sequences.
        corrected_BT: bool [B, T], tokens whose weight was truncated or set to 0.
    """
    compared_BT = mask_BT & ~sampling_logp_BT.isnan()
    difference_BT = torch.where(compared_BT, sampling_logp_BT - logp_BT, 0.0)
    counted = mask_BT if ratio.shape == mask_BT.shape else mask_BT.any(dim=1, keepdim=True)
    sums = (
        compared_BT.sum(),
        difference_BT.abs().sum(),
        difference_BT.sum(),
        k3(sampling_logp_BT, logp_BT, compared_BT).sum(),
        counted.sum(),
        torch.where(counted, ratio, 0.0).sum(),
        mask_BT.sum(),
        (corrected_BT & mask_BT).sum(),
    )
    peaks = (_peak(difference_BT.abs(), compared_BT), _peak(ratio, counted), _peak(-ratio, counted))
    return Mismatch(torch.stack([value.double() for value in sums]), torch.stack([peak.double() for peak in peaks]))


def _peak(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    return torch.where(counted, values, float("-inf")).max()
