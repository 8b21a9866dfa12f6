import os
import subprocess
import sys

import pytest

from tests.cli.conftest import command, succeed

MAIN = "from qerl_compile.cli import main; main()"


@pytest.mark.parametrize(
    "name, options",
    [
        ("transform", ["--recipe", "--set", "--out", "--device", "--trust-remote-code"]),
        ("train", ["--task", "--reward", "--extract", "--assistant-prefix", "--adapter", "--inner", "--set"]),
        ("generate", ["--temperature", "--max-new-tokens", "--system", "--seed"]),
        ("export", ["--target", "--out"]),
        ("diff", ["--layer", "--pass", "--context"]),
    ],
)
def test_every_command_explains_itself(name, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert name in succeed("--help")
    text = succeed(name, "--help")
    assert all(option in text for option in options)


def test_no_command_and_unknown_options_show_the_usage():
    assert "Usage" in command().text
    for words in (["transform"], ["train", "m", "--no-such-option"], ["teach"]):
        assert command(*words).code == 2


def test_a_real_process_ends_with_code_2_and_one_red_sentence(tmp_path):
    words = ["transform", str(tmp_path / "no-such-model"), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-c", MAIN, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("\x1b[1;31merror \x1b[0m\x1b[31m")
    assert "expected an existing model directory, or a hub id" in line
    assert "Check the path." in line


def test_help_costs_no_torch():
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {MAIN}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "False")
