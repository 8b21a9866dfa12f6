import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import TaskError
from qerl_compile.rl.tasks import Task, columns
from qerl_compile.rl.tasks.held_out import check_share, is_held_out, normalized
from qerl_compile.rl.tasks.options import parse_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=1", {"a": 1}),
        ("a=-1,b=+2", {"a": -1, "b": 2}),
        ("a=1:b=2", {"a": 1, "b": 2}),
        ("a=0.5,b=.5,c=1e-3,d=2.", {"a": 0.5, "b": 0.5, "c": 1e-3, "d": 2.0}),
        ("a=true, b=False", {"a": True, "b": False}),
        ("a=simple", {"a": "simple"}),
        ("operators=+|-", {"operators": ["+", "-"]}),
        ("operators=+|", {"operators": ["+"]}),
        ("a=1|2.5|x", {"a": [1, 2.5, "x"]}),
        ("a=__import__('os')", {"a": "__import__('os')"}),
        ("a=b=c", {"a": "b=c"}),
        ("a=nan", {"a": "nan"}),
    ],
)
def test_options_are_read_as_plain_values(text: str, expected: dict) -> None:
    options = parse_options(text, where="spec")
    assert options == expected
    assert [type(value) for value in options.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("text", ["a", "a=", "=1", ",", "a=1,", "a=1,a=2", "a=1::b=2"])
def test_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(TaskError, match=r"^rg:x:"):
        parse_options(text, where="rg:x")


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.integers() | st.booleans() | st.floats(0, 1)))
def test_options_survive_being_written_down(options: dict) -> None:
    assert parse_options(",".join(f"{k}={v}" for k, v in options.items()), where="") == options


@pytest.mark.parametrize("spec", ["", "gsm8k", "data.json", "file.jsonlx", "RG:chain_sum"])
def test_an_unknown_form_of_task_is_refused(spec: str) -> None:
    with pytest.raises(TaskError, match="Write rg:NAME"):
        Task.parse(spec)


def test_the_split_is_the_same_on_every_machine() -> None:
    sides = "".join("h" if is_held_out(f"What is {a} + 1?", 0.5) else "t" for a in range(16))
    assert sides == "thhhtthhhhtthtth"


@given(st.text(), st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_a_larger_share_keeps_what_a_smaller_one_held_out(question: str, a: float, b: float) -> None:
    assert is_held_out(question, max(a, b)) or not is_held_out(question, min(a, b))


def test_the_share_held_out_is_about_what_was_asked() -> None:
    held = sum(is_held_out(f"question {i}", 0.3) for i in range(10_000))
    assert 2_860 <= held <= 3_140  # three standard deviations


def test_spaces_do_not_make_another_question() -> None:
    assert normalized(" a\n b\tc ") == "a b c"
    assert is_held_out("What  is 3?\n", 0.4) == is_held_out("What is 3?", 0.4)


@pytest.mark.parametrize("share", [0, 1, -0.1, 0.95, "half", True, None, float("nan")])
def test_impossible_shares_are_refused(share: object) -> None:
    with pytest.raises(TaskError, match="held_out"):
        check_share(share, where="task")


def test_columns_hold_one_value_per_row_and_leave_the_prompt_out() -> None:
    rows = [{"prompt": "p", "answer": "1", "level": 3}, {"prompt": "q", "answer": "2"}]
    assert columns(rows) == {"answer": ["1", "2"], "level": [3, None]}
