import io

import pytest
from rich.console import Console

from qerl_compile.cli import console
from qerl_compile.cli.progress import WIDTH, describe, describe_evaluation, short, training_progress

ROW = {
    "step": 12,
    "reward": 0.34375,
    "frac_reward_zero_std": 0.5,
    "entropy": 1.6233,
    "grad_norm": 1.1932,
    "clip_ratio/region_mean": 0.0123,
    "sampling/sampling_logp_difference/mean": 0.04004,
    "completions/mean_length": 4.71875,
    "noise/sigma": 0.00717,
    "noise/sites": 60,
    "rollout/tokens_per_s": 289.24,
    "update/tokens_per_s": 1432.0,
    "step_time": 7.9015,
}
WIDEST = ROW | {
    "reward": -0.1234,
    "frac_reward_zero_std": 1.0,
    "entropy": 10.42,
    "grad_norm": 1.234e-05,
    "clip_ratio/region_mean": 0.001234,
    "sampling/sampling_logp_difference/mean": 1.234e-05,
    "completions/mean_length": 8191.5,
    "noise/sigma": 5.17e-4,
    "noise/sites": 160,
    "rollout/tokens_per_s": 123_456.0,
    "update/tokens_per_s": 123_456.0,
    "step_time": 12_345.6,
}


def test_the_line_of_a_step_has_every_signal():
    text = "reward 0.344 no-signal 50% H 1.62 |g| 1.19 clip 0.012 Δlogp 0.04 len 4.72 σ 0.0072×60 289+1.43k tok/s 7.9s"
    assert describe(ROW, width=len(text)) == text


@pytest.mark.parametrize("row", [ROW, WIDEST])
def test_it_fits_120_columns_with_step_and_time(row):
    text = describe(row)
    assert len(text) <= WIDTH
    assert len(f"9999/9999 {text} 1:23:45") <= 120
    for label in ("reward", "no-signal", "H ", "|g|", "Δlogp", "σ", "tok/s"):
        assert label in text


def test_what_is_longest_loses_lengths_first_and_then_clipping():
    everything = describe(ROW, width=1000)
    assert "len 4.72" in everything
    assert "clip 0.012" in everything
    one_less = describe(ROW, width=len(everything) - 1)
    assert "len" not in one_less
    assert "clip" in one_less
    assert "clip" not in describe(ROW, width=len(one_less) - 1)


def test_a_step_without_an_update_has_no_entropy_and_no_mismatch():
    row = {key: ROW[key] for key in ("step", "reward", "frac_reward_zero_std", "rollout/tokens_per_s", "step_time")}
    assert describe(row | {"grad_norm": 0.0}) == "reward 0.344 no-signal 50% |g| 0 289 tok/s 7.9s"


def test_a_reward_that_no_function_gave_is_no_number():
    assert describe(ROW | {"reward": float("nan")}).startswith("reward nan ")
    assert describe(ROW | {"reward": None}).startswith("reward none ")


def test_the_line_of_an_evaluation_has_every_accuracy_with_its_interval():
    row = {"step": 20, "eval/time": 2.34}
    for name, value in (("accuracy", 0.5), ("avg@8", 0.4), ("pass@8", 0.75)):
        row |= {f"eval/{name}": value, f"eval/{name}_low": value - 0.1, f"eval/{name}_high": value + 0.1}
    assert describe_evaluation(row) == (
        "step   20  held-out accuracy 50.0% [40.0%, 60.0%]  avg@8 40.0% [30.0%, 50.0%]  "
        "pass@8 75.0% [65.0%, 85.0%]  2.3 s"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.34375, "0.344"),
        (0.04004, "0.04"),
        (-1.0, "-1"),
        (0.000517, "5.2e-4"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (1.3e6, "1.3M"),
        (-9e9, "-9.0e9"),
        (1e12, "1.0e12"),
        (-0.001, "-0.001"),
        (-1.234e-9, "-1.2e-9"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, "none"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_evaluations_and_broken_steps_stay_on_the_terminal_and_steps_share_one_line(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "stderr", lambda: Console(file=out, width=120, soft_wrap=True))
    with training_progress(40) as show:
        show({"step": 0, "eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6, "eval/time": 1.0})
        show(ROW)
        show({"step": 13, "update/fault": "NaN in [the] loss"})
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:2] == [
        "step    0  held-out accuracy 50.0% [40.0%, 60.0%]  1.0 s",
        "step   13  no update: NaN in [the] loss",
    ]
    assert lines[2].startswith(f"12/40 {describe(ROW)}")
    assert len(lines) == 3
