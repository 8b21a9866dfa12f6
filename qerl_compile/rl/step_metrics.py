"""The numbers of one step under the names that TRL users know.

What each means, and where ours differs from TRL, is said at the function that makes it. Shares are in [0, 1], lengths
are in tokens and count the end token.
"""

import math
import resource
import sys

import torch

from qerl_compile.rl.advantages import Advantages
from qerl_compile.rl.rewards.score import Scores


def reward_metrics(scores: Scores, advantages: Advantages) -> dict[str, float]:
    """Rewards of a step.

    reward: mean over groups of the group's mean total. reward_std: mean over groups of the group's deviation (TRL
    logs the batch's deviation instead when that is the scale). rewards/NAME/mean and /std: one function over the
    completions it applied to, unweighted; NaN if it applied to none.
    """
    metrics = {
        "reward": float(advantages.group_mean_P.nanmean()),
        "reward_std": float(advantages.group_std_P.mean()),
        "frac_reward_zero_std": advantages.frac_reward_zero_std,
    }
    for name, values_N in zip(scores.names, scores.per_function_NF.T, strict=True):
        applied = values_N[~values_N.isnan()]
        metrics[f"rewards/{name}/mean"] = float(applied.mean()) if len(applied) else math.nan
        metrics[f"rewards/{name}/std"] = float(applied.std()) if len(applied) > 1 else math.nan
    return metrics


def length_metrics(lengths_N: torch.Tensor, ended_N: torch.Tensor) -> dict[str, float]:
    """Lengths of completions, and the share that was cut off before an end token.

    Args:
        lengths_N: int [N], completion tokens with the end token.
        ended_N: bool [N], whether the completion ended by itself. If none did, terminated lengths are 0, as in TRL.
    """
    terminated = lengths_N[ended_N] if bool(ended_N.any()) else torch.zeros(1)
    metrics = {"completions/clipped_ratio": float((~ended_N).double().mean())}
    for name, lengths in (("length", lengths_N), ("terminated_length", terminated)):
        lengths = lengths.double()
        metrics[f"completions/mean_{name}"] = float(lengths.mean())
        metrics[f"completions/min_{name}"] = float(lengths.min())
        metrics[f"completions/max_{name}"] = float(lengths.max())
    return metrics


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory since the process began, in MiB: resident, and allocated by torch on `device` if that is CUDA."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS and KiB on Linux
    metrics = {"memory/peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if device.type == "cuda":
        metrics["memory/peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return metrics
