"""A step is the sum of its pieces, however it is cut."""

import pytest
import torch

from qerl_compile.rl.losses import LOSSES, LossInputs, LossOptions, TokenCounts
from tests.rl.losses.batches import mixed_batch, rows, totals

OPTIONS = LossOptions(kl_weight=0.1, clip_delta=1.5)
WHOLE, HALVES, THIRDS = [slice(0, 6)], [slice(0, 3), slice(3, 6)], [slice(0, 1), slice(1, 4), slice(4, 6)]


def by_pieces(name: str, inputs: LossInputs, cuts: list[slice]) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Loss, gradient and metrics of the step, from one backward per piece."""
    step = totals(inputs, micro_batches=len(cuts))
    inputs.logp_BT.grad = None
    parts = [LOSSES[name](rows(inputs, cut), step, OPTIONS) for cut in cuts]
    for part in parts:
        part.loss.backward()
    assert inputs.logp_BT.grad is not None
    loss = torch.stack([part.loss.detach() for part in parts]).sum()
    return loss, inputs.logp_BT.grad.clone(), TokenCounts.total(part.counts for part in parts).metrics()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"bnpo"}))
@pytest.mark.parametrize("cuts", [HALVES, THIRDS, [slice(i, i + 1) for i in range(6)]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_micro_batches_add_up_to_the_whole_step(name: str, cuts, dtype: torch.dtype, tolerance: float) -> None:
    inputs = mixed_batch(dtype)
    loss, gradient, metrics = by_pieces(name, inputs, WHOLE)
    assert bool(gradient.any())
    cut_loss, cut_gradient, cut_metrics = by_pieces(name, inputs, cuts)
    torch.testing.assert_close(cut_loss, loss, rtol=0, atol=tolerance)
    torch.testing.assert_close(cut_gradient, gradient, rtol=0, atol=tolerance)
    assert cut_metrics == pytest.approx(metrics, rel=1e-6)


def test_bnpo_is_the_mean_over_micro_batches_of_their_token_means() -> None:
    """Its definition; cut otherwise, the same step has another loss, and `bnpo.py` says so."""
    inputs = mixed_batch()
    loss, gradient, _ = by_pieces("bnpo", inputs, THIRDS)
    alone = [by_pieces("dapo", rows_alone(inputs, cut), [slice(0, 6)])[0] for cut in THIRDS]
    torch.testing.assert_close(loss, torch.stack(alone).mean(), rtol=0, atol=1e-12)
    other_loss, other_gradient, _ = by_pieces("bnpo", inputs, HALVES)
    assert abs(float(loss - other_loss)) > 1e-3
    assert float((gradient - other_gradient).abs().max()) > 1e-3


def rows_alone(inputs: LossInputs, cut: slice) -> LossInputs:
    """Some sequences as a step of their own."""
    part = rows(inputs, cut)
    logp_BT = part.logp_BT.detach().requires_grad_()
    return LossInputs(
        logp_BT, part.old_logp_BT, part.advantages_B, part.mask_BT, part.weight_BT, part.reference_logp_BT
    )


def test_bnpo_adds_up_where_micro_batches_have_equally_many_tokens() -> None:
    inputs = mixed_batch()
    equal = LossInputs(
        inputs.logp_BT, inputs.old_logp_BT, inputs.advantages_B, torch.ones_like(inputs.mask_BT), inputs.weight_BT,
        inputs.reference_logp_BT,
    )  # fmt: skip
    loss, gradient, _ = by_pieces("bnpo", equal, WHOLE)
    for cuts in (HALVES, [slice(0, 2), slice(2, 4), slice(4, 6)]):
        cut_loss, cut_gradient, _ = by_pieces("bnpo", equal, cuts)
        torch.testing.assert_close(cut_loss, loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(cut_gradient, gradient, rtol=0, atol=1e-12)
    dapo_loss, dapo_gradient, _ = by_pieces("dapo", equal, WHOLE)
    torch.testing.assert_close(loss, dapo_loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, dapo_gradient, rtol=0, atol=1e-12)
