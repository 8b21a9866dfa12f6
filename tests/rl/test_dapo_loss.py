import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.rl.losses import dapo_loss
from qerl_compile.rl.losses.policy import TokenCounts, token_ratio

LOW, HIGH = 0.2, 0.28


def one_token(ratio: float, advantage: float) -> tuple[float, float, dict[str, float]]:
    """Loss, gradient and clip metrics of a step of a single token with this ratio."""
    logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = dapo_loss(logp, torch.tensor([[-1.0]]), torch.tensor([advantage]), mask, 1)
    result.loss.backward()
    assert logp.grad is not None
    return result.loss.item(), logp.grad.item(), result.counts.metrics()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.2, 1.0, -1.2, -1.2, 0, 0),  # inside the bounds: -rho A, and d rho / d logp = rho
        (1.27, 1.0, -1.27, -1.27, 0, 0),  # clip-higher: still inside, where 1 + epsilon_low would have clipped
        (1.5, 1.0, -1.28, 0.0, 0, 1),  # above with positive advantage: clipped, no gradient
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # above with negative advantage: the minimum is unclipped
        (0.5, -1.0, 0.8, 0.0, 1, 0),  # below with negative advantage: clipped
        (0.5, 1.0, -0.5, -0.5, 0, 0),  # below with positive advantage: unclipped
        (0.5, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, gradient, low, high) -> None:
    actual_loss, actual_gradient, metrics = one_token(ratio, advantage)
    assert actual_loss == pytest.approx(loss, abs=1e-6)
    assert actual_gradient == pytest.approx(gradient, abs=1e-6)
    assert metrics == {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


def test_two_completions_by_hand() -> None:
    """Ratios 1, 2 | 0.5 with advantages 1 | -1: objectives 1, 1.28 | -0.8, over 3 tokens; padding is ignored."""
    logp = torch.tensor([[-1.0, -1.0], [-2.0, 99.0]])
    old = torch.tensor([[-1.0, -1.0 - math.log(2)], [-2.0 + math.log(2), 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    result = dapo_loss(logp, old, torch.tensor([1.0, -1.0]), mask, 3)
    assert result.loss.item() == pytest.approx(-(1 + 1.28 - 0.8) / 3, abs=1e-6)
    assert result.counts.metrics() == {
        "clip_ratio/low_mean": pytest.approx(1 / 3),
        "clip_ratio/high_mean": pytest.approx(1 / 3),
        "clip_ratio/region_mean": pytest.approx(2 / 3),
    }


def formula(logp, old, advantages, mask, tokens: int) -> float:
    """Equation 8 of DAPO in plain Python, by cases instead of min and clip."""
    total = 0.0
    for i, advantage in enumerate(advantages):
        for t, counted in enumerate(mask[i]):
            if not counted:
                continue
            ratio = math.exp(min(max(logp[i][t] - old[i][t], -10.0), 10.0))
            bound = 1 + HIGH if advantage > 0 else 1 - LOW
            clipped = ratio > bound if advantage > 0 else ratio < bound
            total += (bound if clipped else ratio) * advantage
    return -total / tokens


@st.composite
def batches(draw: st.DrawFn):
    b, t = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    number = st.floats(-12, 0)
    grid = st.lists(st.lists(number, min_size=t, max_size=t), min_size=b, max_size=b)
    bits = st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b)
    return draw(grid), draw(grid), draw(st.lists(st.floats(-3, 3), min_size=b, max_size=b)), draw(bits)


@given(batches())
def test_the_loss_equals_the_formula_written_out(batch) -> None:
    logp, old, advantages, mask = batch
    tokens = max(1, sum(map(sum, mask)))
    result = dapo_loss(torch.tensor(logp), torch.tensor(old), torch.tensor(advantages), torch.tensor(mask), tokens)
    expected = formula(logp, old, advantages, mask, tokens)
    assert result.loss.item() == pytest.approx(expected, rel=2e-4, abs=2e-4)


@given(batches(), st.integers(1, 4))
def test_micro_batches_add_up_to_the_whole_step(batch, size: int) -> None:
    logp, old, advantages, mask = map(torch.tensor, batch)
    tokens = max(1, int(mask.sum()))
    logp = logp.double().requires_grad_()
    whole = dapo_loss(logp, old, advantages, mask, tokens)
    (whole_gradient,) = torch.autograd.grad(whole.loss, logp)
    cuts = [slice(i, i + size) for i in range(0, len(logp), size)]
    pieces = [dapo_loss(logp[cut], old[cut], advantages[cut], mask[cut], tokens) for cut in cuts]
    total = torch.stack([piece.loss for piece in pieces]).sum()
    (gradient,) = torch.autograd.grad(total, logp)
    torch.testing.assert_close(total, whole.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-5, atol=1e-6)
    assert TokenCounts.total(piece.counts for piece in pieces).metrics() == whole.counts.metrics()


def test_the_denominator_is_the_step_and_not_the_call() -> None:
    logp, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    assert dapo_loss(logp, None, torch.ones(1), mask, 2).loss.item() == -1.0
    assert dapo_loss(logp, None, torch.ones(1), mask, 8).loss.item() == -0.25


def test_on_the_first_update_the_gradient_is_that_of_reinforce() -> None:
    logp = torch.tensor([[-0.3, -2.0], [-1.0, -0.1]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    result = dapo_loss(logp, None, torch.tensor([0.5, -0.5]), mask, 3)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-(0.5 + 0.5 - 0.5) / 3)
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.5, -0.5], [0.5, 0.0]]) / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_padding_never_reaches_loss_or_gradient(bad: float) -> None:
    logp = torch.tensor([[-1.0, bad]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    result = dapo_loss(logp, torch.tensor([[-1.0, bad]]), torch.ones(1), mask, 1)
    result.loss.backward()
    assert result.loss.item() == -1.0
    assert logp.grad is not None
    assert logp.grad.tolist() == [[-1.0, 0.0]]


def test_no_gradient_flows_into_the_old_policy() -> None:
    old = torch.tensor([[-1.0]], requires_grad=True)
    logp = torch.tensor([[-1.1]], requires_grad=True)
    dapo_loss(logp, old, torch.ones(1), torch.ones(1, 1, dtype=torch.bool), 1).loss.backward()
    assert old.grad is None


def test_far_ratios_are_bounded_on_both_sides() -> None:
    logp, mask = torch.tensor([[0.0, -200.0]]), torch.ones(1, 2, dtype=torch.bool)
    ratio = token_ratio(logp, torch.tensor([[-200.0, 0.0]]), mask)
    torch.testing.assert_close(ratio, torch.tensor([[math.exp(10.0), math.exp(-10.0)]]))


def test_a_ratio_outside_the_mask_is_one() -> None:
    logp, mask = torch.tensor([[math.nan, math.inf, -5.0, -1.0]]), torch.tensor([[False, False, False, True]])
    assert token_ratio(logp, torch.zeros(1, 4), mask)[0, :3].tolist() == [1.0, 1.0, 1.0]


def test_bf16_log_probabilities_are_compared_in_fp32() -> None:
    logp = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    result = dapo_loss(logp, torch.tensor([[-1.001]]), torch.ones(1), torch.ones(1, 1, dtype=torch.bool), 1)
    assert result.loss.dtype is torch.float32
    assert result.loss.item() == pytest.approx(-math.exp(0.001), rel=1e-6)


def test_a_step_without_tokens_counts_as_no_clipping() -> None:
    zero = torch.tensor(0)
    assert set(TokenCounts(zero, zero, zero).metrics().values()) == {0.0}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 3), (3,), (2, 3)), "expected"),
        (((2, 3), (2, 1), (2,), (2, 3)), "expected"),
        (((2, 3), (2, 3), (2,), (1, 3)), "expected"),
        (((2, 3), (2, 3), (2, 1), (2, 3)), "expected"),
        (((3,), (3,), (3,), (3,)), "expected"),
    ],
)
def test_shapes_that_would_only_broadcast_are_refused(shapes, message: str) -> None:
    logp, old, advantages, mask = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        dapo_loss(logp, old, advantages, mask.bool(), 6)


def test_a_mask_of_numbers_and_an_empty_step_are_refused() -> None:
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match="boolean"):
        dapo_loss(x, x, torch.ones(1), x, 1)
    with pytest.raises(ValueError, match="step_tokens"):
        dapo_loss(x, x, torch.ones(1), x.bool(), 0)
