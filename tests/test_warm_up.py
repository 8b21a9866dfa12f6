"""Kernels compiled ahead: which shapes follow from a model, and a process that may do what it likes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qerl_compile.kernels.dispatch import BUCKETS
from qerl_compile.kernels.rehearsal_script import Attention, Linear, Script
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.rl.first_step import _up_to, rehearse_first_step
from qerl_compile.warm_up import Rehearsal, packed_linears, script_for
from tests.models import tiny_model

RUN = {"decode_rows": (2, 4), "prefill_tokens": (512,), "training_tokens": (256,), "positions": 300, "page_tokens": 64}
HOPPER = {"capability": (9, 0), "multiprocessors": 132, "processes": 1}
SMALL = Script((9, 0), 132, (Linear(256, 512, 16),), decode_rows=(2,))


def script(family="qwen2", recipe="qerl-nvfp4-aqn", dtype=torch.bfloat16):
    model = tiny_model(family, dtype=dtype)
    return script_for(model, make_plan(model, Recipe.named(recipe)), **RUN, **HOPPER)


def test_the_products_of_a_model_are_its_groups_each_shape_once():
    """q/k/v are 64 + 32 + 32 rows of three rank-32 adapters, padded to 128; gate/up 128 + 128 rows of two."""
    model = tiny_model("qwen2", layers=3)
    assert packed_linears(model, make_plan(model, Recipe.named("qerl-nvfp4-aqn"))) == (
        Linear(128, 64, 128),
        Linear(64, 64, 32),
        Linear(256, 64, 64),
        Linear(64, 128, 32, residual=True),
    )


@pytest.mark.parametrize("family, bias, windows", [("qwen2", True, (0,)), ("llama", False, (0,))])
def test_attention_is_that_of_the_config_with_the_biases_of_its_linears(family, bias, windows):
    assert script(family).attention == Attention(4, 2, 16, 64, pages=8, bias=bias, windows=windows)


def test_gemma_has_layers_with_a_window_and_layers_without():
    windows = script("gemma3").attention.windows
    assert len(windows) == 1 + (0 in windows)
    assert max(windows) > 0


@pytest.mark.parametrize("what", [{"dtype": torch.float32}, {"recipe": "bf16-lora-aqn"}])
def test_a_run_without_kernels_of_ours_has_no_script(what):
    assert script(**what) is None


def test_a_script_survives_being_written_and_read():
    given = script()
    assert Script.from_json(given.to_json()) == given
    assert Script.from_json(SMALL.to_json()) == SMALL


def test_without_a_gpu_nothing_starts():
    model = tiny_model("qwen2", dtype=torch.bfloat16)
    recipe = Recipe.named("qerl-nvfp4-aqn")
    assert rehearse_first_step(model, make_plan(model, recipe), recipe.train, torch.device("cpu")) is None


def test_every_bucket_up_to_the_most_tokens_is_named_once():
    assert _up_to(4096) == (4096, 2048, 1024, 512, 256, 128)
    assert _up_to(3000) == (3000, 2048, 1024, 512, 256, 128)
    assert _up_to(100) == (100,)
    assert {next(bucket for bucket in BUCKETS if tokens <= bucket) for tokens in _up_to(3000)} == set(BUCKETS[5:11])


@pytest.fixture
def warnings_heard(monkeypatch):
    heard = []
    monkeypatch.setattr("qerl_compile.warm_up.log.warning", lambda text, *args: heard.append(text % args))
    return heard


@pytest.mark.parametrize(
    "program, said",
    [
        ("raise SystemExit('no compiler here')", "the process ended with code 1: no compiler here"),
        ("import sys; sys.stdin.read(); sys.exit(3)", "the process ended with code 3"),
        (
            "import json; input(); print(json.dumps(dict(kernel='stream', seconds=1, error='ptxas: no'))); "
            "print('{-# a dump #-}', '{}', 1, sep='\\n'); print(json.dumps(dict(forms=2, seconds=1.0)))",
            "stream: ptxas: no",
        ),
    ],
    ids=["at once", "after the script", "one kernel"],
)
def test_a_failure_is_said_once_and_stops_nothing(warnings_heard, program, said):
    outcome = Rehearsal(SMALL, (sys.executable, "-c", program)).wait(60)
    assert said in outcome.failures[0]
    (text,) = warnings_heard
    assert said in text


PROCESSES = """
import os, sys, time
from qerl_compile.kernels import rehearsal

def _compile(index):
    os.write(1, b"%d\\n" % index)  # at once, whatever Python buffers
    {what}

rehearsal._compile = _compile
rehearsal.forms = lambda script: [()] * 2
rehearsal.main(sys.stdin)
"""


def test_a_compiler_that_crashes_ends_the_rehearsal(warnings_heard):
    """A pool that waited for its result would wait for good."""
    program = PROCESSES.format(what="os.kill(os.getpid(), 9)")
    outcome = Rehearsal(SMALL, (sys.executable, "-c", program)).wait(60)
    assert "terminated abruptly" in outcome.failures[0]
    assert len(warnings_heard) == 1


def test_nothing_of_a_rehearsal_outlives_a_run_that_is_killed():
    """Each of its processes holds the pipe, which ends when the last of them has."""
    program = PROCESSES.format(what="time.sleep(600)")
    run = (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', sys.argv[1]], input=sys.argv[2].encode(), start_new_session=True)"
    )
    two = replace(SMALL, processes=2)
    process = subprocess.Popen([sys.executable, "-c", run, program, two.to_json()], stdout=subprocess.PIPE)
    begun = {process.stdout.readline() for _ in range(2)}
    process.kill()
    assert process.communicate(timeout=60) == (b"", None)
    assert begun == {b"0\n", b"1\n"}


def test_a_rehearsal_that_is_stopped_ends_and_says_nothing(warnings_heard):
    rehearsal = Rehearsal(SMALL, (sys.executable, "-c", "import time; time.sleep(600)"))
    assert rehearsal.wait(0.1) is None
    rehearsal.stop()
    assert rehearsal.wait(60).forms == 0
    assert warnings_heard == []
