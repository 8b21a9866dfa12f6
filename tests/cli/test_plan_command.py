import functools
import importlib
import json
import shutil

import pytest

from qerl_compile.cli.plan import warn_if_too_large
from qerl_compile.errors import CheckpointError, GraphError, TaskError
from qerl_compile.recipe import Recipe
from qerl_compile.rl import footprint
from tests.cli.conftest import command, next_command, refusal, tiny

GIB = 2**30
SETTINGS = [
    "--set", "train.prompts_per_step=4", "--set", "train.group_size=4", "--set", "train.max_new_tokens=192",
    "--set", "train.eval_size=4", "--set", "train.rollout_batch=16", "--set", "train.recompute=true",
    "--prompt-tokens", "64",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def once():
    """Capture the model's graphs once for all commands of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "Predictor", functools.cache(footprint.Predictor))
        yield


@pytest.fixture(scope="module")
def large(world):
    return command("plan", world / "base", *SETTINGS, "--gpu-gib", "80")


def test_a_plan_fits_one_screen_and_ends_with_the_next_command(large):
    lines = large.text.splitlines()
    assert large.code == 0, (large.text, large.fault)
    assert len(lines) <= 24
    assert "4 x 4 sequences of 64 + 192 tokens" in lines[0]
    assert "fits 80.0 GiB; nothing was written" in lines[-2]
    words = next_command(large.text)
    assert "train" in words[:2]
    assert "train.max_new_tokens=192" in words
    heads = {line.split("  ")[0] for line in lines}
    assert {"packed weights", "adapters", "moments", "pages", "kept activations", "peak"} <= heads


def test_a_plan_that_does_not_fit_exits_with_1_and_names_a_setting(world):
    needed = json.loads(command("plan", world / "base", *SETTINGS, "--json").text)
    peak = max(needed["rollout_peak"], needed["training_most"])
    gib = 1 + 0.98 * peak / GIB  # 1 GiB is not torch's
    small = command("plan", world / "base", *SETTINGS, "--gpu-gib", f"{gib:.6f}")
    assert small.code == 1, (small.text, small.fault)
    last = small.text.splitlines()[-1]
    assert last.startswith("error plan of ")
    assert "too much" in last
    assert "Set train." in last


def test_json_has_every_number_in_bytes(world):
    found = command("plan", world / "base", *SETTINGS, "--gpu-gib", "80", "--json")
    assert found.code == 0, (found.text, found.fault)
    plan = json.loads(found.text)
    assert plan["fits"] is True
    assert plan["fault"] is None
    assert plan["device_bytes"] == 80 * 2**30
    assert plan["rollout_peak"] == sum(plan["rollout"].values())
    assert plan["training_peak"] == sum(plan["training"].values())
    assert plan["after_load"] == sum(plan["held"][name] for name in ("packed", "dense", "adapters"))
    assert [layer["quantized"] for layer in plan["layers"]] == [7]


def test_a_run_is_warned_and_not_refused(world, capsys):
    rules = Recipe.named("qerl-nvfp4-aqn").with_overrides([word for word in SETTINGS if word.startswith("train.")])
    warn_if_too_large(str(world / "base"), rules, device_bytes=80 * GIB)
    assert capsys.readouterr().err == ""
    warn_if_too_large(str(world / "base"), rules, device_bytes=GIB)
    assert "may not fit: plan of LlamaForCausalLM" in capsys.readouterr().err


@pytest.fixture(scope="module")
def with_code(world, tmp_path_factory):
    """The base beside a Python file, which nobody runs."""
    directory = tmp_path_factory.mktemp("code") / "base"
    shutil.copytree(world / "base", directory)
    (directory / "modeling_x.py").write_text("raise SystemExit")
    return directory


def test_a_directory_with_code_is_planned_if_it_is_trusted(with_code):
    assert "--trust-remote-code" in refusal("plan", with_code, *SETTINGS)
    found = command("plan", with_code, *SETTINGS, "--gpu-gib", "80", "--trust-remote-code")
    assert found.code == 0, (found.text, found.fault)
    assert next_command(found.text)[-1] == "--trust-remote-code"


def test_train_trusts_code_in_its_plan_and_in_its_warning_as_in_loading(world, with_code, monkeypatch):
    trusted = []

    def shown(*_, trust_remote_code, **__):
        trusted.append(trust_remote_code)
        return 0

    def warned(*_, trust_remote_code, **__):
        trusted.append(trust_remote_code)
        raise TaskError(where="here", expected="no more", got="enough", do="Stop.")

    planning = importlib.import_module("qerl_compile.cli.plan")  # the package has a function of that name
    monkeypatch.setattr(planning, "show_plan", shown)
    monkeypatch.setattr(planning, "warn_if_too_large", warned)
    task = ["--task", f"{world}/sums.jsonl:held_out=0.3", "--reward", f"{world}/rewards.py:low"]
    words = ["train", with_code, *task, "-o", world / "trusted", *tiny(), "--trust-remote-code"]
    assert command(*words, "--plan").code == 0
    assert "here: expected no more" in command(*words).text
    assert trusted == [True, True]


def test_a_faulty_recipe_is_refused_before_anything_is_planned(world):
    assert "train.group_size" in refusal("plan", world / "base", "--set", "train.group_size=1")


def test_sequences_beyond_the_models_positions_are_refused(world):
    said = refusal("plan", world / "base", "--prompt-tokens", "100000")
    assert "positions" in said
    assert "100000 and up to" in said


def test_the_recipe_may_follow_the_model(world):
    found = command("plan", world / "base", "nvfp4-lora", *SETTINGS, "--gpu-gib", "80")
    assert found.code == 0, (found.text, found.fault)
    assert "recipe nvfp4-lora:" in found.text
    words = next_command(found.text)
    assert words[words.index("--recipe") + 1] == "nvfp4-lora"


def test_two_recipes_are_refused(world):
    said = refusal("plan", world / "base", "nvfp4-lora", "--recipe", "bf16-lora")
    assert "'nvfp4-lora'" in said
    assert "'bf16-lora'" in said


def test_train_with_plan_predicts_prints_the_command_without_it_and_writes_nothing(world, monkeypatch):
    settings = SETTINGS[: SETTINGS.index("--prompt-tokens")]
    task = ["--task", f"{world}/sums.jsonl:held_out=0.3"]
    words = ["train", str(world / "base"), *task, "-o", str(world / "planned"), *settings]
    monkeypatch.setattr("sys.argv", ["/bin/qerl-compile", *words, "--plan"])
    planned = command(*words, "--plan")
    assert planned.code == 0, (planned.text, planned.fault)
    assert "peak" in planned.text
    assert next_command(planned.text) == ["qerl-compile", *words]
    assert not (world / "planned").exists()
    monkeypatch.setenv("RANK", "1")  # of torchrun: the first process says it for all
    assert (quiet := command(*words, "--plan")).code == 0
    assert quiet.text == ""


@pytest.mark.parametrize("kind", [GraphError, CheckpointError])
def test_a_run_that_cannot_be_predicted_goes_on(world, monkeypatch, capsys, kind):
    def fails(*_, **__):
        raise kind(where="layer 0", expected="a graph", got="none", do="Nothing.")

    monkeypatch.setattr(footprint, "Predictor", fails)
    warn_if_too_large(str(world / "base"), Recipe.named("qerl-nvfp4-aqn"), device_bytes=GIB)
    assert "not predicted whether it fits: layer 0" in capsys.readouterr().err


@pytest.mark.parametrize("gib", ["inf", "nan", "1e30", "0", "-5"])
def test_a_gpu_of_no_size_that_there_is_is_refused(world, gib):
    refused = command("plan", world / "base", *SETTINGS, f"--gpu-gib={gib}")
    assert refused.code == 2
    said = " ".join(refused.text.split())
    assert "expected a number of GiB from 0.1 to 1000000" in said
    assert f"got {float(gib):g}" in said


def test_without_weights_the_last_line_says_so_and_names_no_command(world, tmp_path):
    shutil.copy(world / "base" / "config.json", tmp_path)
    found = command("plan", tmp_path, *SETTINGS, "--gpu-gib", "80")
    assert found.code == 0, (found.text, found.fault)
    before, last = found.text.splitlines()[-2:]
    assert before.endswith("nothing was written")
    assert last == f"missing  weights: nothing loads or trains {tmp_path} before its safetensors files are there"
    plan = json.loads(command("plan", tmp_path, *SETTINGS, "--gpu-gib", "80", "--json").text)
    assert plan["lacks_weights"]
