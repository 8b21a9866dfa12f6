"""The Dr. GRPO loss: clipped policy gradient, divided by a constant.

    L = - 1/(N * T_max) * sum_i sum_t  min( rho_it * A_i,  clip(rho_it, 1 - clip_low, 1 + clip_high) * A_i )

    N = sequences of the whole step,      T_max = longest completion that was allowed

Source: "Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3: the sum over tokens instead of GRPO's mean,
which favours long wrong answers; the constant T_max only sets the scale. The other half of that paper is not to divide
advantages by their deviation: `advantage_scale: none`, which this loss does not imply.

Short completions make for small losses and gradients here, whatever `max_new_tokens` is: mind the learning rate.
"""

from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.policy import PolicyLoss, clipped_objective, policy_loss, token_ratio


def dr_grpo(inputs: LossInputs, totals: StepTotals, options: LossOptions) -> PolicyLoss:
    """The part of one micro-batch in the step's Dr. GRPO loss."""
    ratio_BT = token_ratio(inputs)
    objective_BT = clipped_objective(ratio_BT, inputs, options)
    return policy_loss(objective_BT, ratio_BT, totals.sequences * totals.max_new_tokens, inputs, options)
