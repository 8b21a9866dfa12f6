"""The DAPO loss: clipped policy gradient, averaged over all tokens of a step.

    L = - 1/M * sum_i sum_t  min( rho_it * A_i,  clip(rho_it, 1 - clip_low, 1 + clip_high) * A_i )

    rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t),      M = completion tokens of the whole step

Source: DAPO, arXiv 2503.14476, equation 8, and QeRL, arXiv 2510.11696, section 3.1 and table 4 for 0.2 and 0.28.
Token mean: every token of a step weighs the same, so long completions are not diluted. Clip-higher: a wider bound
upwards lets unlikely right tokens grow, which keeps entropy from collapsing. The paper has no KL term.

On the first update after a rollout every ratio is 1, and advantages sum to 0 within a group: the *value* of the loss
is then about 0 however much there is to learn. Watch the gradient norm and `frac_reward_zero_std` instead.
"""

from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.policy import PolicyLoss, clipped_objective, policy_loss, token_ratio


def dapo(inputs: LossInputs, totals: StepTotals, options: LossOptions) -> PolicyLoss:
    """The part of one micro-batch in the step's DAPO loss."""
    ratio_BT = token_ratio(inputs)
    objective_BT = clipped_objective(ratio_BT, inputs, options)
    return policy_loss(objective_BT, ratio_BT, max(totals.tokens, 1), inputs, options)
