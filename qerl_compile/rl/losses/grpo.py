"""The GRPO loss: clipped policy gradient, averaged over the tokens of a sequence and then over sequences.

    L = - 1/N * sum_i  1/|o_i| * sum_t  min( rho_it * A_i,  clip(rho_it, 1 - clip_low, 1 + clip_high) * A_i )

    N = sequences of the whole step,      |o_i| = completion tokens of sequence i

Source: DeepSeekMath, arXiv 2402.03300, equation 3 (with one clip bound for both sides, and the KL of equation 4).
Every sequence weighs the same, so a token of a long one weighs less: a long wrong answer is punished less per token
than a short one (arXiv 2503.20783). `dapo` and `dr_grpo` are the two ways out.

A sequence that is masked out adds 0 and counts in N, as in TRL.
"""

from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.policy import PolicyLoss, clipped_objective, policy_loss, token_ratio


def grpo(inputs: LossInputs, totals: StepTotals, options: LossOptions) -> PolicyLoss:
    """The part of one micro-batch in the step's GRPO loss."""
    ratio_BT = token_ratio(inputs)
    objective_BT = clipped_objective(ratio_BT, inputs, options)
    return policy_loss(objective_BT, ratio_BT, inputs.lengths_B1 * totals.sequences, inputs, options)
