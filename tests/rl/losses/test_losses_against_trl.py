"""Our losses next to TRL 1.16's own code on the same tensors. The cases and the differences: docs/losses.md."""

from dataclasses import replace

import pytest
import torch

from qerl_compile.rl.losses import LOSSES, LossInputs, LossOptions, TokenCounts
from tests.rl.losses.batches import mixed_batch, rows, totals
from tests.rl.losses.trl_reference import trl_loss

# TRL's name, level, and the value of its epsilon_high for our clip_high of 0.28.
AS_IN_TRL = {name: (name, "token", 0.28) for name in ("dapo", "grpo", "dr_grpo", "bnpo")}
AS_IN_TRL |= {"gspo": ("grpo", "sequence", 0.28), "cispo": ("cispo", "token", 1.28)}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def ours_and_trls(
    name: str, inputs: LossInputs, options: LossOptions, cuts: list[slice]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], dict, dict]:
    """Loss and gradient of a step by us and by TRL, and the metrics of the last micro-batch of each."""
    step = totals(inputs, micro_batches=len(cuts))
    loss_type, level, epsilon_high = AS_IN_TRL[name]
    results, metrics, theirs_metrics = [], {}, {}
    for ours in (True, False):
        total = torch.zeros((), dtype=inputs.dtype)
        for cut in cuts:
            part = rows(inputs, cut)
            if ours:
                result = LOSSES[name](part, step, options)
                loss, metrics = result.loss, result.counts.metrics()
            else:
                loss, theirs_metrics = trl_loss(
                    part.logp_BT,
                    part.old_logp_BT,
                    part.advantages_B,
                    part.mask_BT,
                    loss_type=loss_type,
                    level=level,
                    epsilon_low=options.clip_low,
                    epsilon_high=epsilon_high,
                    delta=options.clip_delta,
                    beta=options.kl_weight,
                    kl_unbiased=options.kl_unbiased,
                    reference_logp_BT=part.reference_logp_BT,
                    weight=part.weight_BT,
                    step_tokens=step.tokens,
                    micro_batches=step.micro_batches,
                    max_new_tokens=step.max_new_tokens,
                )
            total = total + loss
        results.append((total.detach(), torch.autograd.grad(total, inputs.logp_BT)[0]))
    return results[0], results[1], metrics, theirs_metrics


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize(("kl_weight", "kl_unbiased"), [(0.0, True), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("weight", ["none", "token", "sequence"])
def test_loss_and_gradient_are_trls(name, dtype, delta, kl_weight, kl_unbiased, updated, weight) -> None:
    inputs = mixed_batch(dtype)
    if not updated:
        inputs = replace(inputs, old_logp_BT=None)
    if weight != "token":
        assert inputs.weight_BT is not None
        column_BT = inputs.weight_BT[:, :1].expand(inputs.logp_BT.shape)
        inputs = replace(inputs, weight_BT=None if weight == "none" else column_BT)
    options = LossOptions(clip_delta=delta, kl_weight=kl_weight, kl_unbiased=kl_unbiased)
    ours, theirs, _, _ = ours_and_trls(name, inputs, options, [slice(0, 6)])
    assert float(theirs[1].abs().max()) > 1e-3
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [[slice(0, 3), slice(3, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]])
def test_accumulated_over_micro_batches_they_are_trls_too(name: str, cuts) -> None:
    ours, theirs, _, _ = ours_and_trls(name, mixed_batch(), LossOptions(clip_delta=1.5, kl_weight=0.1), cuts)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_trls(name: str) -> None:
    inputs = mixed_batch()
    _, _, ours, theirs = ours_and_trls(name, inputs, LossOptions(kl_weight=0.1, kl_unbiased=False), [slice(0, 6)])
    assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-6)
    if name == "cispo":  # TRL has its own name for it
        theirs = {"clip_ratio/low_mean": 0.0} | dict.fromkeys(
            ("clip_ratio/high_mean", "clip_ratio/region_mean"), theirs["cispo_clip_ratio"]
        )
    # TRL counts the sequence that is masked out; ours are shares of those that take part.
    share = 6 / 5 if name == "gspo" else 1
    for metric in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert ours[metric] == pytest.approx(share * theirs[metric], abs=1e-6)
    assert ours["clip_ratio/high_mean"] > 0
    assert (ours["clip_ratio/low_mean"] > 0) == (name != "cispo")


def test_the_batch_reaches_what_it_is_to_compare() -> None:
    """Token and sequence ratios beyond every bound, on the side where the bound acts."""
    inputs = mixed_batch()
    assert inputs.old_logp_BT is not None
    ratio_BT = (inputs.logp_BT - inputs.old_logp_BT).detach().exp()
    mean_B = torch.where(inputs.mask_BT, ratio_BT.log(), 0).sum(1) / inputs.lengths_B1[:, 0]
    for ratio, counted in ((ratio_BT, inputs.mask_BT), (mean_B.exp()[:, None], inputs.mask_BT.any(1)[:, None])):
        positive = counted & (inputs.advantages_B1 > 0)
        negative = counted & (inputs.advantages_B1 < 0)
        assert bool((positive & (ratio > 1.28)).any())
        assert bool((negative & (ratio < 0.8)).any())
        assert bool((negative & (ratio > 1.5)).any())


def test_beyond_ten_nats_they_differ_on_purpose() -> None:
    """A token whose ratio is e^12 with negative advantage: TRL follows it with a gradient of 162755, we do not."""
    inputs = LossInputs(
        torch.zeros(1, 1, requires_grad=True), torch.tensor([[-12.0]]), torch.tensor([-1.0]), torch.tensor([[True]])
    )
    ours, theirs, _, _ = ours_and_trls("dapo", inputs, LossOptions(), [slice(0, 1)])
    assert ours[0].item() == pytest.approx(22026.47, rel=1e-6)
    assert theirs[0].item() == pytest.approx(162754.79, rel=1e-6)
    assert (ours[1].item(), theirs[1].item()) == (0.0, pytest.approx(162754.79, rel=1e-6))


def test_nan_in_padding_is_where_trl_loses_the_step() -> None:
    inputs = mixed_batch()
    spoilt = torch.where(inputs.mask_BT, inputs.logp_BT.detach(), torch.nan).requires_grad_()
    ours, theirs, _, _ = ours_and_trls("dapo", replace(inputs, logp_BT=spoilt), LossOptions(), [slice(0, 6)])
    assert bool(ours[1].isfinite().all())
    assert bool(theirs[0].isnan())


def test_counts_of_micro_batches_give_the_metrics_of_the_step() -> None:
    """TRL logs each micro-batch and averages; ours are those of all tokens, as TRL gives them for one batch."""
    inputs, options = mixed_batch(), LossOptions()
    step = totals(inputs, micro_batches=2)
    parts = [LOSSES["dapo"](rows(inputs, cut), step, options).counts for cut in (slice(0, 1), slice(1, 6))]
    _, _, _, theirs = ours_and_trls("dapo", inputs, options, [slice(0, 6)])
    assert TokenCounts.total(parts).metrics()["clip_ratio/region_mean"] == pytest.approx(
        theirs["clip_ratio/region_mean"]
    )
