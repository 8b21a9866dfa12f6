"""A small world for the commands: a saved model with its tokenizer, a task, a reward, and one run of each command.

Fixtures are made once; tests read them and write elsewhere.
"""

import contextlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from qerl_compile.cli import app
from tests.models import tiny_model
from tests.tokenizer import byte_tokenizer

TINY = {
    "train.steps": 2,
    "train.prompts_per_step": 2,
    "train.group_size": 4,
    "train.max_new_tokens": 1,
    "train.eval_size": 3,
    "train.eval_every": 1,
    "train.learning_rate": 0.1,
    "train.warmup_ratio": 0.0,
    "train.max_grad_norm": 1000.0,
}
REWARDS = """
import pathlib

def low(completion_ids, **_):
    "Every sample has another reward, so every group has a signal."
    return [-sum(ids) / len(ids) for ids in completion_ids]

def fails_at_step_2(completions, **_):
    marker = pathlib.Path(__file__).parent / "called"
    if marker.exists():
        raise RuntimeError("the reward broke")
    marker.touch()
    return [float(i) for i in range(len(completions))]
"""


def command(*words):
    """Run the command line in this process; give exit code, both outputs together, and an exception of ours if any."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return SimpleNamespace(code=result.exit_code, text=result.output, fault=result.exception)


def succeed(*words):
    """Run a command that must work; return its output."""
    result = command(*words)
    assert result.code == 0, (result.text, result.fault)
    return result.text


def refusal(*words):
    """Run a command that must be refused; return the one line that says why."""
    result = command(*words)
    assert result.code == 2, (result.text, result.fault)
    assert isinstance(result.fault, SystemExit)
    (line,) = result.text.splitlines()
    assert line.startswith("error ")
    return line


def tiny(**changes):
    """The --set options that make training cheap, and --inner eager."""
    settings = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")] + ["--inner", "eager"]


def next_command(text):
    """The words of the command in the last line, without the program's name."""
    last = text.splitlines()[-1]
    assert last.startswith("next  ")
    return shlex.split(last.removeprefix("next  "))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """base/ (a bf16 Llama with tokenizer), sums.jsonl, rewards.py, and adapters.yaml without quantization."""
    root = tmp_path_factory.mktemp("world")
    model = tiny_model("llama", layers=1, vocab_size=259, pad_token_id=None, bos_token_id=None, dtype=torch.bfloat16)
    model.lm_head.weight.data.mul_(5)
    model.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    rows = [{"question": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(30)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rewards.py").write_text(REWARDS)
    return root


@pytest.fixture(scope="session")
def packed(world):
    """What `transform` wrote, and what it printed."""
    text = succeed("transform", world / "base", "-o", world / "packed")
    return SimpleNamespace(path=world / "packed", text=text)


@pytest.fixture(scope="session")
def run(world):
    """What `train` wrote, and what it printed."""
    task = ["--task", "sums.jsonl:held_out=0.3", "--reward", f"{world}/rewards.py:low", "--system", "Add."]
    with contextlib.chdir(world):  # a relative model path must survive a change of directory
        text = succeed("train", "base", *task, *tiny(), "-o", world / "run")
    return SimpleNamespace(path=world / "run", text=text)
