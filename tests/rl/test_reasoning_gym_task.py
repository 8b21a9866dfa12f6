import sys

import pytest

from qerl_compile.errors import TaskError
from qerl_compile.rl.tasks import Task
from qerl_compile.rl.tasks.reasoning_gym import ReasoningGymTask

SMALL = "rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"


@pytest.fixture(scope="module")
def small() -> ReasoningGymTask:
    task = Task.parse(SMALL)
    assert isinstance(task, ReasoningGymTask)
    return task


def test_a_row_has_trl_columns(small: ReasoningGymTask) -> None:
    row = small.train_row(seed=1, position=0)
    assert set(row) == {"prompt", "question", "answer", "metadata"}
    assert row["prompt"] == [{"role": "user", "content": row["question"]}]
    a, op, b = row["metadata"]["expression"].split()
    assert int(row["answer"]) == (int(a) + int(b) if op == "+" else int(a) - int(b))


def test_rows_depend_on_seed_and_position_only(small: ReasoningGymTask) -> None:
    forward = small.train_rows(7, 0, 40)
    fresh = Task.parse(SMALL)
    assert [fresh.train_row(7, position) for position in reversed(range(40))] == forward[::-1]
    assert [row["question"] for row in small.train_rows(8, 0, 40)] != [row["question"] for row in forward]


def test_positions_go_on_across_blocks(small: ReasoningGymTask) -> None:
    rows = small.train_rows(3, 250, 12)  # a block has 256 positions
    assert len({row["question"] for row in rows}) > 6


def test_neighbouring_seeds_are_not_shifted_copies(small: ReasoningGymTask) -> None:
    a = [row["question"] for row in small.train_rows(1, 0, 60)]
    b = [row["question"] for row in small.train_rows(2, 0, 60)]
    assert all(a[shift : shift + 20] != b[:20] for shift in range(40))


def test_no_training_row_of_any_seed_is_a_held_out_question(small: ReasoningGymTask) -> None:
    held_out = {row["question"] for row in small.held_out(108)}
    trained = {row["question"] for seed in range(5) for row in small.train_rows(seed, 0, 400)}
    assert len(held_out) == 108
    assert len(trained) == 92  # with the 108 these are all 200 questions that the settings allow
    assert not held_out & trained


def test_a_longer_evaluation_begins_with_the_shorter_one(small: ReasoningGymTask) -> None:
    assert small.held_out(60)[:20] == small.held_out(20)


def test_more_held_out_questions_than_there_are_is_an_error_with_the_number(small: ReasoningGymTask) -> None:
    with pytest.raises(TaskError, match=r"got 108 in .* at most 108"):
        small.held_out(109)
    with pytest.raises(TaskError, match="endless"):
        small.held_out()


def test_the_held_out_share_can_be_set() -> None:
    task = Task.parse(SMALL + ",held_out=0.1")
    assert len({row["question"] for row in task.train_rows(0, 0, 1500)}) > 170


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("7", "7", True),
        ("7.0", "7", True),
        ("-7", "7", False),
        ("7", "-7", False),
        ("17", "7", False),
        ("The answer is 7", "7", False),
        ("7 or 8", "7", False),
        ("", "7", False),
        (None, "7", False),
        ("1000", "1,000", True),
    ],
)
@pytest.mark.parametrize("name", ["chain_sum", "gsm_symbolic", "simple_equations"])
def test_numbers_are_judged_without_the_scorers_traps(name: str, answer, reference: str, right: bool) -> None:
    task = Task.parse(f"rg:{name}")
    row = {**task.train_row(0, 0), "answer": reference}
    assert task.is_correct(answer, row) is right


def test_reasoning_gym_itself_would_have_been_fooled() -> None:
    """Keeps the rules above honest: if these stop holding, the rules may go."""
    import reasoning_gym

    word_problems = reasoning_gym.create_dataset("gsm_symbolic", size=1, seed=0)
    assert word_problems.score_answer("7 or 8", {"answer": "7"}) == 1.0
    assert word_problems.score_answer("-7", {"answer": "7"}) == 1.0
    sums = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    assert 0 < sums.score_answer("17", {"answer": "7"}) < 1


def test_partial_credit_is_no_credit() -> None:
    countdown = Task.parse("rg:countdown")
    row = countdown.train_row(0, 0)
    assert countdown.is_correct(row["answer"], row)
    assert not countdown.is_correct("1 + 1", row)
    spelling = Task.parse("rg:spell_backward")
    row = spelling.train_row(0, 0)
    assert spelling.is_correct(row["answer"], row)
    assert not spelling.is_correct(row["answer"] + "x", row)


def test_tolerances_of_a_generator_still_count() -> None:
    task = Task.parse("rg:decimal_arithmetic:min_num_decimal_places=2,max_num_decimal_places=2")
    row = {**task.train_row(0, 0), "answer": "3.14"}
    assert task.is_correct("3.15", row)
    assert not task.is_correct("3.2", row)


def test_a_scorer_that_fails_is_an_error_and_no_wrong_answer(small: ReasoningGymTask, monkeypatch) -> None:
    def broken(answer: str, entry: dict) -> float:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(small, "_judge", type("Judge", (), {"score_answer": staticmethod(broken)}))
    with pytest.raises(TaskError, match="ZeroDivisionError: by zero for the answer '8'"):
        small.is_correct("8", {**small.train_row(0, 0), "answer": "7"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rg:chainsum", "Did you mean chain_sum"),
        ("rg:", "Choose one of"),
        ("rg:chain_sum:min_term=2", "Use one of min_terms, max_terms"),
        ("rg:chain_sum:seed=1", "rows are made from the run's seed"),
        ("rg:chain_sum:size=10", "rows are made from the run's seed"),
        ("rg:chain_sum:min_terms=5,max_terms=2", "max_terms must be >= min_terms"),
        ("rg:chain_sum:min_terms=two", "TypeError"),
        ("rg:chain_sum:min_terms=2.5,max_terms=2.5", "expected a row"),
        ("rg:chain_sum:held_out=1.0", "at most 0.9"),
        ("rg:composite", "at least one dataset"),
    ],
)
def test_unusable_settings_are_refused_before_any_work(spec: str, message: str) -> None:
    with pytest.raises(TaskError, match=message) as raised:
        Task.parse(spec)
    assert raised.value.where.startswith(spec)


def test_a_generator_with_one_question_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"question": "What is 4 + 1?", "answer": "5", "metadata": {}}  # its hash puts it on the training side
    monkeypatch.setattr(ReasoningGymTask, "_make_block", lambda *args: [same] * 65536)
    task = ReasoningGymTask("spec", "chain_sum", {})
    assert task.train_row(0, 0)["answer"] == "5"
    with pytest.raises(TaskError, match="for the held out rows within 256 draws"):
        task.held_out(1)


def test_without_reasoning_gym_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(TaskError, match=r"pip install 'qerl-compile\[tasks\]'"):
        Task.parse("rg:chain_sum")
