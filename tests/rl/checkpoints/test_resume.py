"""A trainer that was stopped goes on bit by bit; benchmarks/reliability.py does it at ten points of 40 steps."""

import random

import pytest

from qerl_compile.rl.trainer import Stopped
from tests.rl.checkpoints.training import recipe, seed_of_process, sigterm_often, stopped_after, train


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__updates_per_rollout": 2, "train__loss": "gspo"},
        {"noise__in_update": True},
        {"train__optimizer": "adamw_8bit", "train__rollout_cache": "freed"},
    ],
    ids=["default", "two updates", "noise in the update", "8-bit moments, a cache that is freed"],
)
def test_a_run_that_is_stopped_at_any_step_ends_like_one_that_is_not(tmp_path, changes):
    rules = recipe(5, **changes)
    seed_of_process()
    straight = train(tmp_path / "straight", rules)
    steps = [row["step"] for row in straight.rows if "reward" in row]
    assert steps == [1, 2, 3, 4, 5]
    for stop in (0, 1, 3, 4):
        seed_of_process()
        assert stopped_after(tmp_path / str(stop), rules, stop).differences(straight) == []


def by_chance(completions, **_):
    """A reward that draws from the generator of the process."""
    return [random.random() for _ in completions]  # noqa: S311


@pytest.mark.parametrize("question", [5, 6], ids=["between rollout and update", "after the step"])
def test_generators_of_a_checkpoint_are_those_after_its_step_and_not_in_the_middle_of_the_next(tmp_path, question):
    """The run asks twice a step whether it should stop; what a step that is abandoned drew is drawn again."""
    rules = recipe(4, train__eval_every=0)
    seed_of_process()
    straight = train(tmp_path / "straight", rules, rewards=[by_chance])
    seed_of_process()
    asked = iter(range(1, 100))
    with pytest.raises(Stopped):
        train(tmp_path / "run", rules, stop=lambda _: next(asked) == question, rewards=[by_chance])
    random.seed(99)
    assert train(tmp_path / "run", rules, rewards=[by_chance]).differences(straight) == []


def test_sigterm_ends_with_143_and_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    result = sigterm_often(tmp_path, 3, steps=8)
    assert result.codes == {143: 3}
    assert result.same_as_uninterrupted == result.runs
