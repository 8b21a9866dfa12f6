"""Advantages: how much better a completion was than the others to the same prompt.

    A_i = (r_i - mean(group)) / (std(group) + 1e-4)          (GRPO, arXiv 2402.03300; epsilon as in TRL)

`std` is the sample standard deviation (division by n - 1), as in TRL. `scale="batch"` divides by the deviation of the
whole batch instead, and `scale="none"` does not divide (Dr. GRPO, arXiv 2503.20783: dividing favours questions whose
answers are nearly all right or nearly all wrong).

A group whose rewards are all equal says nothing. It is flagged, its advantages are exactly 0, and
`frac_reward_zero_std` is the share of such groups: near 1, no training happens, whatever the loss shows. Flags always
look at the group, also when the batch gives the scale (TRL looks at the batch then and nearly never flags). With
continuous rewards hardly any group is equal to the last bit: `threshold` flags those that hardly differ.

Rewards that are NaN (no reward function applied) take no part in mean or deviation and get advantage 0. All is
computed in float64: eight rewards of 0.1 have a deviation of 0 there, and of 1e-9 in float32.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qerl_compile.errors import TaskError

ScaleRewards = Literal["group", "batch", "none"]
EPSILON = 1e-4


@dataclass(frozen=True)
class Advantages:
    """Advantages and what they were made from.

    Args:
        advantages_N: float32 [N], 0 for groups without signal and for NaN rewards.
        group_mean_P: float64 [P], mean reward of each group; NaN if no reward in it applies.
        group_std_P: float64 [P], sample deviation of each group, 0 for fewer than two rewards.
        zero_std_P: bool [P], groups without signal.
    """

    advantages_N: torch.Tensor
    group_mean_P: torch.Tensor
    group_std_P: torch.Tensor
    zero_std_P: torch.Tensor

    @property
    def frac_reward_zero_std(self) -> float:
        """The share of groups without signal."""
        return float(self.zero_std_P.double().mean())


def group_advantages(
    rewards_N: torch.Tensor, group_size: int, scale: ScaleRewards = "group", threshold: float = 0.0
) -> Advantages:
    """Advantages of N = P * group_size completions that stand group after group.

    Args:
        rewards_N: float [N], NaN where no reward applies.
        group_size: completions per prompt, at least 2.
        scale: what the centred rewards are divided by.
        threshold: a group whose deviation is not above this has no signal.

    Raises:
        TaskError: N is not a multiple of the group size, the group size is below 2, a reward is infinite, or the
            scale is unknown.
    """
    check(rewards_N, group_size, scale)
    rewards_PG = rewards_N.double().reshape(-1, group_size)
    present_PG = ~rewards_PG.isnan()
    mean_P, std_P = masked_moments(rewards_PG, present_PG)
    zero_std_P = torch.isclose(std_P, torch.zeros_like(std_P)) | (std_P <= threshold)
    centred_PG = torch.where(present_PG & ~zero_std_P[:, None], rewards_PG - mean_P[:, None], 0.0)
    if scale == "group":
        centred_PG = centred_PG / (std_P[:, None] + EPSILON)
    elif scale == "batch":
        _, std_1 = masked_moments(rewards_PG.reshape(1, -1), present_PG.reshape(1, -1))
        centred_PG = centred_PG / (std_1 + EPSILON)
    return Advantages(centred_PG.reshape(-1).float(), mean_P, std_P, zero_std_P)


def masked_moments(values_PG: torch.Tensor, present_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row means (NaN for an empty row) and sample deviations (0 for fewer than two values)."""
    count_P = present_PG.sum(dim=1)
    mean_P = torch.where(present_PG, values_PG, 0.0).sum(dim=1) / count_P
    square_PG = torch.where(present_PG, values_PG - mean_P[:, None], 0.0).square()
    return mean_P, (square_PG.sum(dim=1) / (count_P - 1).clamp(min=1)).sqrt()


def check(rewards_N: torch.Tensor, group_size: int, scale: str) -> None:
    """Refuse what cannot be grouped or compared."""
    if scale not in get_args(ScaleRewards):
        do = f"Choose one of {', '.join(get_args(ScaleRewards))}."
        raise TaskError(where="scale_rewards", expected="a known scale", got=repr(scale), do=do)
    if group_size < 2:
        do = "Sample at least 2 completions per prompt."
        raise TaskError(where="group size", expected="at least 2", got=str(group_size), do=do)
    if rewards_N.ndim != 1 or len(rewards_N) == 0 or len(rewards_N) % group_size:
        expected, do = f"a multiple of {group_size} rewards", "Give whole groups."
        raise TaskError(where="rewards", expected=expected, got=f"shape {tuple(rewards_N.shape)}", do=do)
    if rewards_N.isinf().any():
        do = "Correct the reward function."
        raise TaskError(where="rewards", expected="finite rewards", got="an infinite one", do=do)
