"""The GSPO loss: one ratio a sequence, clipped, averaged over sequences.

    L = - 1/N * sum_i  min( s_i * A_i,  clip(s_i, 1 - clip_low, 1 + clip_high) * A_i )

    s_i = exp( 1/|o_i| * sum_t log( pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t) ) )      N = sequences of the step

Source: GSPO, arXiv 2507.18071, equations 5 and 7. A reward belongs to a sequence, so the ratio does too; its geometric
mean over tokens takes out the length. Whole sequences are clipped, and the gradient flows through s_i to every token.

The mean over tokens stays near 1: the paper clips at 3e-4 and 4e-4. With the recipe's defaults, 0.2 and 0.28, hardly
anything is ever clipped: set `clip_low` and `clip_high` with this loss.

Token weights and the KL term are averaged over a sequence's tokens, as in `grpo` and as in TRL, where this loss is
`loss_type="grpo", importance_sampling_level="sequence"`. Clip ratios are shares of sequences.
"""

from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.policy import PolicyLoss, clipped_objective, policy_loss, sequence_ratio


def gspo(inputs: LossInputs, totals: StepTotals, options: LossOptions) -> PolicyLoss:
    """The part of one micro-batch in the step's GSPO loss."""
    ratio_B1 = sequence_ratio(inputs)
    objective_B1 = clipped_objective(ratio_B1, inputs, options)
    return policy_loss(objective_B1, ratio_B1, inputs.lengths_B1 * totals.sequences, inputs, options)
