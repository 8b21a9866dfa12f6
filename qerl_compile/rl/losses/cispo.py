"""The CISPO loss: REINFORCE with a capped ratio as the weight, averaged over all tokens of a step.

    L = - 1/M * sum_i sum_t  sg( min(rho_it, 1 + clip_high) ) * A_i * log pi(o_it | q, o_i<t)

    sg = no gradient,      rho_it = pi / pi_old of the token,      M = completion tokens of the whole step

Source: MiniMax-M1, arXiv 2506.13585, equations 4 and 5, without the lower bound, which the authors did not use either.
Clipping the objective takes the gradient of a clipped token away, and that hits rare tokens at forks of a reasoning.
Here only the weight is capped, and every token keeps its gradient.

`clip_high` is counted from 1 as in the paper and as in our other losses. TRL's `epsilon_high` is the cap itself, so our
4.0 is its 5.0, which ScaleRL (arXiv 2510.13786) recommends. `clip_low` and `clip_delta` have no part in it.

The value of this loss contains log pi itself and is not near 0 on the first update; only its gradient means anything.
"""

from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.policy import PolicyLoss, policy_loss, token_ratio


def cispo(inputs: LossInputs, totals: StepTotals, options: LossOptions) -> PolicyLoss:
    """The part of one micro-batch in the step's CISPO loss."""
    ratio_BT = token_ratio(inputs)
    weight_BT = ratio_BT.detach().clamp(max=1 + options.clip_high)
    objective_BT = weight_BT * inputs.advantages_B1 * inputs.masked(inputs.logp_BT)
    return policy_loss(objective_BT, ratio_BT, max(totals.tokens, 1), inputs, options, one_sided=True)
