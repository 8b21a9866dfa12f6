import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import RecipeError
from qerl_compile.recipe import NoiseConfig, Recipe
from qerl_compile.rl.noise_schedule import COURSES, EXPONENTS, NoiseSchedule


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


def test_sigma_of_each_stage_as_equation_8_is_printed() -> None:
    """1e-2 to 5e-4 by (k-1)/(K-1): the numbers of method.md 1.4, which stop short of 5e-4."""
    schedule = NoiseSchedule(10, exponent="paper")
    expected = [0, 1e-2, 0.717e-2, 0.514e-2, 0.368e-2, 0.264e-2, 0.189e-2, 0.136e-2, 0.097e-2, 0.070e-2]
    assert [schedule.sigma(step) for step in range(1, 11)] == pytest.approx(expected, abs=5.1e-6)


TABLES = {
    ("exponential", "released"): [10.0, 6.8766, 4.7287, 3.2517, 2.2361, 1.5376, 1.0574, 0.7271, 0.5],
    ("linear", "released"): [10.0, 8.8125, 7.625, 6.4375, 5.25, 4.0625, 2.875, 1.6875, 0.5],
    ("cosine", "released"): [10.0, 9.6384, 8.6088, 7.0677, 5.25, 3.4323, 1.8912, 0.8616, 0.5],
    ("logarithmic", "released"): [10.0, 7.0031, 5.25, 4.0062, 3.0414, 2.2531, 1.5866, 1.0093, 0.5],
    ("exponential", "paper"): [10.0, 7.1687, 5.139, 3.684, 2.641, 1.8932, 1.3572, 0.9729, 0.6975],
    ("linear", "paper"): [10.0, 8.9444, 7.8889, 6.8333, 5.7778, 4.7222, 3.6667, 2.6111, 1.5556],
    ("cosine", "paper"): [10.0, 9.7135, 8.8887, 7.625, 6.0748, 4.4252, 2.875, 1.6113, 0.7865],
    ("logarithmic", "paper"): [10.0, 7.1402, 5.4673, 4.2804, 3.3598, 2.6076, 1.9716, 1.4206, 0.9347],
}
"""1000 * sigma of the stages 1 to 9, from 1e-2 towards 5e-4."""


@pytest.mark.parametrize(("course", "exponent"), TABLES)
def test_sigma_of_each_stage_of_every_course(course, exponent) -> None:
    schedule = NoiseSchedule(30, course=course, exponent=exponent)
    assert [schedule.sigma(step) for step in (1, 2, 3)] == [0.0] * 3
    for offset in range(3):  # all steps of a stage have one sigma
        sigmas = [1000 * schedule.sigma(3 * k + 1 + offset) for k in range(1, 10)]
        assert sigmas == pytest.approx(TABLES[course, exponent], abs=5.1e-5)


def test_few_steps_pass_over_stages_and_miss_the_last() -> None:
    schedule = NoiseSchedule(7)
    assert [schedule.sigma(s) for s in range(1, 8)] == pytest.approx(
        [0, 1e-2, 6.8766e-3, 3.2517e-3, 2.2361e-3, 1.0574e-3, 7.2711e-4], rel=1e-4
    )


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_two_stages_are_off_and_start(course, exponent) -> None:
    schedule = NoiseSchedule(4, stages=2, course=course, exponent=exponent)
    assert [schedule.sigma(step) for step in range(1, 5)] == [0.0, 0.0, 1e-2, 1e-2]


@given(st.integers(1, 500), st.integers(2, 30), st.sampled_from(COURSES), st.sampled_from(EXPONENTS))
def test_stages_rise_evenly_and_noise_only_falls(total: int, stages: int, course, exponent) -> None:
    schedule = NoiseSchedule(total, stages=stages, course=course, exponent=exponent)
    ks = [schedule.stage(step) for step in range(1, total + 1)]
    assert ks[0] == 0
    assert ks == sorted(ks)
    assert ks[-1] == (stages - 1 if total >= stages else (total - 1) * stages // total)
    lengths = [ks.count(k) for k in range(stages)]
    assert max(lengths) - min(lengths) <= 1
    noisy = [schedule.sigma(step) for step in range(1, total + 1) if schedule.stage(step) > 0]
    assert noisy == sorted(noisy, reverse=True)
    assert all(5e-4 * (1 - 1e-12) <= sigma <= 1e-2 for sigma in noisy)
    if total >= stages:
        assert noisy[0] == 1e-2
        reaches = exponent == "released" and stages > 2
        assert (abs(noisy[-1] - 5e-4) < 1e-12) == reaches


@pytest.mark.parametrize("course", ["linear", "cosine", "logarithmic"])
def test_courses_other_than_the_geometric_one_may_end_at_zero(course) -> None:
    schedule = NoiseSchedule(10, sigma_end=0.0, course=course)
    assert schedule.sigma(9) > 0
    assert abs(schedule.sigma(10)) < 1e-17


def test_a_constant_noise_is_a_schedule_that_starts_where_it_ends() -> None:
    for course in COURSES:
        schedule = NoiseSchedule(5, stages=5, sigma_start=1e-3, sigma_end=1e-3, course=course)
        assert [schedule.sigma(step) for step in range(1, 6)] == pytest.approx([0, *[1e-3] * 4], rel=1e-12)


def test_a_recipe_gives_the_schedule_of_its_fields() -> None:
    noise = NoiseConfig(sigma_start=2e-2, sigma_end=1e-3, stages=4, schedule="cosine", exponent="paper")
    assert NoiseSchedule.of(noise, 8) == NoiseSchedule(8, 4, 2e-2, 1e-3, "cosine", "paper")


def test_a_recipe_without_noise_or_with_noise_off_has_no_schedule() -> None:
    assert NoiseSchedule.of(Recipe.named("bf16-lora").noise, 8) is None
    assert NoiseSchedule.of(NoiseConfig(enabled=False), 8) is None
    assert NoiseSchedule.of(NoiseConfig(sigma_start=0.0, sigma_end=0.0), 8) is None
    assert NoiseSchedule.of(Recipe.named("bf16-lora-aqn").noise, 8) == NoiseSchedule(8)


@pytest.mark.parametrize("step", [0, -1, 31])
def test_steps_outside_the_run_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.30"):
        NoiseSchedule(30).sigma(step)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_steps": 0}, "noise.total_steps: expected a whole number >= 1; got 0"),
        ({"stages": 1}, "noise.stages: expected a whole number >= 2; got 1"),
        ({"sigma_start": 0.0}, "noise.sigma_start: expected a finite number > 0; got 0.0"),
        ({"sigma_start": -1e-2}, "noise.sigma_start: expected a finite number > 0; got -0.01"),
        ({"sigma_start": math.inf}, "noise.sigma_start: expected a finite number > 0; got inf"),
        ({"sigma_end": math.nan}, "noise.sigma_end: expected a number from 0 to sigma_start = 0.01; got nan"),
        ({"sigma_end": 0.02}, "noise.sigma_end: expected a number from 0 to sigma_start = 0.01; got 0.02"),
        ({"sigma_end": -1e-3, "course": "linear"}, "noise.sigma_end: expected a number from 0"),
        ({"sigma_end": 0.0}, "noise.sigma_end: expected a number > 0 for an exponential schedule; got 0.0"),
        (
            {"course": "square"},
            "noise.schedule: expected one of exponential, linear, cosine, logarithmic; got 'square'",
        ),
        ({"exponent": "mine"}, "noise.exponent: expected one of released, paper; got 'mine'"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message: str) -> None:
    with pytest.raises(RecipeError) as fault:
        NoiseSchedule(**{"total_steps": 30, **fields})
    assert message in str(fault.value)
