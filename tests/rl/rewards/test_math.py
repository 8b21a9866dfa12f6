"""The reward `math` in its process. math-verify is an extra; without it these tests have nothing to test."""

import pytest

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards import IsolatedReward, resolve_reward
from qerl_compile.rl.tasks import Task

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def math_reward():
    reward = IsolatedReward("math", {"kind": "math"}, timeout=30.0).load()
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("so $\\boxed{\\frac{1}{2}}$", "0.5", 1.0),
        ("The answer is 1,000.", "1000", 1.0),
        ("$x = 3$", "3", 1.0),
        ("$\\{1, 2\\}$", "\\{2, 1\\}", 1.0),
        ("$\\sqrt{8}$", "2\\sqrt{2}", 1.0),
        ("$\\boxed{-3}$", "3", 0.0),
        ("I do not know", "3", 0.0),
        ("", "3", 0.0),
        ("3", "", None),
        ("so $x = 5$", "Then $2x = 10$ and $\\boxed{5}$.", 1.0),
        ("5", "1,000", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(math_reward, completion, answer, expected) -> None:
    messages = [{"role": "assistant", "content": completion}]
    assert math_reward(completions=[completion, messages], answer=[answer] * 2) == [expected] * 2


def test_the_reference_comes_first(math_reward) -> None:
    """math-verify takes an interval for an inequality that is the reference, and not the other way round."""
    assert math_reward(completions=["$(1, 2)$", "$1 < x < 2$"], answer=["1 < x < 2", "(1, 2)"]) == [1.0, 0.0]


def test_a_power_tower_is_a_timeout_and_costs_the_others_nothing() -> None:
    reward = IsolatedReward("math", {"kind": "math"}, timeout=3.0)
    outcomes = reward.outcomes(2, {"completions": ["$\\boxed{9^{9^{9^{9}}}-9^{9^{9}}}$", "$7$"], "answer": ["7", "7"]})
    reward.close()
    assert [(outcome.kind, outcome.value) for outcome in outcomes.each][1] == ("score", 1.0)
    assert outcomes.each[0].kind in ("timeout", "error")


def test_without_math_verify_the_message_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr("qerl_compile.rl.rewards.registry.find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"expected the package math-verify; .* pip install 'qerl-compile\[tasks\]'"):
        resolve_reward("math", Task.parse("rg:chain_sum"))
