"""A curriculum moves on by reward, judges by the task of each row, and resumes."""

import pytest

from qerl_compile.errors import TaskError
from qerl_compile.rl.tasks import Task, parse_task
from qerl_compile.rl.tasks.curriculum import WINDOW, Curriculum
from qerl_compile.rl.tasks.held_out import question_of


class Count(Task):
    def __init__(self, name):
        self.spec = name

    def train_row(self, seed, position):
        return {"prompt": f"{self.spec}{position}", "answer": self.spec}

    def held_out(self, count=None):
        return [self.train_row(0, i) for i in range(count or 3)]

    def is_correct(self, answer, row):
        return answer == self.spec


def make(**given):
    return Curriculum([Count("a"), Count("b"), Count("c")], **given)


def test_it_moves_on_after_a_full_window_of_good_steps_and_never_beyond_the_last_stage():
    course = make(advance_at=0.5)
    stages = [course.observe({"reward": reward})["curriculum/stage"] for reward in [0.0] + [1.0] * 20]
    # the zero lies in the first window; 4 of 5 are enough
    assert stages == [0] * (WINDOW - 1) + [1] * WINDOW + [2] * (21 - 2 * WINDOW + 1)
    assert course.train_row(0, 9) == {"prompt": "c9", "answer": "c", "curriculum_stage": 2}


def test_steps_without_a_reward_say_nothing():
    course = make(advance_at=0.5)
    for _ in range(WINDOW):
        course.observe({"reward": float("nan")})
        course.observe({})
    assert course.stage == 0


def test_held_out_rows_are_of_every_stage_and_judged_by_their_own_task():
    course = make()
    rows = course.held_out(7)
    assert [row["prompt"] for row in rows] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1"]
    assert [course.is_correct("b", row) for row in rows] == [False] * 3 + [True] * 2 + [False] * 2
    assert [row["prompt"] for row in course.held_out(1)] == ["a0"]
    assert len(course.held_out()) == 9


def questions(course, rows):
    """Of `rows` training rows of every stage."""
    found = set()
    for stage in range(len(course.stages)):
        course.restore(stage, [])
        found |= {question_of(course.train_row(1, position)) for position in range(rows)}
    return found


ONE_DIGIT = "rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"


@pytest.mark.parametrize(
    "spec",
    [
        f"{ONE_DIGIT} -> {ONE_DIGIT.replace('max_terms=2', 'max_terms=3')}",
        f"{ONE_DIGIT},held_out=0.2 -> {ONE_DIGIT},held_out=0.6",
    ],
    ids=["stages that share questions", "stages with other shares"],
)
def test_no_stage_trains_on_what_another_is_evaluated_with_and_no_question_is_asked_twice(spec):
    course = Curriculum.from_spec(spec)
    held_out = [question_of(row) for row in course.held_out(40)]
    assert len(set(held_out)) == len(held_out) == 40
    assert not questions(course, 200) & set(held_out)
    again = Curriculum.from_spec(spec)
    again.restore(1, [])
    assert [again.train_row(1, position) for position in range(9)] == course.train_rows(1, 0, 9)


def test_a_stage_does_not_train_on_a_file_that_another_holds_out(tmp_path):
    easy, hard, test = (tmp_path / f"{name}.jsonl" for name in ("easy", "hard", "test"))
    rows = [f'{{"question": "what is {i} + 1?", "answer": {i + 1}}}' for i in range(60)]
    easy.write_text("\n".join(rows))
    test.write_text("\n".join(rows[:20]))
    hard.write_text("\n".join(f'{{"question": "hard {i}", "answer": 1}}' for i in range(20)))
    course = Curriculum.from_spec(f"{easy} -> {hard}:held_out={test}")
    held_out = [question_of(row) for row in course.held_out()]
    assert len(set(held_out)) == len(held_out) >= 20
    assert not questions(course, 100) & set(held_out)
    test.write_text("\n".join(rows))
    with pytest.raises(TaskError, match="no other stage holds out"):
        Curriculum.from_spec(f"{easy} -> {hard}:held_out={test}").train_row(1, 0)


def test_it_goes_on_from_its_state():
    course, again = make(advance_at=0.5), make(advance_at=0.5)
    for reward in (1.0,) * (WINDOW + 2):
        course.observe({"reward": reward})
    again.restore(course.stage, course.rewards)
    for reward in (1.0,) * WINDOW:
        assert course.observe({"reward": reward}) == again.observe({"reward": reward})
    assert (course.stage, course.rewards) == (2, again.rewards)


def test_one_task_is_no_curriculum():
    with pytest.raises(TaskError, match="two tasks or more"):
        Curriculum([Count("a")])


def test_it_is_written_as_one_text_and_read_back(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text("".join(f'{{"prompt": "{file.stem}{i}", "answer": "1"}}\n' for i in range(200)))
    course = parse_task(f"{files[0]} -> {files[1]} @0.9")
    assert isinstance(course, Curriculum)
    assert (len(course.stages), course.advance_at) == (2, 0.9)
    assert parse_task(course.spec).spec == course.spec
    assert parse_task(f"{files[0]}->{files[1]}").advance_at == 0.8
    with pytest.raises(TaskError, match="a number after @; got 'often'"):
        parse_task(f"{files[0]} -> {files[1]} @often")
