import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import RecipeError
from qerl_compile.rl.noise_schedule import NoiseSchedule


@pytest.mark.parametrize(
    ("total", "stages"),
    [
        (30, [k for k in range(10) for _ in range(3)]),
        (100, [k for k in range(10) for _ in range(10)]),
        (10, list(range(10))),
        (7, [0, 1, 2, 4, 5, 7, 8]),
        (13, [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]),
        (1, [0]),
    ],
)
def test_stages_of_a_run(total: int, stages: list[int]) -> None:
    schedule = NoiseSchedule(total)
    assert [schedule.stage(step) for step in range(1, total + 1)] == stages


def test_sigma_of_each_stage_in_the_released_scripts() -> None:
    """1e-2 to 1e-4 in nine noisy stages: the numbers printed by QeRL's own schedule (method.md 1.4)."""
    schedule = NoiseSchedule(10, sigma_start=1e-2, sigma_end=1e-4)
    sigmas = [schedule.sigma(step) for step in range(1, 11)]
    expected = [0, 1e-2, 5.6234e-3, 3.1623e-3, 1.7783e-3, 1e-3, 5.6234e-4, 3.1623e-4, 1.7783e-4, 1e-4]
    assert sigmas == pytest.approx(expected, rel=1e-4)


def test_sigma_with_the_papers_values() -> None:
    """1e-2 to 5e-4: each stage is the one before times 20 ** (-1/8) = 0.687656."""
    schedule = NoiseSchedule(30)
    expected = [0, 1e-2, 6.8766e-3, 4.7287e-3, 3.2517e-3, 2.2361e-3, 1.5376e-3, 1.0574e-3, 7.2711e-4, 5e-4]
    assert [schedule.sigma(3 * k + 1) for k in range(10)] == pytest.approx(expected, rel=1e-4)
    assert [schedule.sigma(step) for step in (1, 2, 3)] == [0.0] * 3
    assert schedule.sigma(28) == schedule.sigma(30) == pytest.approx(5e-4, rel=1e-12)


def test_few_steps_pass_over_stages_and_miss_the_last() -> None:
    schedule = NoiseSchedule(7)
    assert [schedule.sigma(s) for s in range(1, 8)] == pytest.approx(
        [0, 1e-2, 6.8766e-3, 3.2517e-3, 2.2361e-3, 1.0574e-3, 7.2711e-4], rel=1e-4
    )


def test_two_stages_are_off_and_start() -> None:
    schedule = NoiseSchedule(4, stages=2)
    assert [schedule.sigma(step) for step in range(1, 5)] == [0.0, 0.0, 1e-2, 1e-2]


@given(st.integers(1, 500), st.integers(2, 30))
def test_stages_rise_evenly_and_noise_only_falls(total: int, stages: int) -> None:
    schedule = NoiseSchedule(total, stages=stages)
    ks = [schedule.stage(step) for step in range(1, total + 1)]
    assert ks[0] == 0
    assert ks == sorted(ks)
    assert ks[-1] == (stages - 1 if total >= stages else (total - 1) * stages // total)
    lengths = [ks.count(k) for k in range(stages)]
    assert max(lengths) - min(lengths) <= 1
    noisy = [schedule.sigma(step) for step in range(1, total + 1) if schedule.stage(step) > 0]
    assert noisy == sorted(noisy, reverse=True)
    assert all(5e-4 * (1 - 1e-12) <= sigma <= 1e-2 for sigma in noisy)


@pytest.mark.parametrize("step", [0, -1, 31])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.30"):
        NoiseSchedule(30).sigma(step)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_steps", 0),
        ("stages", 1),
        ("sigma_start", 0.0),
        ("sigma_start", -1e-2),
        ("sigma_end", math.nan),
        ("sigma_end", math.inf),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    fields = {"total_steps": 30, "stages": 10, "sigma_start": 1e-2, "sigma_end": 5e-4, field: value}
    with pytest.raises(RecipeError, match=f"noise.{field}"):
        NoiseSchedule(int(fields["total_steps"]), int(fields["stages"]), fields["sigma_start"], fields["sigma_end"])
