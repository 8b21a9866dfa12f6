import pytest

from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.learning_rate import learning_rate


@pytest.mark.parametrize(
    "settings, rates",
    [
        # warm-up over 2 of 10 steps; then the peak, and 1/2 (1 + cos(pi i / 8)) of it for i = 1 .. 7
        ({"warmup_ratio": 0.2}, [0.5, 1.0, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
        ({"warmup_ratio": 0.2, "learning_rate_schedule": "constant"}, [0.5] + [1.0] * 9),
        ({"warmup_ratio": 0.0, "learning_rate_schedule": "constant"}, [1.0] * 10),
        ({"warmup_ratio": 1.0}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ({"warmup_ratio": 0.0, "steps": 4}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"warmup_ratio": 0.0, "steps": 1}, [1.0]),
        ({"warmup_ratio": 0.1, "steps": 1}, [1.0]),
    ],
)
def test_rate_of_every_step_as_a_share_of_the_peak(settings, rates):
    config = TrainConfig(**{"steps": 10, "learning_rate": 3e-4, **settings})
    got = [learning_rate(config, step) / 3e-4 for step in range(1, config.steps + 1)]
    assert got == pytest.approx(rates, abs=1e-6)


def test_no_step_trains_at_rate_zero():
    for steps in (1, 2, 3, 10, 600):
        for ratio in (0.0, 0.1, 0.5, 1.0):
            config = TrainConfig(steps=steps, warmup_ratio=ratio)
            assert all(0 < learning_rate(config, step) <= config.learning_rate for step in range(1, steps + 1))
