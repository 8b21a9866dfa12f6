"""Turns, rounds and ratios under a clock that drifts, with a simulated GPU."""

import pytest

from benchmarks import gpu_timing


class FakeClock:
    """Time passes by `spend`; from one second to the next the GPU gets slower by `drift`."""

    def __init__(self, drift=0.0):
        self.us, self.drift, self.log = 0.0, drift, []

    def spend(self, name, us):
        self.log.append(name)
        self.us += us * (1 + self.drift * self.us / 1e6)

    def flush(self):
        self.spend("flush", 65)

    def now(self):
        return self.us

    def wait(self):
        self.log.append("wait")

    def us_between(self, begin, end):
        return end - begin


def works(clock, **us):
    return {name: (lambda name=name, time=time: clock.spend(name, time)) for name, time in us.items()}


def test_medians_and_extremes_are_microseconds_per_call():
    clock = FakeClock()
    times = gpu_timing.interleaved(works(clock, a=80.0, b=30.0), 5, clock, calls={"a": 8})
    assert times == {"a": [10.0, 10.0, 10.0], "b": [30.0, 30.0, 30.0]}


def test_a_clock_that_drifts_does_not_change_the_ratio():
    """Timed one after the other, with the same drift, the second would look 6 % slower than it is."""
    clock = FakeClock(drift=1.0)
    times = gpu_timing.interleaved(works(clock, a=2000.0, b=1000.0), 21, clock)
    assert times["a"][0] / times["b"][0] == pytest.approx(2.0, rel=0.01)
    assert times["a"][2] > 1.05 * times["a"][1]


def test_every_round_has_everyone_once_and_every_one_is_first_in_some_round():
    names = ["a", "b", "c"]
    rounds = [gpu_timing.order(names, turn) for turn in range(6)]
    assert all(sorted(each) == names for each in rounds)
    assert {each[0] for each in rounds} == set(names)
    assert gpu_timing.order([], 3) == []


def test_a_sample_is_preceded_by_overwriting_l2_and_untimed_work():
    clock = FakeClock()
    before = {"a": lambda: clock.spend("before", 500.0)}
    times = gpu_timing.interleaved(works(clock, a=10.0), 2, clock, before=before, drain=True)
    assert clock.log == ["before", "wait", "flush", "a", "wait"] * 2
    assert times["a"][0] == 10.0


def test_slow_competitors_take_part_in_few_rounds():
    clock = FakeClock()
    gpu_timing.interleaved(works(clock, a=1.0, slow=5000.0), 9, clock, fewer={"slow": 3})
    assert (clock.log.count("a"), clock.log.count("slow")) == (9, 3)


def test_copies_of_a_weight_exceed_l2_and_graphs_make_whole_turns():
    assert gpu_timing.copies_for(27648, 5120) == 2
    assert gpu_timing.copies_for(512, 3584) * 512 * 3584 * 0.5625 > 60e6
    assert len(gpu_timing.repeated([print] * 3, 8)) == 9
    assert len(gpu_timing.repeated([print] * 12, 8)) == 12
