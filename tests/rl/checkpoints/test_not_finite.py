"""NaN and Inf in the middle of training; benchmarks/reliability.py injects a thousand."""

from tests.rl.checkpoints.not_finite import PLACES, inject_often


def test_no_parameter_ever_takes_a_number_that_is_not_finite(tmp_path):
    result = inject_often(20, tmp_path)
    assert set(result.injected) == {place.__name__ for place in PLACES}
    assert result.finite == result.injected
    dropped = "in_sampling_logps"  # that token counts for nothing, and the rest of the step does
    assert {**result.unchanged, dropped: 0} == {**result.injected, dropped: 0}
    for name in result.injected.keys() - {dropped}:
        assert result.counted.get(name, 0) + result.refused.get(name, 0) == result.injected[name]
    assert result.trained > 0
