import math
from dataclasses import replace

import pytest
import torch

from qerl_compile.rl.losses import LOSSES, LossInputs, LossOptions, StepTotals
from tests.rl.losses.batches import mixed_batch, rows, totals

WITH_KL = LossOptions(kl_weight=0.1)
ONE = StepTotals(1, 1, 1, 1)


def value_and_gradient(name: str, inputs: LossInputs, options: LossOptions = WITH_KL) -> tuple[float, torch.Tensor]:
    result = LOSSES[name](inputs, totals(inputs), options)
    (gradient,) = torch.autograd.grad(result.loss, inputs.logp_BT)
    return result.loss.item(), gradient


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_padding_never_reaches_loss_gradient_or_counts(name: str, bad: float) -> None:
    clean = mixed_batch()
    loss, gradient = value_and_gradient(name, clean)
    assert loss != 0
    assert not bool(gradient[~clean.mask_BT].any())
    fields = ("logp_BT", "old_logp_BT", "weight_BT", "reference_logp_BT")
    spoilt = {field: torch.where(clean.mask_BT, getattr(clean, field).detach(), bad) for field in fields}
    dirty = replace(clean, **spoilt | {"logp_BT": spoilt["logp_BT"].requires_grad_()})
    dirty_loss, dirty_gradient = value_and_gradient(name, dirty)
    assert dirty_loss == loss
    assert torch.equal(dirty_gradient, gradient)
    counts = [LOSSES[name](inputs, totals(inputs), WITH_KL).counts.metrics() for inputs in (clean, dirty)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_at_a_completion_token_is_not_hidden(name: str) -> None:
    inputs = mixed_batch()
    spoilt = inputs.logp_BT.detach().clone()
    spoilt[0, 0] = math.nan
    loss, _ = value_and_gradient(name, replace(inputs, logp_BT=spoilt.requires_grad_()))
    assert math.isnan(loss)


@pytest.mark.parametrize("name", LOSSES)
def test_far_ratios_overflow_nowhere(name: str) -> None:
    """Differences of 200 nats: exp would be infinite, and infinity times the other token's 0 is NaN."""
    logp = torch.tensor([[0.0, -200.0], [-200.0, -200.0]], requires_grad=True)
    old = torch.tensor([[-200.0, 0.0], [0.0, 0.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    inputs = LossInputs(logp, old, torch.tensor([-1.0, 1.0]), mask, None, old)
    loss, gradient = value_and_gradient(name, inputs)
    assert math.isfinite(loss)
    assert bool(gradient.isfinite().all())


def test_the_largest_ratio_is_that_of_ten_nats() -> None:
    inputs = LossInputs(torch.zeros(1, 1), torch.full((1, 1), -200.0), torch.tensor([-1.0]), torch.tensor([[True]]))
    assert LOSSES["dapo"](inputs, ONE, LossOptions()).loss.item() == pytest.approx(math.exp(10))
    assert LOSSES["gspo"](inputs, ONE, LossOptions()).loss.item() == pytest.approx(math.exp(10))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_with_everything_masked_out_is_zero_with_zero_gradient(name: str) -> None:
    inputs = replace(mixed_batch(), mask_BT=torch.zeros(6, 9, dtype=torch.bool))
    result = LOSSES[name](inputs, StepTotals(0, 6, 1, 32), WITH_KL)
    (gradient,) = torch.autograd.grad(result.loss, inputs.logp_BT)
    assert result.loss.item() == 0
    assert not bool(gradient.any())
    assert set(result.counts.metrics().values()) == {0.0}


@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_out_sequence_adds_nothing(name: str) -> None:
    inputs = mixed_batch()
    assert not bool(inputs.mask_BT[2].any())
    step = totals(inputs)
    without = LOSSES[name](rows(inputs, slice(2, 3)), step, WITH_KL)
    assert without.loss.item() == 0
    whole = LOSSES[name](inputs, step, WITH_KL).loss
    loss_around = LOSSES[name](rows(inputs, torch.tensor([0, 1, 3, 4, 5])), step, WITH_KL).loss
    torch.testing.assert_close(loss_around, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_flows_into_anything_but_the_policy(name: str) -> None:
    inputs = mixed_batch()
    others = [inputs.old_logp_BT, inputs.weight_BT, inputs.reference_logp_BT]
    for tensor in others:
        assert tensor is not None
        tensor.requires_grad_()
    LOSSES[name](inputs, totals(inputs), WITH_KL).loss.backward()
    assert [tensor.grad for tensor in others if tensor is not None] == [None, None, None]


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_log_probabilities_are_compared_in_fp32(name: str) -> None:
    """-1.001 rounds to -1 in bf16, where both would be equal and the gradient that of ratio 1."""
    logp = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    inputs = LossInputs(logp, torch.tensor([[-1.001]]), torch.ones(1), torch.tensor([[True]]))
    loss = LOSSES[name](inputs, ONE, LossOptions()).loss
    assert loss.dtype is torch.float32
    assert abs(loss.item()) == pytest.approx(math.exp(0.001), rel=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 3), (3,), (2, 3)), r"advantages_B of shape \[2\], got \[3\]"),
        (((2, 3), (2, 1), (2,), (2, 3)), r"old_logp_BT of shape \[2, 3\], got \[2, 1\]"),
        (((2, 3), (2, 3), (2,), (1, 3)), r"mask_BT of shape \[2, 3\], got \[1, 3\]"),
        (((2, 3), (2, 3), (2, 1), (2, 3)), r"advantages_B of shape \[2\], got \[2, 1\]"),
        (((2, 3), (2, 3), (2,), (2, 3), (2, 1)), r"weight_BT of shape \[2, 3\], got \[2, 1\]"),
        (((2, 3), (2, 3), (2,), (2, 3), (2, 3), (3,)), r"reference_logp_BT of shape \[2, 3\], got \[3\]"),
        (((3,), (3,), (3,), (3,)), r"logp_BT of shape \[B, T\], got \(3,\)"),
    ],
)
def test_shapes_that_would_only_broadcast_are_refused(shapes, message: str) -> None:
    logp, old, advantages, mask, *rest = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        LossInputs(logp, old, advantages, mask.bool(), *rest)


def test_a_mask_of_numbers_is_refused() -> None:
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match="boolean"):
        LossInputs(x, x, torch.ones(1), x)


@pytest.mark.parametrize("totals", [(-1, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)])
def test_totals_that_would_divide_by_zero_are_refused(totals) -> None:
    with pytest.raises(ValueError, match="totals of at least 1"):
        StepTotals(*totals)


@pytest.mark.parametrize("name", LOSSES)
def test_a_kl_weight_without_a_reference_is_refused(name: str) -> None:
    inputs = replace(mixed_batch(), reference_logp_BT=None)
    with pytest.raises(ValueError, match=r"reference_logp_BT with kl_weight 0\.1"):
        LOSSES[name](inputs, totals(inputs), WITH_KL)
