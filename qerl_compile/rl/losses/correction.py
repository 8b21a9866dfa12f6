"""Correction of the rollout/trainer mismatch: weights that make the sampler's tokens count as the trainer's.

    w = p / q,      p = trainer before any update,      q = sampler

        truncate    min(w, cap)                                       a bounded bias, nothing is left out
        mask        w where 1/cap <= w <= cap, else 0                 what is far off says nothing and is left out

Of a token, or with `level="sequence"` of a whole completion: w = exp(sum_t log p_t - log q_t), the same for all its
tokens. Sources: truncated importance sampling, FlashRL and "Your Efficient RL Framework Secretly Brings You Off-Policy
RL Training" (Yao et al., 2025); masking of both tails, IcePop (Ling team, 2025); TRL 1.16's
`vllm_importance_sampling_mode`, whose four modes are these two by two levels.

The weights multiply the loss of a token, not its ratio: clipping still compares new with old policy of the *trainer*.
With AQN the noise is part of the mismatch, so a small cap takes away some of the exploration that the noise was for.

Which is why `none` is the default of the recipe. The mismatch is measured with it all the same; its ratios are then the
raw ones.

Limits: log ratios are clamped to [-10, 10] (`guards.py`), so a cap above 22026 is no cap. A sequence ratio leaves
[1/3, 3] easily: 1000 tokens that are off by 0.002 in the same direction do it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qerl_compile.rl.losses.guards import bounded_ratio
from qerl_compile.rl.losses.mismatch import Mismatch, measure

How = Literal["none", "truncate", "mask"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Correction:
    """Weights for `LossInputs.weight_BT`, and what was measured on the way.

    Args:
        weight_BT: float32 [B, T], without gradient, 1 outside the mask; None for `how="none"`.
        mismatch: of the same tokens.
    """

    weight_BT: torch.Tensor | None
    mismatch: Mismatch


@torch.no_grad()
def correct(
    logp_BT: torch.Tensor,
    sampling_logp_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    how: How = "none",
    level: Level = "token",
    cap: float = 3.0,
) -> Correction:
    """Importance weights of one micro-batch.

    Args:
        logp_BT: float [B, T], log-probabilities under the trainer's policy before the first update on this rollout.
        sampling_logp_BT: float [B, T], recorded while sampling, of the same temperature-scaled and otherwise complete
            distribution. NaN where the engine does not know one: such a token gets difference 0, as in TRL.
        mask_BT: bool [B, T], completion tokens.
        how: what is done about ratios beyond the cap.
        level: whether a ratio is of a token or of a completion.
        cap: the largest ratio, at least 1.

    Raises:
        ValueError: shapes disagree, the mask is not boolean, or an option is unknown.
    """
    _check(logp_BT, sampling_logp_BT, mask_BT, how, level, cap)
    logp_BT, sampling_logp_BT = logp_BT.double(), sampling_logp_BT.double()
    known_BT = mask_BT & ~sampling_logp_BT.isnan()
    log_ratio = torch.where(known_BT, logp_BT - sampling_logp_BT, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    raw = weight = bounded_ratio(log_ratio)
    if how == "truncate":
        weight = raw.clamp(max=cap)
    elif how == "mask":
        weight = torch.where((raw < 1 / cap) | (raw > cap), 0.0, raw)
    corrected_BT = (weight != raw).expand_as(mask_BT)
    mismatch = measure(logp_BT, sampling_logp_BT, mask_BT, weight, corrected_BT)
    weight_BT = None if how == "none" else torch.where(mask_BT, weight, 1.0).float()
    return Correction(weight_BT, mismatch)


def _check(
    logp_BT: torch.Tensor, sampling_logp_BT: torch.Tensor, mask_BT: torch.Tensor, how: str, level: str, cap: float
) -> None:
    shapes = [tuple(tensor.shape) for tensor in (logp_BT, sampling_logp_BT, mask_BT)]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1 or mask_BT.dtype is not torch.bool:
        raise ValueError(f"expected three tensors [B, T], the mask boolean; got {shapes} and {mask_BT.dtype}")
    if how not in get_args(How) or level not in get_args(Level) or not cap >= 1:
        raise ValueError(f"expected how, level and a cap of at least 1; got {how!r}, {level!r} and {cap}")
