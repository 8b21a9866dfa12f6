import math

import pytest
import torch

from qerl_compile.rl.advantages import group_advantages
from qerl_compile.rl.rewards import Scores
from qerl_compile.rl.step_metrics import length_metrics, reward_metrics

NAN = math.nan


def test_reward_metrics_by_hand() -> None:
    per_function = torch.tensor([[1.0, NAN], [0.0, NAN], [1.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    total = torch.tensor([1.0, 0.0, 1.5, 1.5], dtype=torch.float64)
    metrics = reward_metrics(Scores(("answer", "short"), per_function, total), group_advantages(total, 2))
    assert metrics == {
        "reward": 1.0,
        "reward_std": pytest.approx(math.sqrt(0.5) / 2),
        "frac_reward_zero_std": 0.5,
        "rewards/answer/mean": 0.75,
        "rewards/answer/std": 0.5,
        "rewards/short/mean": 0.5,
        "rewards/short/std": 0.0,
    }


def test_a_reward_that_never_applied_is_nan_and_not_zero() -> None:
    total = torch.tensor([NAN, NAN], dtype=torch.float64)
    metrics = reward_metrics(Scores(("answer",), total[:, None], total), group_advantages(total, 2))
    assert math.isnan(metrics["rewards/answer/mean"])
    assert math.isnan(metrics["reward"])
    assert metrics["frac_reward_zero_std"] == 1.0


def test_length_metrics_by_hand() -> None:
    lengths, ended = torch.tensor([3, 8, 5, 8]), torch.tensor([True, False, True, False])
    assert length_metrics(lengths, ended) == {
        "completions/clipped_ratio": 0.5,
        "completions/mean_length": 6.0,
        "completions/min_length": 3.0,
        "completions/max_length": 8.0,
        "completions/mean_terminated_length": 4.0,
        "completions/min_terminated_length": 3.0,
        "completions/max_terminated_length": 5.0,
    }


def test_when_nothing_ended_terminated_lengths_are_zero() -> None:
    metrics = length_metrics(torch.tensor([8, 8]), torch.tensor([False, False]))
    assert metrics["completions/clipped_ratio"] == 1.0
    assert metrics["completions/mean_terminated_length"] == 0.0
