"""Each diagnosis from a step that has it, none from a step that can teach something, and each told once."""

import pytest

from qerl_compile.rl.diagnosis import Sample, Watch, diagnose

HEALTHY = {
    "reward": 0.4,
    "frac_reward_zero_std": 0.5,
    "grad_norm": 1.0,
    "entropy": 1.2,
    "completions/clipped_ratio": 0.5,
}
FLAT = HEALTHY | {"reward": 0.0, "frac_reward_zero_std": 1.0, "grad_norm": 0.0}


def samples(*texts, answer="3", reward=0.0):
    """Two prompts with half of the texts each."""
    half = len(texts) // 2
    return [Sample(f"prompt {i >= half}", text, reward, answer) for i, text in enumerate(texts)]


SPOKEN = samples("it is 4", "it is 5", "it is 6", "it is 7")


FAILED = FLAT | {"reward": float("nan"), "rewards/f/timeouts": 3, "rewards/g/errors": 1}
SOLVED = FLAT | {"reward": 1.0}
CUT_OFF = FLAT | {"completions/clipped_ratio": 1.0}
WORDLESS = samples("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("row", "texts", "name", "words"),
    [
        (FLAT | {"reward": None}, SPOKEN, "reward_failing", "no reward function applied"),
        (FAILED, SPOKEN, "reward_failing", "9 timeouts and 3 errors"),
        (SOLVED, samples("3", "3", "3", "3", reward=1.0), "constant_reward", "every completion got reward 1."),
        (CUT_OFF, WORDLESS, "all_truncated", "cut off at train.max_new_tokens"),
        (FLAT, WORDLESS, "parser_never_matched", "'final' found an answer in none of 4 completions"),
        (FLAT, samples("4", "4", "4", "4"), "collapsed", "all 2 prompts got one and the same"),
        (FLAT, samples("4", "4", "5", "5"), "collapsed", "all samples of a prompt were the same"),
        (FLAT, SPOKEN, "constant_reward", "every completion got reward 0"),
        (FLAT | {"reward": 0.2}, SPOKEN, "constant_reward", "got reward 0.2"),
        (HEALTHY | {"grad_norm": 0.0}, SPOKEN, "no_gradient", "the gradient was exactly 0"),
    ],
)
def test_each_cause_has_its_name(row, texts, name, words):
    found = diagnose([row] * 3, texts, "final")
    assert found is not None
    assert found.name == name
    assert words in found.explanation
    assert found.advice.endswith(".")
    assert len(found.samples) == 3
    assert set(found.samples) <= set(texts)


def test_one_step_with_signal_and_gradient_is_enough_to_go_on():
    assert diagnose([FLAT, FLAT, HEALTHY], samples("a", "a", "a", "a"), "final") is None
    odd = HEALTHY | {"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 0.99}
    assert diagnose([odd], samples("a", "a", "a", "a"), "final") is None


def test_a_gradient_that_is_not_finite_is_another_fault():
    assert diagnose([HEALTHY | {"grad_norm": None}] * 2, SPOKEN, "final") is None


def test_steps_that_broke_off_are_another_fault():
    assert diagnose([FLAT, {"step": 2, "update/fault": "NaN in logits"}], SPOKEN, "final") is None


def test_rewards_that_are_constant_only_within_groups_are_said_to_be_so():
    found = diagnose([FLAT | {"reward": 0.25}, FLAT | {"reward": 0.5}], SPOKEN, "final")
    assert found is not None
    assert "means 0.25 to 0.5" in found.explanation
    assert "group_size" in found.advice


def test_one_answer_that_was_found_acquits_the_parser_and_no_extractor_is_not_asked():
    found = diagnose([FLAT], samples("a", "b", "c", "so 12"), "final")
    assert found is not None
    assert found.name == "constant_reward"
    assert diagnose([FLAT], samples("a", "b", "c", "d"), None).name == "constant_reward"


def test_text_answers_are_looked_for_as_text():
    found = diagnose([FLAT], samples("red", "green", "blue", "grey", answer="pink"), "final")
    assert found is not None
    assert found.name == "constant_reward"


def test_a_step_without_samples_can_still_be_diagnosed():
    assert diagnose([FLAT], [], "final").name == "constant_reward"
    assert diagnose([FLAT], [], "final").samples == ()


def test_the_text_shows_three_completions_cut_and_harmless():
    texts = samples("\x1b[31mred", "x" * 5000, "c", "d", "e", "f")
    lines = str(diagnose([FLAT], texts, "marked")).splitlines()
    assert lines[0].startswith("parser_never_matched: ")
    assert len(lines) == 4
    assert "'\\x1b[31mred'" in lines[1]
    assert all(len(line) < 300 for line in lines)


def test_a_watch_waits_for_its_window_speaks_once_and_again_after_a_change():
    watch = Watch("final", window=2)
    told = [watch(FLAT, SPOKEN) for _ in range(4)]
    assert [each is not None for each in told] == [False, True, False, False]
    assert watch(HEALTHY, SPOKEN) is None
    assert watch(FLAT, SPOKEN) is None  # the healthy step is still in the window
    assert watch(FLAT, SPOKEN).name == "constant_reward"
    truncated = FLAT | {"completions/clipped_ratio": 1.0}
    assert watch(truncated, SPOKEN) is None  # still constant_reward, and told already
    assert watch(truncated, SPOKEN).name == "all_truncated"
