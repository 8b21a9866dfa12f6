import math

import pytest
import torch

from qerl_compile.rl.losses import LOSSES, LossInputs, LossOptions, StepTotals
from qerl_compile.rl.losses.kl import k3

ONE = StepTotals(1, 1, 1, 1)


def k3_of(d: float) -> tuple[float, float]:
    """k3 and its gradient where the reference's log-probability is higher by d."""
    logp = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    value = k3(logp, torch.tensor([[-1.0 + d]], dtype=torch.float64), torch.tensor([[True]])).sum()
    value.backward()
    assert logp.grad is not None
    return value.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("d", "value", "gradient"),
    [
        (0.0, 0.0, 0.0),
        (math.log(2), 1 - math.log(2), -1.0),  # exp(d) - d - 1, and its derivative in logp is 1 - exp(d)
        (-math.log(2), math.log(2) - 0.5, 0.5),
        (-200.0, 199.0, 1.0),
        (200.0, math.exp(10) - 11, 0.0),  # beyond the guard
    ],
)
def test_one_token_by_hand(d: float, value: float, gradient: float) -> None:
    assert k3_of(d) == (pytest.approx(value, abs=1e-12), pytest.approx(gradient, abs=1e-12))


@pytest.mark.parametrize("name", LOSSES)
def test_the_term_is_weighted_and_divided_like_the_loss_and_logged_unweighted(name: str) -> None:
    """With advantage 0 it is all there is: k3 of 1 - ln 2 on one of two tokens."""
    logp = torch.tensor([[-1.0, -1.0]])
    inputs = LossInputs(
        logp, logp, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 7.0),
        torch.tensor([[-1.0 + math.log(2), -1.0]]),
    )  # fmt: skip
    result = LOSSES[name](inputs, StepTotals(2, 1, 1, 2), LossOptions(kl_weight=0.5))
    assert result.loss.item() == pytest.approx(0.5 * (1 - math.log(2)) / 2)
    assert result.counts.metrics()["kl"] == pytest.approx((1 - math.log(2)) / 2)


def test_a_reference_without_weight_is_only_measured() -> None:
    logp = torch.tensor([[-1.0]], requires_grad=True)
    inputs = LossInputs(logp, None, torch.zeros(1), torch.tensor([[True]]), None, torch.tensor([[-2.0]]))
    result = LOSSES["dapo"](inputs, ONE, LossOptions())
    result.loss.backward()
    assert logp.grad is not None
    assert (result.loss.item(), logp.grad.item()) == (0.0, 0.0)
    assert result.counts.metrics()["kl"] == pytest.approx(math.exp(-1))


def test_the_factor_makes_the_mean_gradient_that_of_the_kl() -> None:
    """Over a vocabulary of four, with every token weighed by how often the old policy draws it."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.1, -0.6, 0.5, 0.4], dtype=torch.float64).log_softmax(0)
    reference = torch.tensor([-0.5, 0.2, 0.9, -1.0], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    gradients = {}
    for unbiased in (True, False):
        options = LossOptions(kl_weight=1.0, kl_unbiased=unbiased)
        total = torch.zeros((), dtype=torch.float64)
        for token in range(4):
            zero, one_token = torch.zeros(1, dtype=torch.float64), logp[None, token : token + 1]
            inputs = LossInputs(
                one_token, old[None, token : token + 1], zero, torch.tensor([[True]]), None,
                reference[None, token : token + 1],
            )  # fmt: skip
            total = total + old[token].exp() * LOSSES["dapo"](inputs, ONE, options).loss
        (gradients[unbiased],) = torch.autograd.grad(total, logits, retain_graph=True)
    torch.testing.assert_close(gradients[True], exact, rtol=1e-12, atol=1e-12)
    assert float((gradients[False] - exact).abs().max()) > 0.05
