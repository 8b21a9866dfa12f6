import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import yaml

from qerl_compile.errors import CheckpointError
from qerl_compile.rl.metrics import read_metrics
from qerl_compile.rl.trainer import Trainer
from tests.cli.conftest import command, next_command, refusal, succeed, tiny
from tests.models import LONG


def train(world, out, *words, reward="low", **changes):
    task = ["--task", f"{world}/sums.jsonl:held_out=0.3", "--reward", f"{world}/rewards.py:{reward}"]
    return ["train", world / "base", *task, *words, *tiny(**changes), "-o", out]


def test_train_says_what_it_measured_and_what_it_wrote(run):
    accuracy, wrote, _ = run.text.splitlines()[-3:]
    assert accuracy.startswith("held-out accuracy  ")
    assert "→" in accuracy
    assert wrote == f"wrote {run.path}  adapter/, metrics.jsonl, samples.jsonl, recipe.yaml, run.json"
    assert {file.name for file in run.path.iterdir()} == {
        *("adapter", "metrics.jsonl", "samples.jsonl", "recipe.yaml", "run.json")
    }
    assert "step    0  held-out accuracy" in run.text


def test_metrics_have_a_row_for_every_step_and_evaluation(run):
    rows = read_metrics(run.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 1, 2]
    assert all(row["eval/time"] > 0 for row in rows if "eval/accuracy" in row)
    assert all(row["update/rows"] == 8 and row["rewards/low/mean"] < 0 for row in rows if "reward" in row)


def test_samples_show_what_the_model_wrote_in_every_evaluation(run):
    rows = read_metrics(run.path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(row.keys() == {"step", "prompt", "completion", "reward"} for row in rows)
    assert rows[0]["prompt"].startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")
    assert rows[0]["prompt"] == rows[3]["prompt"]
    completions = [row["completion"] for row in rows]
    assert completions[:3] != completions[6:]  # two steps at a rate of 0.1
    assert all(row["reward"] in (0.0, 1.0) for row in rows)


def test_a_run_says_how_to_run_it_again(run, world):
    about = json.loads((run.path / "run.json").read_text())
    assert about["model"] == str(world / "base")  # it was given as `base`
    assert about["task"] == "sums.jsonl:held_out=0.3"
    assert about["rewards"] == [f"{world}/rewards.py:low"]
    assert (about["system"], about["extractor"], about["inner"]) == ("Add.", "final", "eager")
    assert about["versions"].keys() == {"qerl_compile", "torch", "transformers"}
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert (recipe["train"]["steps"], recipe["train"]["group_size"]) == (2, 4)


def test_the_command_that_train_names_exports_the_run(run):
    words = next_command(run.text)
    assert words == ["qerl-compile", "export", str(run.path), "--target", "vllm", "-o", f"{run.path}-vllm"]
    succeed(*words[1:])
    assert (run.path.parent / "run-vllm" / "model.safetensors").is_file()


def test_a_run_without_packed_weights_names_the_export_that_it_can_have(world, tmp_path):
    words = train(world, tmp_path / "run", "--recipe", "bf16-lora", train__steps=1, train__eval_every=0)
    follow = next_command(succeed(*words))
    assert follow[2:] == [str(tmp_path / "run"), "--target", "peft", "-o", f"{tmp_path}/run-peft"]
    succeed(*follow[1:])


def test_training_goes_on_from_an_adapter(run, world, tmp_path):
    first = [*("--adapter", run.path / "adapter"), "--system", "Add."]
    succeed(*train(world, tmp_path / "more", *first, train__steps=1, train__eval_every=0))
    last = [row["completion"] for row in read_metrics(run.path / "samples.jsonl") if row["step"] == 2]
    start = [row["completion"] for row in read_metrics(tmp_path / "more" / "samples.jsonl") if row["step"] == 0]
    assert start == last


def test_a_run_that_fails_later_keeps_its_metrics_and_says_that_it_is_unfinished(world, tmp_path):
    out = tmp_path / "run"
    (world / "called").unlink(missing_ok=True)
    failed = command(*train(world, out, reward="fails_at_step_2"))
    assert failed.code == 2
    assert "the reward broke" in failed.text
    unfinished = f"{out} is unfinished: it has metrics.jsonl, and no adapter; the same command with --resume goes on"
    assert unfinished in failed.text
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "got a training run that was cut off; its metrics.jsonl is kept" in refusal(*train(world, out))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    for words in (["generate", out, "hello"], ["export", out, "--target", "vllm", "-o", tmp_path / "x"]):
        assert f"{out}/adapter: expected the adapter of a finished run; got none" in refusal(*words)


def test_a_run_that_fails_stops_what_compiles_kernels_for_it(world, tmp_path, monkeypatch):
    said = []

    def begin(skeleton, plan, config, device, *, ranks):
        said.append((next(skeleton.parameters()).is_meta, config.steps, ranks))
        return SimpleNamespace(stop=lambda: said.append("stopped"))

    def read(entries, device):
        raise CheckpointError(where="a shard", expected="weights", got="none", do="Nothing.")

    monkeypatch.setattr("qerl_compile.rl.first_step.rehearse_first_step", begin)
    monkeypatch.setattr("qerl_compile.loading.read_tensors", read)
    assert "a shard" in refusal(*train(world, tmp_path / "out", train__steps=3), "--inner", "inductor")
    assert said == [(True, 3, 1), "stopped"]
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_overwritten(run, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    line = refusal("train", tmp_path / "no-such-model", "--task", "none", "-o", run.path)
    assert "got an existing one" in line
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "train.learning_rat=1"], "--set: train.learning_rat: expected one of the keys steps"),
        (["--set", "train.learning_rat=1"], "Did you mean `learning_rate`?"),
        (["--set", "train.steps"], "--set: expected KEY=VALUE"),
        (["--set", "train.steps=many"], "train.steps: expected an integer; got 'many'"),
        (["--set", "train.eval_seed=3"], "unknown key 'eval_seed'"),
        (["--set", "lora=[]"], "lora: expected at least one rule, since adapters are what is trained; got none"),
        (["--set", "train.eval_size=100"], "Set train.eval_size to at most"),
        (["--recipe", "qerl-nvfp4-aqm"], "Did you mean `qerl-nvfp4-aqn`?"),
        (["--recipe", "none.yaml"], "none.yaml: expected a readable recipe file"),
        (["--task", "rg:chain_sums"], "expected a generator of reasoning_gym; got 'chain_sums'"),
        (["--task", "sums.txt"], "--task: expected a reasoning_gym task or a .jsonl file; got 'sums.txt'"),
        (["--task", "none.jsonl"], "none.jsonl: expected a readable file"),
        (["--reward", "answers"], "--reward: expected a built-in name or a file's function; got 'answers'"),
        (["--reward", "none.py:f"], "none.py:f: expected a Python file; got no such file"),
        (["--extract", "first"], "extractor: expected a known rule; got 'first'"),
        (["--question", "What is {x}?"], "question: expected text or a number in {x}; got None"),
        (["--inner", "inductr"], "expected one of inductor, aot_eager, eager; got 'inductr'"),
        (["--device", "cuda:7"], "device: expected a device that torch can use here; got 'cuda:7'"),
        (["--adapter", "none"], "adapter_config.json"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_made(words, message, world, tmp_path):
    given = train(world, tmp_path / "out")
    given = [word for word in given if word not in ("--reward", f"{world}/rewards.py:low")]
    assert message in refusal(*given, *words)
    assert list(tmp_path.iterdir()) == []


def adapter_bytes(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("at", [1, 2] if LONG else [2])
def test_a_run_that_was_stopped_goes_on_bit_by_bit_and_its_report_of_the_start_stays(world, tmp_path, monkeypatch, at):
    settings = {"train__steps": 4, "train__eval_every": 0, "train__checkpoint_every": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = succeed(*train(world, whole, **settings))
    trained = Trainer.step

    def terminated(self, step):
        if step == at:  # the signal comes while this step runs, which is given up; the one before is saved
            os.kill(os.getpid(), signal.SIGTERM)
        return trained(self, step)

    monkeypatch.setattr(Trainer, "step", terminated)
    stopped = command(*train(world, parts, **settings))
    assert stopped.code == 143
    assert f"stopped after step {at - 1}, which is saved; the same command with --resume goes on" in stopped.text
    assert not (parts / "adapter").exists()
    monkeypatch.setattr(Trainer, "step", trained)
    resumed = succeed(*train(world, parts, "--resume", **settings))
    assert adapter_bytes(parts) == adapter_bytes(whole)
    accuracies = [next(line for line in text.splitlines() if "→" in line) for text in (straight, resumed)]
    assert accuracies[0] == accuracies[1]
    rewards = [
        [row["reward"] for row in read_metrics(path / "metrics.jsonl") if "reward" in row] for path in (whole, parts)
    ]
    assert rewards[0] == rewards[1]
    assert "got an existing one" in refusal(*train(world, parts, "--resume", **settings))  # it is finished


def test_a_damaged_checkpoint_is_passed_over_and_another_recipe_is_refused(world, tmp_path):
    settings = {"train__steps": 3, "train__eval_every": 0, "train__checkpoint_every": 1}
    whole, out = tmp_path / "whole", tmp_path / "run"
    for path in (whole, out):
        succeed(*train(world, path, **settings))
    shutil.rmtree(out / "adapter")
    kept = sorted(entry.name for entry in (out / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]
    text = command(*train(world, out, "--resume", **{**settings, "train__learning_rate": 0.5})).text
    assert "recipe: train.learning_rate: expected train.learning_rate = 0.1; got train.learning_rate = 0.5" in text
    text = command(*train(world, out, "--resume", "--system", "Add.", **settings)).text
    assert "run.json: system: expected None, as the run began; got 'Add.'" in text
    newest = out / "checkpoints" / "step-000003" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    text = succeed(*train(world, out, "--resume", **settings))
    assert "passed over:" in text
    assert "optimizer.safetensors" in text
    assert adapter_bytes(out) == adapter_bytes(whole)
