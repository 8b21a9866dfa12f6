import json
from pathlib import Path

import pytest

from qerl_compile.errors import TaskError
from qerl_compile.rl.answers import is_numeric_answer
from qerl_compile.rl.tasks.jsonl import JsonlTask, read_row
from qerl_compile.rl.tasks.task import parse_task

# Rows of GSM8K (MIT licence): train lines 1 and 2 whole, test lines 2 and 3 shortened.
GSM8K = [
    {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?",
        "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
    },
    {
        "question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. "
        "How much did she earn?",
        "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n"
        "Working 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
    },
    {
        "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.",
        "answer": "2/2=1\n2+1=3\n#### 3",
    },
    {"question": "Josh decides to try flipping a house.", "answer": "He made 200000-130000\n#### 70,000"},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def numbered(start: int, count: int) -> list[dict]:
    return [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(start, start + count)]


def test_gsm8k_rows_become_chat_prompts_with_the_number_as_answer(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", GSM8K[2:])
    task = parse_task(f"{write(tmp_path / 'train.jsonl', GSM8K[:2])}:held_out={test}")
    rows = sorted(task.train_rows(0, 0, 2), key=lambda row: row["answer"])
    assert [row["answer"] for row in rows] == ["10", "72"]
    assert rows[1]["prompt"] == [{"role": "user", "content": GSM8K[0]["question"]}]
    assert rows[1]["solution"] == GSM8K[0]["answer"]
    assert sorted(row["answer"] for row in task.held_out()) == ["3", "70,000"]


def test_what_follows_the_last_mark_is_the_answer(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "#### 5 is too few\n#### 6"}
    assert read_row(json.dumps(row), "here")["answer"] == "6"


@pytest.mark.parametrize(
    ("number", "text"), [("0.00001", "0.00001"), ("1e16", "10000000000000000"), ("7.0", "7.0"), ("-3", "-3")]
)
def test_a_number_is_an_answer_that_can_be_given(number: str, text: str) -> None:
    row = read_row(f'{{"question": "q", "answer": {number}}}', "here")
    assert row["answer"] == text
    assert is_numeric_answer(row["answer"])


def test_thousands_commas_and_decimals_compare_as_numbers(tmp_path: Path) -> None:
    task = parse_task(str(write(tmp_path / "a.jsonl", numbered(0, 40))))
    assert task.is_correct("70000.0", {"answer": "70,000"})
    assert not task.is_correct("70", {"answer": "70,000"})
    assert not task.is_correct("about 70", {"answer": "70"})
    assert not task.is_correct(None, {"answer": "70"})
    assert task.is_correct(" New  York", {"answer": "New York"})
    assert not task.is_correct("new york", {"answer": "New York"})


def test_every_epoch_has_each_row_once_in_another_order(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", numbered(100, 1))
    task = parse_task(f"{write(tmp_path / 'a.jsonl', numbered(0, 30))}:held_out={held}")
    epochs = [[row["answer"] for row in task.train_rows(5, 30 * epoch, 30)] for epoch in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(1, 31)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [row["answer"] for row in task.train_rows(5, 0, 30)] == epochs[0]
    assert [row["answer"] for row in task.train_rows(6, 0, 30)] != epochs[0]


def test_a_share_of_the_file_is_held_out_and_the_sides_are_disjoint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(0, 200))
    task = parse_task(f"{path}:held_out=0.25")
    held, train = task.held_out(), task.train_rows(1, 0, 200 - len(task.held_out()))
    assert 30 <= len(held) <= 70
    assert len({row["answer"] for row in held + train}) == 200
    assert isinstance(task, JsonlTask)
    assert task.left_out == len(held)
    assert task.held_out(10) == held[:10]


def test_held_out_questions_of_another_file_are_left_out_of_training(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [{"question": " What is  3 + 1? ", "answer": "4"}])
    task = parse_task(f"{write(tmp_path / 'a.jsonl', numbered(0, 10))}:held_out={held}")
    assert isinstance(task, JsonlTask)
    assert task.left_out == 1
    assert "4" not in {row["answer"] for row in task.train_rows(0, 0, 9)}


def test_rows_given_out_are_copies(tmp_path: Path) -> None:
    task = parse_task(str(write(tmp_path / "a.jsonl", numbered(0, 40))))
    task.train_row(0, 0)["answer"] = "spoilt"
    assert task.train_row(0, 0)["answer"] != "spoilt"


def test_prompts_as_text_or_messages_and_other_columns_pass_through(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [{"prompt": "2 + 2 =", "answer": 4, "level": "easy"}, {"prompt": messages, "answer": 2.5}]
    held = write(tmp_path / "held.jsonl", numbered(0, 1))
    task = parse_task(f"{write(tmp_path / 'a.jsonl', rows)}:held_out={held}")
    found = {row["answer"]: row for row in task.train_rows(0, 0, 2)}
    assert found["4"] == {"prompt": "2 + 2 =", "answer": "4", "level": "easy"}
    assert found["2.5"]["prompt"] == messages


BAD_LINES = [
    ("", "one JSON object"),
    ("{", "one JSON object"),
    ("[1]", "a JSON object"),
    ('{"question": "q", "answer": NaN}', "NaN is not JSON"),
    ('{"question": "q", "answer": 1e400}', "1e400 is more than a float holds"),
    ('{"question": "a \\ud800 b", "answer": "1"}', "one JSON object"),
    ('{"question": "q", "answer": "1", "answer": "2"}', "a key occurs twice"),
    ('{"question": "q"}', "an answer"),
    ('{"question": "q", "answer": ""}', "an answer"),
    ('{"question": "q", "answer": true}', "an answer"),
    ('{"question": "q", "answer": "so ####  "}', "an answer after ####"),
    ('{"question": "", "answer": "1"}', "a question or a prompt"),
    ('{"question": 3, "answer": "1"}', "a question or a prompt"),
    ('{"answer": "1"}', "a question or a prompt"),
    ('{"prompt": "  ", "answer": "1"}', "a prompt as text or"),
    ('{"prompt": [], "answer": "1"}', "a prompt as text or"),
    ('{"prompt": [{"role": "user"}], "answer": "1"}', "a prompt as text or"),
    ('{"prompt": [{"content": "x"}], "answer": "1"}', "a prompt as text or"),
    ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}', "a prompt as text or"),
    ('{"question": "q", "answer": "1", "completions": 3}', "completions"),
    ('{"question": "What is 0 + 1?", "answer": "1"}', "the question of line 1 again"),
    ("[" * 100_000, "one JSON object"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [*numbered(0, 2), line, *numbered(2, 2)])
    with pytest.raises(TaskError) as raised:
        parse_task(str(path))
    assert raised.value.where == f"{path}, line 3"
    assert message in str(raised.value)


def test_files_that_cannot_be_split_or_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9", "answer": "1"}\n')
    one = write(tmp_path / "one.jsonl", numbered(0, 1))
    for spec, message in [
        (f"{tmp_path}/none.jsonl", "a readable file"),
        (f"{tmp_path}/latin.jsonl", "a readable file"),
        (f"{tmp_path}/empty.jsonl", "at least one row"),
        (f"{one}:held_out=0.5", "row; got 0 of 1 rows"),
        (f"{one}:held_out={one}", "at least one training row"),
        (f"{one}:held_out=half", "a number above 0"),
        (f"{one}:shuffle=true", "no option but held_out"),
    ]:
        with pytest.raises(TaskError, match=message):
            parse_task(spec)
    with pytest.raises(TaskError, match="at most 1"):
        parse_task(f"{write(tmp_path / 'b.jsonl', numbered(5, 3))}:held_out={one}").held_out(2)


def test_windows_line_ends_a_byte_order_mark_and_no_last_newline_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in numbered(0, 40)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    task = parse_task(str(path))
    assert isinstance(task, JsonlTask)
    assert len(task.held_out()) == task.left_out > 0
