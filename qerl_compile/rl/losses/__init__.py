"""Policy losses, one per file, all with one signature: `LOSSES[name](inputs, totals, options)`.

    inputs = LossInputs(logp_BT, old_logp_BT, advantages_B, mask_BT, weight_BT, reference_logp_BT)
    totals = StepTotals(tokens, sequences, micro_batches, max_new_tokens)     of the whole step, all ranks
    part = LOSSES["dapo"](inputs, totals, LossOptions(clip_low=0.2, clip_high=0.28))
    part.loss.backward()                                    gradients of micro-batches and ranks add up
    TokenCounts.total([part.counts, ...]).metrics()         counts do too

`inputs.py` says what goes in, `policy.py` what the losses share, `correction.py` where weights come from.
"""

from qerl_compile.rl.losses.bnpo import bnpo
from qerl_compile.rl.losses.cispo import cispo
from qerl_compile.rl.losses.correction import Correction, correct
from qerl_compile.rl.losses.counts import TokenCounts
from qerl_compile.rl.losses.dapo import dapo
from qerl_compile.rl.losses.dr_grpo import dr_grpo
from qerl_compile.rl.losses.grpo import grpo
from qerl_compile.rl.losses.gspo import gspo
from qerl_compile.rl.losses.inputs import LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.mismatch import Mismatch
from qerl_compile.rl.losses.policy import Loss, PolicyLoss

LOSSES: dict[str, Loss] = {
    "bnpo": bnpo,
    "cispo": cispo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "grpo": grpo,
    "gspo": gspo,
}

__all__ = [
    "LOSSES",
    "Correction",
    "Loss",
    "LossInputs",
    "LossOptions",
    "Mismatch",
    "PolicyLoss",
    "StepTotals",
    "TokenCounts",
    "correct",
]
