"""Every hostile reward: the right outcome, the others unharmed, the next call fine, nothing left behind."""

import uuid
from pathlib import Path

import pytest

from qerl_compile.rl.rewards.isolated import IsolatedReward
from tests.rl.rewards import hostile
from tests.rl.rewards.hostile import CASES, Case
from tests.rl.rewards.marked import NAME, left_behind, marked

TIMEOUT_S = 1.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_reward_harms_only_its_own_completion(case: Case, monkeypatch, tmp_path) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(NAME, mark)
    monkeypatch.chdir(tmp_path)
    function = {"kind": "file", "path": str(Path(hostile.__file__)), "name": case.name}
    reward = IsolatedReward("r", function, timeout=TIMEOUT_S)
    try:
        assert reward.load().__name__ == case.name
        good, bad = reward.outcomes(2, {"completions": ["bad", "fine"]}).each[::-1]
        assert case.is_right(bad.kind, bad.message), bad
        assert (bad.value, bool(bad.message)) == (expected_value(case), case.kind != "score")
        if case.costs_all:
            assert good == bad
        else:
            assert (good.kind, good.value) == ("score", 1.0 if case.name == "booleans" else 4.0)
        for _ in range(2):
            again = reward.outcomes(2, {"completions": ["a", "ab"]}).each
            assert [(o.kind, o.value) for o in again] == [("score", 1.0), ("score", 2.0)]
        if case.name != "leaves_a_child":  # its parent lives; it may be a helper that the function keeps
            assert len(marked(mark)) == 2  # supervisor and worker
    finally:
        reward.close()
    assert left_behind(mark) == []
    assert list(tmp_path.iterdir()) == []


def expected_value(case: Case) -> float | None:
    if case.kind != "score" or case.name == "none":
        return None
    return 1.0 if case.name == "booleans" else 3.0
