"""What every policy loss shares: the probability ratio, clipping, and the sum over tokens.

    loss = sum_it  ( -w_it * objective_it + kl_weight * kl_it ) / divisor_i

A loss file chooses the ratio (of a token or of a sequence), the objective made from it and the divisor; weights, KL
term and masks are the same for all and live here.

The weights w (rollout/trainer mismatch) do not touch the KL term: as in TRL, which adds it afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qerl_compile.rl.losses.counts import TokenCounts
from qerl_compile.rl.losses.guards import bounded_ratio
from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.kl import k3


@dataclass(frozen=True)
class PolicyLoss:
    """A loss to call backward on, a scalar, and the counts of its tokens.

    The loss is float32, or float64 for float64 log-probabilities. It is a part of the step's loss: add, never average.
    """

    loss: torch.Tensor
    counts: TokenCounts


Loss = Callable[[LossInputs, StepTotals, LossOptions], PolicyLoss]


def token_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """New minus old log-probability, [B, T], with gradient; 0 outside the mask, not yet clamped."""
    old_logp_BT = inputs.logp_BT if inputs.old_logp_BT is None else inputs.old_logp_BT
    return inputs.masked(inputs.logp_BT.to(inputs.dtype) - old_logp_BT.detach().to(inputs.dtype))


def token_ratio(inputs: LossInputs) -> torch.Tensor:
    """Clamped probability ratios of tokens, [B, T]; 1 outside the mask."""
    return bounded_ratio(token_log_ratio(inputs))


def sequence_ratio(inputs: LossInputs) -> torch.Tensor:
    """Clamped geometric means of the tokens' ratios, [B, 1]; 1 for a sequence without tokens."""
    mean_B1 = token_log_ratio(inputs).sum(dim=1, keepdim=True) / inputs.lengths_B1
    return bounded_ratio(mean_B1)


def clipped_objective(ratio: torch.Tensor, inputs: LossInputs, options: LossOptions) -> torch.Tensor:
    """min(rho * A, clip(rho) * A) in the shape of `ratio`; with `clip_delta`, rho is bounded by it in the first term.

    Args:
        ratio: [B, T] of tokens or [B, 1] of sequences.
        inputs: for the advantages.
        options: the bounds.
    """
    advantages_B1 = inputs.advantages_B1
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    bounded = ratio if options.clip_delta is None else ratio.clamp(max=options.clip_delta)
    return torch.minimum(bounded * advantages_B1, clipped * advantages_B1)


def policy_loss(
    objective: torch.Tensor,
    ratio: torch.Tensor,
    divisor: float | torch.Tensor,
    inputs: LossInputs,
    options: LossOptions,
    *,
    one_sided: bool = False,
) -> PolicyLoss:
    """Weigh, add the KL term, mask, divide and sum; count what was clipped.

    Args:
        objective: what is to grow, [B, T] of tokens or [B, 1] of sequences.
        ratio: in the same shape.
        divisor: of each token's loss, a number or [B, 1]; not 0.
        inputs: the tokens.
        options: the weight of the KL and the clip bounds.
        one_sided: the objective has no lower clip bound, so none is counted.

    Raises:
        ValueError: there is a KL weight and no reference.
    """
    loss_BT = -objective.expand_as(inputs.mask_BT)
    if inputs.weight_BT is not None:
        loss_BT = loss_BT * inputs.masked(inputs.weight_BT.detach())
    kl = None
    if inputs.reference_logp_BT is not None:
        kl_BT = k3(inputs.logp_BT.to(inputs.dtype), inputs.reference_logp_BT, inputs.mask_BT)
        kl = kl_BT.detach().sum()
        if options.kl_weight:
            loss_BT = loss_BT + options.kl_weight * (kl_BT * ratio if options.kl_unbiased else kl_BT)
    elif options.kl_weight:
        raise ValueError(f"expected reference_logp_BT with kl_weight {options.kl_weight}, got None")
    loss = (inputs.masked(loss_BT) / divisor).sum()
    lowest = 0.0 if one_sided else 1 - options.clip_low  # no ratio is below 0
    return PolicyLoss(loss, _counts(ratio.detach(), inputs, lowest, 1 + options.clip_high, kl))


def _counts(
    ratio: torch.Tensor, inputs: LossInputs, lowest: float, highest: float, kl: torch.Tensor | None
) -> TokenCounts:
    is_token = ratio.shape == inputs.mask_BT.shape
    counted = inputs.mask_BT if is_token else inputs.mask_BT.any(dim=1, keepdim=True)
    low = counted & (ratio < lowest) & (inputs.advantages_B1 < 0)
    high = counted & (ratio > highest) & (inputs.advantages_B1 > 0)
    return TokenCounts(inputs.mask_BT.sum(), counted.sum(), low.sum(), high.sum(), kl)
