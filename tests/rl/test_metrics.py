import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import TaskError
from qerl_compile.rl.metrics import MetricsWriter, decode, encode, latest_rows, read_metrics

VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


def test_rows_are_appended_and_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.5})
        assert read_metrics(path) == [{"step": 1, "loss": 0.5}]  # on disk at once, not when the file is closed
        writer.write({"step": 2, "loss": 0.25, "note": "résumé"})
    with MetricsWriter(path) as writer:
        writer.write({"step": 3})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1]["note"] == "résumé"


def test_a_number_that_is_not_finite_leaves_a_gap_and_its_name() -> None:
    line = encode({"step": 1, "loss": math.nan, "reward": math.inf, "kl": -math.inf, "entropy": 0.5})
    assert json.loads(line) == {
        "step": 1,
        "loss": None,
        "reward": None,
        "kl": None,
        "entropy": 0.5,
        "non_finite": {"loss": "nan", "reward": "inf", "kl": "-inf"},
    }


def test_one_element_tensors_and_arrays_are_numbers() -> None:
    row = {"a": torch.tensor(2), "b": torch.tensor([0.5]), "c": np.float64(1.5), "d": np.bool_(True)}
    assert decode(encode(row)) == {"a": 2, "b": 0.5, "c": 1.5, "d": True}
    assert decode(encode({"a": torch.tensor(math.nan)})) == {"a": None, "non_finite": {"a": "nan"}}


@pytest.mark.parametrize("value", [torch.zeros(2), [1.0], {"a": 1}, object(), b"x"])
def test_other_values_are_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="metric 'loss'"):
        encode({"loss": value})


@given(st.dictionaries(st.text().filter(lambda name: name != "non_finite"), VALUES))
def test_every_row_is_one_line_of_strict_json(row: dict) -> None:
    row = {k: v for k, v in row.items() if not (isinstance(v, str) and not v.isprintable())}
    row = {k: v for k, v in row.items() if k.isprintable()}
    line = encode(row)
    assert line.count(b"\n") == 1
    found = decode(line)
    assert found is not None
    dropped = found.pop("non_finite", {})
    assert found.keys() == row.keys()
    for name, value in row.items():
        assert found[name] == (None if name in dropped else value)


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_torn_last_line_is_passed_over_and_cut_off_on_opening(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = encode({"step": 1, "loss": 0.5}) + encode({"step": 2, "loss": 1.5})
    path.write_bytes(whole[:-cut])
    complete = 2 if cut == 1 else 1  # the first byte cut is the newline, without which the row is still whole
    assert len(read_metrics(path)) == complete
    with MetricsWriter(path) as writer:
        writer.write({"step": 3})
    assert [row["step"] for row in read_metrics(path)] == [*range(1, complete + 1), 3]


def test_damage_before_the_last_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode({"step": 1}) + b"{oops\n" + encode({"step": 3}))
    with pytest.raises(TaskError, match="line 2"):
        read_metrics(path)
    with pytest.raises(TaskError, match="a readable file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert read_metrics(path) == []
    MetricsWriter(path).close()
    assert path.read_bytes() == b""


def test_a_short_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.close()
    monkeypatch.setattr(writer, "_file", type("Full", (), {"write": lambda self, line: len(line) - 1})())
    with pytest.raises(OSError, match="not written whole"):
        writer.write({"step": 1})


def train_row(step, note):
    return {"step": step, "reward": 0.5, "note": note}


def eval_row(step, note):
    return {"step": step, "eval/accuracy": 0.5, "note": note}


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        # killed two steps after the checkpoint of step 2
        ([1, 2, 3, 4], [3, 4, 5], {1: "old", 2: "old", 3: "new", 4: "new", 5: "new"}),
        # killed one step after it
        ([1, 2, 3], [3, 4], {1: "old", 2: "old", 3: "new", 4: "new"}),
        # killed again before it came as far as the first time: what is not written again is not there
        ([1, 2, 3, 4, 5], [3], {1: "old", 2: "old", 3: "new"}),
        # stopped by SIGTERM, so that nothing is repeated
        ([1, 2, 3], [4], {1: "old", 2: "old", 3: "old", 4: "new"}),
    ],
)
def test_of_a_step_that_was_repeated_the_later_row_holds(tmp_path: Path, old: list, new: list, want: dict) -> None:
    path = tmp_path / "metrics.jsonl"
    for note, steps in (("old", old), ("new", new)):
        with MetricsWriter(path) as writer:
            for step in steps:
                writer.write(train_row(step, note))
    rows = latest_rows(read_metrics(path))
    assert {row["step"]: row["note"] for row in rows} == want
    assert len(rows) == len(want)


def test_training_rows_evaluations_and_samples_of_a_step_do_not_replace_each_other() -> None:
    once = [eval_row(0, "a"), train_row(1, "a"), train_row(2, "a"), eval_row(2, "a")]
    assert latest_rows(once) == once
    again = [*once, eval_row(2, "b"), train_row(3, "b")]  # a checkpoint of step 2 whose evaluation is done again
    assert latest_rows(again) == [*once[:3], eval_row(2, "b"), train_row(3, "b")]
    samples = [{"step": step, "prompt": prompt, "note": "a"} for step in (0, 5) for prompt in ("p", "q")]
    assert latest_rows(samples) == samples
    repeated = [{**row, "note": "b"} for row in samples[2:]]
    assert latest_rows([*samples, *repeated]) == [*samples[:2], *repeated]


def test_a_row_without_a_step_is_left_out() -> None:
    assert latest_rows([{"note": 1}, train_row(1, "a"), {"step": True}, {"step": "1"}]) == [train_row(1, "a")]


KILLED = """
import os, signal, sys
from qerl_compile.rl.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for step in range(1, 101):
    writer.write({"step": step, "loss": 0.5})
    if step == 57:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_minus_nine_loses_no_row_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 58))
