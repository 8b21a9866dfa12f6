import json

import pytest

from qerl_compile.adapter_files import adapters_of, write_adapter
from qerl_compile.loading import load
from tests.cli.conftest import command, next_command, refusal, succeed

SHORT = ("--max-new-tokens", 2, "--size", 4)


def task(world):
    return ("--task", f"{world}/sums.jsonl:held_out=0.3")


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """An adapter of the base model that changes what it says, and one that changes nothing."""
    root = tmp_path_factory.mktemp("adapters")
    model = load(world / "base", "bf16-lora", inner="eager")
    write_adapter(model, root / "zero", base_name=str(world / "base"))
    for number, site in enumerate(adapters_of(model).values()):
        site.b_NR.data.fill_(0.2 * (-1) ** number)
    write_adapter(model, root / "trained", base_name=str(world / "base"))
    return root


def result(*words, out):
    text = succeed("eval", *words, "-o", out)
    return text, json.loads(out.read_text(encoding="utf-8"))


def test_greedy_and_sampled_measures_of_a_model_directory(world, tmp_path):
    words = [world / "base", *task(world), *SHORT, "--samples", 4, "-k", "4,1,2"]
    text, found = result(*words, out=tmp_path / "r.json")
    metrics = found["metrics"]
    assert metrics["eval/items"] == 4
    for name in ("accuracy", "avg@4", "pass@1", "pass@2", "pass@4"):
        assert metrics[f"eval/{name}_low"] <= metrics[f"eval/{name}"] <= metrics[f"eval/{name}_high"]
        assert name in text
    assert metrics["eval/avg@4"] == metrics["eval/pass@1"]
    assert (found["adapter"], found["ks"], found["temperature"], found["samples"]) == (None, [1, 2, 4], 1.0, 4)
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["prompt"].startswith("<|im_start|>user\n")
        assert row["right"] == sum(each["reward"] == 1.0 for each in row["samples"])
        assert len(row["samples"]) == 4
    assert sum(row["greedy"]["reward"] for row in found["rows"]) / 4 == metrics["eval/accuracy"]
    assert next_command(text)[:2] == ["qerl-compile", "transform"]


def test_the_same_seed_gives_the_same_file_and_another_seed_other_samples(world, tmp_path):
    words = [world / "base", *task(world), *SHORT, "--samples", 3]
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        succeed("eval", *words, "--seed", seed, "-o", file)
    first, again, other = (json.loads(file.read_text()) for file in files)
    assert first == again
    assert [row["samples"] for row in first["rows"]] != [row["samples"] for row in other["rows"]]
    assert [row["greedy"] for row in first["rows"]] == [row["greedy"] for row in other["rows"]]


def test_an_adapter_is_what_is_evaluated(world, adapter, tmp_path):
    words = [world / "base", *task(world), *SHORT]
    _, base = result(*words, out=tmp_path / "base.json")
    text, trained = result(*words, "--adapter", adapter / "trained", out=tmp_path / "trained.json")
    assert trained["adapter"] == str(adapter / "trained")
    assert f"with {adapter}/trained" in text
    said = [[row["greedy"]["completion"] for row in found["rows"]] for found in (base, trained)]
    assert said[0] != said[1]
    assert [row["prompt"] for row in base["rows"]] == [row["prompt"] for row in trained["rows"]]


def test_an_adapter_that_changes_nothing_is_refused(world, adapter):
    line = refusal("eval", world / "base", *task(world), *SHORT, "--adapter", adapter / "zero")
    assert "expected an adapter that changes the model; got one whose lora_B are all zero" in line


def test_a_recipe_packs_the_model_first(world):
    text = succeed("eval", world / "base", *task(world), *SHORT, "--recipe", "nvfp4-lora")
    assert "accuracy, greedy" in text
    assert "nothing was written" in text
    assert next_command(text)[:2] == ["qerl-compile", "train"]


def test_a_run_brings_its_adapter_its_task_and_its_settings(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)  # the run's task is a relative path
    text, found = result(run.path, out=tmp_path / "r.json")
    assert found["adapter"] == f"{run.path}/adapter"
    assert (found["task"], found["system"], found["extractor"]) == ("sums.jsonl:held_out=0.3", "Add.", "final")
    assert (found["max_new_tokens"], found["items"], found["temperature"]) == (1, 3, 1.0)
    assert next_command(text)[:3] == ["qerl-compile", "report", str(run.path)]
    last = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()][-3:]
    shown = [{"completion": row["greedy"]["completion"], "reward": row["greedy"]["reward"]} for row in found["rows"]]
    assert shown == [{"completion": row["completion"], "reward": row["reward"]} for row in last]


def test_every_setting_of_a_run_can_be_overridden(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    words = ["--size", 2, "--max-new-tokens", 3, "--system", "Sum.", "--assistant-prefix", "{question} ="]
    _, found = result(run.path, *words, "--samples", 2, "--temperature", 0.5, out=tmp_path / "r.json")
    assert (found["items"], found["max_new_tokens"], found["temperature"], found["ks"]) == (2, 3, 0.5, [1, 2])
    assert found["extractor"] == "first_number"  # the answer stands right after the prefix
    assert "Sum." in found["rows"][0]["prompt"]
    assert found["rows"][0]["prompt"].endswith(" =")


@pytest.mark.parametrize(
    ("words", "words_of_the_error"),
    [
        ([], "--task: expected a task, since MODEL is no training run"),
        (["--task", "no.jsonl"], "no.jsonl"),
        (["TASK", "--samples", 4, "-k", "5"], "-k: expected whole numbers from 1 to --samples, which is 4"),
        (["TASK", "--samples", 4, "-k", "0"], "-k: expected whole numbers"),
        (["TASK", "--samples", 4, "-k", "2,x"], "-k: expected whole numbers"),
        (["TASK", "-k", "1"], "Give --samples N as well."),
        (["TASK", "--samples", 2, "--temperature", 0], "--temperature: expected above 0 with --samples"),
        (["TASK", "--extract", "guess"], "--extract: expected a known rule; got 'guess'"),
        (["TASK", "--size", 10_000], "sums.jsonl"),
    ],
)
def test_contradictions_are_refused_before_a_model_is_loaded(words, words_of_the_error, world, tmp_path):
    words = [each for word in words for each in (task(world) if word == "TASK" else [word])]
    assert words_of_the_error in refusal("eval", tmp_path / "no-such-model", *words)


def test_a_run_has_its_own_recipe_and_an_output_that_exists_is_kept(run, world, tmp_path):
    assert "expected none for a run" in refusal("eval", run.path, *task(world), "--recipe", "bf16-lora")
    (tmp_path / "r.json").write_text("mine")
    assert "got an existing one" in refusal("eval", world / "base", *task(world), "-o", tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == "mine"
    assert command("eval", world / "base", "--samples", -1).code == 2
