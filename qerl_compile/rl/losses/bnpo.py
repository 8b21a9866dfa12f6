"""The BNPO loss: clipped policy gradient, averaged over the tokens of each micro-batch and then over micro-batches.

    L = - 1/K * sum_k  1/M_k * sum_{i,t in k}  min( rho_it * A_i,  clip(rho_it, 1 - clip_low, 1 + clip_high) * A_i )

    K = micro-batches of the whole step,      M_k = completion tokens of micro-batch k

Source: TRL's `loss_type="bnpo"`, "local batch"; what the published QeRL scripts train with. With a single micro-batch,
or micro-batches of equally many tokens, it is the DAPO loss.

This is the one loss that depends on how a step is cut, and so on `micro_batch_tokens`, on the number of ranks, and on
an out-of-memory retry with smaller pieces. It is here to repeat other people's runs; take `dapo` for new ones.
"""

from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.policy import PolicyLoss, clipped_objective, policy_loss, token_ratio


def bnpo(inputs: LossInputs, totals: StepTotals, options: LossOptions) -> PolicyLoss:
    """The part of one micro-batch in the step's BNPO loss."""
    ratio_BT = token_ratio(inputs)
    objective_BT = clipped_objective(ratio_BT, inputs, options)
    divisor = inputs.mask_BT.sum().clamp(min=1) * totals.micro_batches
    return policy_loss(objective_BT, ratio_BT, divisor, inputs, options)
