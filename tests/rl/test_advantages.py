import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import TaskError
from qerl_compile.rl.advantages import group_advantages

NAN = math.nan


def close(actual: torch.Tensor, expected: list[float], rtol: float = 0.0, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def test_two_of_four_right() -> None:
    # mean 1/2, sample deviation sqrt(4 * 1/4 / 3) = 1/sqrt(3) = 0.5773503; 0.5 / 0.5774503 = 0.8658754
    result = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4)
    close(result.advantages_N, [0.8658754, -0.8658754, -0.8658754, 0.8658754])
    close(result.group_std_P, [0.5773503], atol=1e-7)
    assert result.advantages_N.dtype is torch.float32


def test_one_of_eight_right() -> None:
    # mean 1/8, deviation sqrt((49/64 + 7/64) / 7) = sqrt(1/8) = 0.3535534; 0.875/0.3536534 = 2.4741739
    result = group_advantages(torch.tensor([1.0] + [0.0] * 7), 8)
    close(result.advantages_N, [2.4741739] + [-0.3534534] * 7)


def test_each_group_is_measured_against_itself() -> None:
    result = group_advantages(torch.tensor([0.0, 2.0, 10.0, 14.0]), 2)
    # deviations sqrt(2) and sqrt(8): 1/1.4143136 = 0.7070568, 2/2.8285271 = 0.7070818
    close(result.advantages_N, [-0.7070568, 0.7070568, -0.7070818, 0.7070818])
    assert result.group_mean_P.tolist() == [1.0, 12.0]


def test_batch_scale_divides_by_the_deviation_of_all() -> None:
    # the four rewards have mean 6.5 and squared deviations 42.25 + 20.25 + 12.25 + 56.25 = 131; sqrt(131/3) = 6.6080759
    result = group_advantages(torch.tensor([0.0, 2.0, 10.0, 14.0]), 2, "batch")
    close(result.advantages_N, [-0.1513277, 0.1513277, -0.3026554, 0.3026554])


def test_no_scale_leaves_rewards_centred() -> None:
    result = group_advantages(torch.tensor([0.0, 2.0, 10.0, 14.0]), 2, "none")
    assert result.advantages_N.tolist() == [-1.0, 1.0, -2.0, 2.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_without_signal_are_flagged_and_get_zero(scale) -> None:
    result = group_advantages(torch.tensor([0.1] * 8 + [1.0, 0.0] * 4 + [0.0] * 8), 8, scale)
    assert result.zero_std_P.tolist() == [True, False, True]
    assert result.frac_reward_zero_std == pytest.approx(2 / 3)
    assert result.advantages_N[:8].tolist() == result.advantages_N[16:].tolist() == [0.0] * 8
    assert result.advantages_N[8:16].abs().min() > 0.4


def test_equal_rewards_whose_mean_rounds_still_get_exactly_zero() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    assert (rewards - rewards.sum() / 3).abs().max() > 0  # 0.1 + 0.1 + 0.1 is not 0.3
    assert group_advantages(rewards, 3).advantages_N.tolist() == [0.0, 0.0, 0.0]


def test_rewards_that_do_not_apply_take_no_part() -> None:
    result = group_advantages(torch.tensor([1.0, NAN, 0.0, NAN] + [NAN] * 4 + [NAN, NAN, NAN, 1.0]), 4)
    # the first group is [1, 0]: deviation sqrt(1/2) = 0.7071068; 0.5 / 0.7072068 = 0.7070068
    close(result.advantages_N, [0.7070068, 0.0, -0.7070068, 0.0] + [0.0] * 8)
    assert result.zero_std_P.tolist() == [False, True, True]
    torch.testing.assert_close(
        result.group_mean_P, torch.tensor([0.5, NAN, 1.0], dtype=torch.float64), equal_nan=True, rtol=0, atol=0
    )


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(["group", "none"]),
)
def test_advantages_equal_the_formula_written_out(groups: list[list[float]], scale) -> None:
    result = group_advantages(torch.tensor(groups).reshape(-1), 4, scale)
    for i, group in enumerate(groups):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        if std < 1e-7:
            continue
        divisor = std + 1e-4 if scale == "group" else 1.0
        expected = [(reward - mean) / divisor for reward in group]
        close(result.advantages_N[4 * i : 4 * i + 4], expected, rtol=1e-5, atol=1e-5)
    assert result.advantages_N.reshape(-1, 4).sum(dim=1).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("rewards", "group_size", "scale", "message"),
    [
        ([1.0, 0.0, 1.0], 2, "group", "a multiple of 2"),
        ([], 2, "group", "a multiple of 2"),
        ([1.0, 0.0], 1, "group", "at least 2"),
        ([1.0, math.inf], 2, "group", "finite"),
        ([1.0, 0.0], 2, "std", "group, batch, none"),
        ([[1.0, 0.0]], 2, "group", "shape"),
    ],
)
def test_what_cannot_be_grouped_is_refused(rewards: list, group_size: int, scale, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        group_advantages(torch.tensor(rewards), group_size, scale)
