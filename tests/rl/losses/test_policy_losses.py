import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import RecipeError
from qerl_compile.recipe_fields import TrainConfig
from qerl_compile.rl.losses import LOSSES, LossInputs, LossOptions, StepTotals, TokenCounts

LOW, HIGH = 0.2, 0.28
CLIPPING = ("bnpo", "dapo", "dr_grpo", "grpo", "gspo")
ONE = StepTotals(1, 1, 1, 1)


def test_every_loss_of_the_recipe_is_there() -> None:
    assert set(LOSSES) == set(get_args(TrainConfig.model_fields["loss"].annotation))


def one_token(name: str, ratio: float, advantage: float, **options) -> tuple[float, float, dict[str, float]]:
    """Loss, gradient and metrics of a step of a single token with this ratio and log-probability -1."""
    logp = torch.tensor([[-1.0]], requires_grad=True)
    inputs = LossInputs(logp, torch.tensor([[-1 - math.log(ratio)]]), torch.tensor([advantage]), torch.tensor([[True]]))
    result = LOSSES[name](inputs, ONE, LossOptions(**options))
    result.loss.backward()
    assert logp.grad is not None
    return result.loss.item(), logp.grad.item(), result.counts.metrics()


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.0, 2.0, -2.0, -2.0, 0, 0),
        (1.2, 1.0, -1.2, -1.2, 0, 0),  # inside the bounds: -rho A, and d rho / d logp = rho
        (1.27, 1.0, -1.27, -1.27, 0, 0),  # clip-higher: still inside, where 1 + clip_low would have clipped
        (1.5, 1.0, -1.28, 0.0, 0, 1),  # above with positive advantage: clipped, no gradient
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # above with negative advantage: the minimum is unclipped
        (0.5, -1.0, 0.8, 0.0, 1, 0),  # below with negative advantage: clipped
        (0.5, 1.0, -0.5, -0.5, 0, 0),  # below with positive advantage: unclipped
        (0.5, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_one_token_by_hand(name, ratio, advantage, loss, gradient, low, high) -> None:
    actual_loss, actual_gradient, metrics = one_token(name, ratio, advantage)
    assert actual_loss == pytest.approx(loss, abs=1e-6)
    assert actual_gradient == pytest.approx(gradient, abs=1e-6)
    assert metrics == {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.9, -1.0, 1.9, 1.9),  # negative advantage, below delta: open, as without
        (5.0, -1.0, 2.0, 0.0),  # above delta: bounded
        (5.0, 1.0, -1.28, 0.0),  # positive advantage: the upper clip bound comes first
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_delta_bounds_the_side_that_clipping_leaves_open(name, ratio, advantage, loss, gradient) -> None:
    actual_loss, actual_gradient, _ = one_token(name, ratio, advantage, clip_delta=2.0)
    assert actual_loss == pytest.approx(loss, abs=1e-6)
    assert actual_gradient == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "high"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.2, 1.0, -1.2, 0),
        (3.0, 1.0, -1.28, 1),  # above the cap: the token keeps its gradient, with the cap as weight
        (3.0, -1.0, 1.28, 0),  # the cap holds for both signs; only the first counts as clipped, as in TRL
        (0.01, -1.0, 0.01, 0),  # no lower bound
    ],
)
def test_cispo_weighs_log_probabilities_by_the_capped_ratio(ratio, advantage, gradient, high) -> None:
    actual_loss, actual_gradient, metrics = one_token("cispo", ratio, advantage)
    assert actual_gradient == pytest.approx(gradient, abs=1e-6)
    assert actual_loss == pytest.approx(-gradient, abs=1e-6)  # gradient * logp, and logp is -1
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (0, high)


# Ratios 1, 2 | 0.5 and advantages 1 | -1: tokens give 1, 1.28 | -0.8. With totals of 8 tokens, 4 sequences, 2
# micro-batches and at most 5 tokens, of which this call sees 3 tokens and 2 sequences:
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dapo", -(1 + 1.28 - 0.8) / 8),
        ("grpo", -((1 + 1.28) / 2 - 0.8) / 4),
        ("dr_grpo", -(1 + 1.28 - 0.8) / (4 * 5)),
        ("bnpo", -(1 + 1.28 - 0.8) / 3 / 2),
        ("gspo", -(1.28 - 0.8) / 4),  # sqrt(1 * 2) = 1.41, clipped
        ("cispo", -(1 * -1 + 1.28 * -1 - 0.5 * -2) / 8),
    ],
)
def test_each_loss_divides_by_its_own_total(name: str, expected: float) -> None:
    logp = torch.tensor([[-1.0, -1.0], [-2.0, 99.0]])
    old = torch.tensor([[-1.0, -1.0 - math.log(2)], [-2.0 + math.log(2), 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    inputs = LossInputs(logp, old, torch.tensor([1.0, -1.0]), mask)
    result = LOSSES[name](inputs, StepTotals(8, 4, 2, 5), LossOptions())
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)


def test_clip_ratios_are_shares_of_tokens_and_for_gspo_of_sequences() -> None:
    logp = torch.tensor([[0.0, 0.0], [-9.0, 0.0], [-1.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    inputs = LossInputs(logp, torch.full((3, 2), -1.0), torch.tensor([1.0, -1.0, 1.0]), mask)
    counts = {name: LOSSES[name](inputs, ONE, LossOptions()).counts.metrics() for name in ("dapo", "gspo")}
    assert counts["dapo"]["clip_ratio/high_mean"] == pytest.approx(2 / 3)
    assert counts["dapo"]["clip_ratio/low_mean"] == pytest.approx(1 / 3)
    assert counts["gspo"]["clip_ratio/high_mean"] == 1 / 2
    assert counts["gspo"]["clip_ratio/low_mean"] == 1 / 2


def test_counts_survive_the_trip_through_a_vector() -> None:
    counts = TokenCounts(*(torch.tensor(n) for n in (10, 5, 2, 1)), kl=torch.tensor(3.0))
    assert TokenCounts.from_vector(counts.vector()).metrics() == counts.metrics()
    assert counts.metrics() == {
        "clip_ratio/low_mean": 0.4,
        "clip_ratio/high_mean": 0.2,
        "clip_ratio/region_mean": pytest.approx(0.6),
        "kl": 0.3,
    }
    twice = TokenCounts.total([counts, counts])
    assert (int(twice.tokens), int(twice.clippable)) == (20, 10)
    assert twice.metrics() == counts.metrics()


@pytest.mark.parametrize("name", LOSSES)
def test_on_the_first_update_the_gradient_is_that_of_reinforce(name: str) -> None:
    """Every ratio is 1: the gradient of a token is -A over the divisor, which differs by loss."""
    logp = torch.tensor([[-0.3, -2.0], [-1.0, -0.1]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    inputs = LossInputs(logp, None, torch.tensor([0.5, -0.25]), mask)
    LOSSES[name](inputs, StepTotals(3, 2, 1, 4), LossOptions()).loss.backward()
    per_token = torch.tensor([[-0.5, -0.5], [0.25, 0.0]])
    divisor = {"dr_grpo": 8, "grpo": torch.tensor([[4], [2]]), "gspo": torch.tensor([[4], [2]])}.get(name, 3)
    torch.testing.assert_close(logp.grad, per_token / divisor)


@pytest.mark.parametrize("name", LOSSES)
def test_no_old_policy_means_the_same_as_its_own_log_probabilities(name: str) -> None:
    logp = torch.tensor([[-0.3, -2.0]], requires_grad=True)
    mask, advantages = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.7])
    gradients = []
    for old in (None, logp.detach().clone()):
        loss = LOSSES[name](LossInputs(logp, old, advantages, mask), StepTotals(2, 1, 1, 2), LossOptions()).loss
        gradients.append(torch.autograd.grad(loss, logp)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_multiplies_its_token(name: str) -> None:
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    weight = torch.tensor([[3.0, 0.0]])
    inputs = LossInputs(logp, None, torch.tensor([1.0]), mask, weight)
    LOSSES[name](inputs, StepTotals(2, 1, 1, 2), LossOptions()).loss.backward()
    # A sequence's ratio has the gradient of the mean of its tokens, whichever of them carries the weight.
    expected = [[-0.75, -0.75]] if name == "gspo" else [[-1.5, 0.0]]
    torch.testing.assert_close(logp.grad, torch.tensor(expected))


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
def test_the_dapo_loss_equals_the_formula_written_out(batch) -> None:
    logp, old, advantages, mask = batch
    tokens = max(1, sum(map(sum, mask)))
    double = [torch.tensor(values, dtype=torch.float64) for values in (logp, old, advantages)]
    result = LOSSES["dapo"](LossInputs(*double, torch.tensor(mask)), StepTotals(tokens, 1, 1, 1), LossOptions())
    assert result.loss.item() == pytest.approx(formula(logp, old, advantages, mask, tokens), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("delta", [0.5, 1.0, 1.28])
def test_a_delta_within_the_clip_bounds_is_refused(delta: float) -> None:
    with pytest.raises(RecipeError, match=r"train.clip_delta: expected more than 1 \+ clip_high, which is 1.28; got"):
        LossOptions(clip_delta=delta)
