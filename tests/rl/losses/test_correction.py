import math

import pytest
import torch

from qerl_compile.rl.losses import Mismatch, correct

LN = math.log
# Two completions: token ratios 2, 5, 0.5 (product 5) and 0.2 (of a width of 3); the rest is padding.
SAMPLING = torch.tensor([[-1 - LN(2), -1 - LN(5), -1 + LN(2)], [-1 + LN(5), 0.0, 0.0]])
LOGP = torch.where(SAMPLING == 0, 0.0, -1.0)
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("how", "level", "expected", "corrected"),
    [
        ("truncate", "token", [[2, 3, 0.5], [0.2, 1, 1]], 1 / 4),
        ("mask", "token", [[2, 0, 0.5], [0, 1, 1]], 2 / 4),
        ("truncate", "sequence", [[3, 3, 3], [0.2, 1, 1]], 3 / 4),
        ("mask", "sequence", [[0, 0, 0], [0, 1, 1]], 4 / 4),
    ],
)
def test_weights_by_hand(how, level, expected, corrected: float) -> None:
    result = correct(LOGP, SAMPLING, MASK, how=how, level=level, cap=3.0)
    assert result.weight_BT is not None
    torch.testing.assert_close(result.weight_BT, torch.tensor(expected, dtype=torch.float32))
    assert result.mismatch.metrics()["sampling/corrected_tokens"] == corrected


def test_ratios_just_inside_both_bounds_are_kept() -> None:
    sampling = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    logp = torch.tensor([[LN(4), -LN(4)]], dtype=torch.float64)
    weight_BT = correct(logp, sampling, sampling == 0, how="mask", cap=4.000000001).weight_BT
    assert weight_BT is not None
    torch.testing.assert_close(weight_BT, torch.tensor([[4.0, 0.25]]))


def test_none_gives_no_weights_and_measures_the_raw_ratios() -> None:
    result = correct(LOGP, SAMPLING, MASK)
    assert result.weight_BT is None
    metrics = result.mismatch.metrics()
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(5)
    assert metrics["sampling/corrected_tokens"] == 0


def test_the_mismatch_by_hand() -> None:
    """Log ratios ln 2, ln 5, -ln 2, -ln 5 of trainer over sampler: k1 is 0; k3 is the mean of ratio - 1 then."""
    assert correct(LOGP, SAMPLING, MASK, how="truncate", cap=3.0).mismatch.metrics() == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": (2 * LN(2) + 2 * LN(5)) / 4,
            "sampling/sampling_logp_difference/max": LN(5),
            "sampling/mismatch_kl/k1": 0.0,
            "sampling/mismatch_kl/k3": (2 + 5 + 0.5 + 0.2) / 4 - 1,
            "sampling/importance_sampling_ratio/min": 0.2,
            "sampling/importance_sampling_ratio/mean": (2 + 3 + 0.5 + 0.2) / 4,
            "sampling/importance_sampling_ratio/max": 3.0,
            "sampling/corrected_tokens": 0.25,
        },
        abs=1e-6,
    )


def test_sequence_ratios_are_counted_once_a_sequence() -> None:
    metrics = correct(LOGP, SAMPLING, MASK, level="sequence").mismatch.metrics()
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx((5 + 0.2) / 2)


def test_the_kl_estimates_converge_to_the_kl_from_sampler_to_trainer() -> None:
    """Every token of a vocabulary as often as the sampler draws it: 5, 3 and 2 times in ten."""
    sampler, trainer = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    drawn = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])
    metrics = correct(trainer[drawn], sampler[drawn], torch.ones_like(drawn, dtype=torch.bool)).mismatch.metrics()
    exact = 0.5 * LN(0.5 / 0.2) + 0.2 * LN(0.2 / 0.5)
    assert metrics["sampling/mismatch_kl/k1"] == pytest.approx(exact, abs=1e-6)
    assert metrics["sampling/mismatch_kl/k3"] == pytest.approx(exact, abs=1e-6)


def test_micro_batches_add_up() -> None:
    logp = torch.cat([LOGP, LOGP - 0.3])
    sampling, mask = torch.cat([SAMPLING, SAMPLING]), torch.cat([MASK, MASK])
    whole = correct(logp, sampling, mask, how="mask")
    parts = [correct(logp[cut], sampling[cut], mask[cut], how="mask") for cut in (slice(0, 1), slice(1, 4))]
    weights = [part.weight_BT for part in parts if part.weight_BT is not None]
    assert whole.weight_BT is not None
    assert torch.equal(torch.cat(weights), whole.weight_BT)
    assert Mismatch.total(part.mismatch for part in parts).metrics() == pytest.approx(whole.mismatch.metrics())


def test_no_micro_batch_adds_nothing() -> None:
    some = correct(LOGP, SAMPLING, MASK, how="mask").mismatch
    assert set(Mismatch.total([]).metrics().values()) == {0.0}
    assert (Mismatch.total([]) + some).metrics() == some.metrics()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_padding_never_reaches_weights_or_mismatch(level, bad: float) -> None:
    clean = correct(LOGP, SAMPLING, MASK, how="truncate", level=level)
    logp, sampling = torch.where(MASK, LOGP, bad), torch.where(MASK, SAMPLING, bad)
    dirty = correct(logp, sampling, MASK, how="truncate", level=level)
    assert clean.weight_BT is not None
    assert dirty.weight_BT is not None
    assert torch.equal(dirty.weight_BT, clean.weight_BT)
    assert dirty.mismatch.metrics() == clean.mismatch.metrics()


def test_a_token_that_the_engine_could_not_score_has_weight_one_and_is_not_compared() -> None:
    sampling = torch.tensor([[-1.0 - LN(2), math.nan]])
    result = correct(torch.tensor([[-1.0, -1.0]]), sampling, torch.ones(1, 2, dtype=torch.bool), how="truncate")
    assert result.weight_BT is not None
    torch.testing.assert_close(result.weight_BT, torch.tensor([[2.0, 1.0]]))
    assert result.mismatch.metrics()["sampling/sampling_logp_difference/mean"] == pytest.approx(LN(2))


def test_a_nan_of_the_trainer_is_not_hidden() -> None:
    result = correct(torch.tensor([[math.nan]]), torch.zeros(1, 1), torch.tensor([[True]]), how="truncate")
    assert result.weight_BT is not None
    assert math.isnan(result.weight_BT.item())
    assert math.isnan(result.mismatch.metrics()["sampling/sampling_logp_difference/max"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_far_ratios_overflow_nowhere(level) -> None:
    logp = torch.tensor([[0.0, 0.0], [-400.0, -400.0]])
    result = correct(logp, logp.flip(0), torch.ones(2, 2, dtype=torch.bool), how="truncate", level=level)
    assert result.weight_BT is not None
    torch.testing.assert_close(result.weight_BT, torch.tensor([[3.0, 3.0], [math.exp(-10)] * 2]))
    assert all(math.isfinite(value) for value in result.mismatch.metrics().values())


def test_nothing_to_compare_is_zero_everywhere() -> None:
    result = correct(LOGP, SAMPLING, torch.zeros_like(MASK), how="mask", level="sequence")
    assert result.weight_BT is not None
    assert torch.equal(result.weight_BT, torch.ones(2, 3))
    assert set(result.mismatch.metrics().values()) == {0.0}


def test_weights_have_no_gradient() -> None:
    weight_BT = correct(LOGP.clone().requires_grad_(), SAMPLING, MASK, how="truncate").weight_BT
    assert weight_BT is not None
    assert not weight_BT.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_logp_BT": SAMPLING[:1]}, "three tensors"),
        ({"mask_BT": MASK.int()}, "the mask boolean"),
        ({"logp_BT": LOGP[0], "sampling_logp_BT": SAMPLING[0], "mask_BT": MASK[0]}, "three tensors"),
        ({"how": "clip"}, "got 'clip', 'token' and 3.0"),
        ({"level": "group"}, "got 'none', 'group' and 3.0"),
        ({"cap": 0.5}, "got 'none', 'token' and 0.5"),
        ({"cap": math.nan}, "and nan"),
    ],
)
def test_other_arguments_are_refused(change, message: str) -> None:
    arguments = {"logp_BT": LOGP, "sampling_logp_BT": SAMPLING, "mask_BT": MASK} | change
    with pytest.raises(ValueError, match=message):
        correct(**arguments)
