"""The DAPO loss: clipped policy gradient, averaged over all tokens of a step.

    L = - 1/M * sum_i sum_t  min( rho_it * A_i,  clip(rho_it, 1 - epsilon_low, 1 + epsilon_high) * A_i )

    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t),      M = completion tokens of the whole step

Source: DAPO, arXiv 2503.14476, equation 8, and QeRL, arXiv 2510.11696, section 3.1 and table 4 for 0.2 and 0.28.
Token mean: every token of a step weighs the same, so long completions are not diluted. Clip-higher: a wider bound
upwards lets unlikely right tokens grow, which keeps entropy from collapsing. There is no KL term.

M is passed in and belongs to the whole step, not to this call: the losses of micro-batches (or of ranks) then add up
to the loss of the step, and so do their gradients, however the step was cut.

On the first update after a rollout every ratio is 1, and advantages sum to 0 within a group: the *value* of the loss
is then about 0 however much there is to learn. Watch the gradient norm and `frac_reward_zero_std` instead.
"""

import torch

from qerl_compile.rl.losses.policy import PolicyLoss, TokenCounts, token_ratio


def dapo_loss(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor | None,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    step_tokens: int,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
) -> PolicyLoss:
    """Loss and clip counts of one micro-batch.

    Args:
        logp_BT: float [B, T], log-probabilities of the completion tokens, with gradient.
        old_logp_BT: float [B, T], the same under the policy that sampled; None on the first update.
        advantages_B: float [B].
        mask_BT: bool [B, T], True on completion tokens, the end token included.
        step_tokens: True entries in the masks of all micro-batches of the step together.
        epsilon_low: lower clip bound.
        epsilon_high: upper clip bound.

    Raises:
        ValueError: shapes disagree, the mask is not boolean, or the step has no tokens.
    """
    check_shapes(logp_BT, old_logp_BT, advantages_B, mask_BT, step_tokens)
    ratio_BT = token_ratio(logp_BT, old_logp_BT, mask_BT)
    advantages_B1 = advantages_B.float()[:, None]
    clipped_BT = ratio_BT.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    loss = -torch.where(mask_BT, objective_BT, 0.0).sum() / step_tokens
    low_BT = mask_BT & (ratio_BT < 1 - epsilon_low) & (advantages_B1 < 0)
    high_BT = mask_BT & (ratio_BT > 1 + epsilon_high) & (advantages_B1 > 0)
    return PolicyLoss(loss, TokenCounts(mask_BT.sum(), low_BT.sum(), high_BT.sum()))


def check_shapes(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor | None,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    step_tokens: int,
) -> None:
    """Refuse shapes that broadcasting would accept and get wrong."""
    shape = tuple(logp_BT.shape)
    old = shape if old_logp_BT is None else tuple(old_logp_BT.shape)
    if len(shape) != 2 or old != shape or tuple(mask_BT.shape) != shape or tuple(advantages_B.shape) != shape[:1]:
        shapes = f"logp {shape}, old {old}, advantages {tuple(advantages_B.shape)}, mask {tuple(mask_BT.shape)}"
        raise ValueError(f"expected [B, T], [B, T], [B] and [B, T]; got {shapes}")
    if mask_BT.dtype is not torch.bool:
        raise ValueError(f"expected a boolean mask, got {mask_BT.dtype}")
    if step_tokens < 1:
        raise ValueError(f"expected at least one token in the step, got step_tokens {step_tokens}")
