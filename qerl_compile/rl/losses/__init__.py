"""Policy losses, one per file, all with the signature of `dapo.dapo_loss` (see `policy.py`)."""

from qerl_compile.rl.losses.dapo import dapo_loss
from qerl_compile.rl.losses.policy import PolicyLoss, TokenCounts

__all__ = ["PolicyLoss", "TokenCounts", "dapo_loss"]
