"""avg@n and pass@k: the estimator by hand and by enumeration, and an interval that covers clustered answers."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.rl.pass_at_k import Mean, mean_over_items, pass_at_k
from qerl_compile.rl.proportions import Proportion, wilson


@pytest.mark.parametrize(
    ("samples", "right", "k", "share"),
    [
        (4, 0, 4, 0.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # 3 of the 6 pairs hold the right one
        (4, 2, 2, 1 - 1 / 6),
        (4, 3, 2, 1.0),  # no pair without
        (10, 3, 5, 1 - 21 / 252),
        (1000, 1, 1000, 1.0),
    ],
)
def test_values_by_hand(samples, right, k, share):
    assert pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_subsets_that_hold_a_right_answer(case):
    samples, right, k = case
    answers = [True] * right + [False] * (samples - right)
    subsets = list(combinations(answers, k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_it_is_unbiased_where_the_usual_formula_is_too_low():
    """An item that is right with p = 0.3 in each of 5 draws; expectations over the binomial, not a simulation."""
    probabilities = [
        torch.distributions.Binomial(5, 0.3).log_prob(torch.tensor(float(c))).exp().item() for c in range(6)
    ]
    ours = sum(p * pass_at_k(5, c, 3) for c, p in enumerate(probabilities))
    usual = sum(p * (1 - (1 - c / 5) ** 3) for c, p in enumerate(probabilities))
    assert ours == pytest.approx(1 - 0.7**3, abs=1e-6)
    assert usual < 1 - 0.7**3 - 0.05


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_numbers_that_do_not_fit_are_refused(case):
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        pass_at_k(*case)


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1]])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="at least one value"):
        mean_over_items(values)


def test_items_that_agree_get_wilsons_interval_and_no_false_certainty():
    assert mean_over_items([1.0] * 20) == Mean(1.0, *Proportion(20, 20).interval)
    assert mean_over_items([0.0] * 20) == Mean(0.0, *Proportion(0, 20).interval)
    assert mean_over_items([0.25] * 8) == Mean(0.25, *Proportion(2, 8).interval)
    assert mean_over_items([0.5]) == Mean(0.5, *wilson(0.5, 1))


def test_an_interval_is_the_same_each_time_and_holds_its_mean():
    values = [0.0, 0.25, 1.0, 0.5, 0.75] * 6
    result = mean_over_items(values)
    assert result == mean_over_items(values)
    assert result.value == pytest.approx(0.5)
    assert 0.3 < result.low < 0.5 < result.high < 0.7
    assert str(result).startswith("50.0 % [")


def test_many_items_are_resampled_in_parts_with_the_same_law():
    """3000 items exceed one batch of indices; the normal interval of a mean is then right to a few percent."""
    values = [0.0, 1.0] * 1500
    result = mean_over_items(values)
    half = 1.96 * 0.5 / 3000**0.5
    assert result.low == pytest.approx(0.5 - half, abs=0.1 * half)
    assert result.high == pytest.approx(0.5 + half, abs=0.1 * half)


def test_the_interval_covers_answers_that_come_in_clusters_and_one_that_ignores_clusters_does_not():
    """40 items of unlike difficulty, half near 0 and half near 1, with 8 answers each; the true mean is 0.5."""
    generator = torch.Generator().manual_seed(0)
    ours = naive = 0
    rounds = 200
    for _ in range(rounds):
        difficulty = torch.where(torch.rand(40, generator=generator) < 0.5, 0.05, 0.95)
        right = torch.bernoulli(difficulty[:, None].expand(40, 8), generator=generator).sum(dim=1)
        interval = mean_over_items((right / 8).tolist())
        low, high = Proportion(int(right.sum()), 320).interval
        ours += interval.low <= 0.5 <= interval.high
        naive += low <= 0.5 <= high
    assert 0.90 <= ours / rounds <= 0.99
    assert naive / rounds < 0.65
