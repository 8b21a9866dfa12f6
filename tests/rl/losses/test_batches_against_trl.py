"""Our advantages, corrections and totals next to TRL 1.16's own code. The differences: docs/losses.md."""

import math

import pytest
import torch

from qerl_compile.rl.advantages import group_advantages
from qerl_compile.rl.losses import correct
from tests.rl.losses.trl_reference import trl_batch

NAN = math.nan
REWARDS = {
    "graded": [1.0, 0.0, 0.5, 0.25, 2.0, -1.0, 0.0, 0.1],
    "a group without signal": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
    "no signal at all": [0.1] * 8,
    "some rewards do not apply": [1.0, NAN, 0.0, 0.5, NAN, 1.0, 1.0, 0.0],
    "one reward is left in a group": [1.0, NAN, NAN, NAN, 0.0, 1.0, 1.0, 0.0],
}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("case", REWARDS)
def test_advantages_are_trls(scale, case: str) -> None:
    rewards_N = torch.tensor(REWARDS[case], dtype=torch.float64)
    ours = group_advantages(rewards_N, 4, scale)
    output, metrics = trl_batch(rewards_N[:, None], 4, scale=scale)
    torch.testing.assert_close(ours.advantages_N, output["advantages"].float(), rtol=0, atol=1e-6)
    # TRL looks at the batch with scale "batch", and does not flag a group with a single reward.
    if scale != "batch" and case != "one reward is left in a group":
        assert ours.frac_reward_zero_std == metrics["frac_reward_zero_std"]


LENGTHS, WIDTH = [5, 3, 1, 4], 5
MODES = [(how, level) for how in ("truncate", "mask") for level in ("token", "sequence")]


def log_probabilities() -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's and the sampler's, far apart in places; two tokens are unknown to the sampler."""
    generator = torch.Generator().manual_seed(0)
    logp_BT = -torch.rand(4, WIDTH, generator=generator) - 0.1
    sampling_BT = logp_BT + 1.2 * torch.randn(4, WIDTH, generator=generator)
    sampling_BT[0, 2] = sampling_BT[3, 0] = NAN
    return logp_BT, sampling_BT


@pytest.mark.parametrize(("how", "level"), MODES)
@pytest.mark.parametrize("cap", [1.2, 3.0])
def test_importance_weights_and_their_metrics_are_trls(how, level, cap: float) -> None:
    logp_BT, sampling_BT = log_probabilities()
    recorded = [
        [None if math.isnan(x) else x for x in row[:n]] for row, n in zip(sampling_BT.tolist(), LENGTHS, strict=True)
    ]
    output, metrics = trl_batch(
        torch.zeros(4, 1),
        2,
        lengths=LENGTHS,
        logp_NT=logp_BT,
        sampling_logps=recorded,
        mode=f"{level}_{how}",
        cap=cap,
        floor=1 / cap if how == "mask" else None,
    )
    mask_BT = output["completion_mask"].bool()
    result = correct(logp_BT, sampling_BT, mask_BT, how=how, level=level, cap=cap)
    assert result.weight_BT is not None
    theirs_BT = output["importance_sampling_ratio"].expand_as(result.weight_BT)
    torch.testing.assert_close(result.weight_BT[mask_BT], theirs_BT[mask_BT], rtol=0, atol=1e-6)
    ours = result.mismatch.metrics()
    for name in (f"importance_sampling_ratio/{x}" for x in ("min", "mean", "max")):
        assert ours[f"sampling/{name}"] == pytest.approx(metrics[f"sampling/{name}"], abs=1e-6)
    for name in ("sampling_logp_difference/mean", "sampling_logp_difference/max"):
        assert ours[f"sampling/{name}"] == pytest.approx(metrics[f"sampling/{name}"], abs=1e-6)
    assert 0 < ours["sampling/corrected_tokens"] < 1  # the case has both kinds


def test_totals_count_tokens_in_masks_and_all_sequences() -> None:
    """`num_items_in_batch`, TRL's denominator of dapo and cispo, leaves out truncated completions that are masked."""
    output, _ = trl_batch(torch.zeros(4, 1), 2, lengths=LENGTHS, truncated=[True, False, False, True])
    assert int(output["num_items_in_batch"]) == 3 + 1 == int(output["completion_mask"].sum())
    assert len(output["completion_mask"]) == 4
