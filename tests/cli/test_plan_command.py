import functools
import json

import pytest

from qerl_compile.cli.plan import warn_if_too_large
from qerl_compile.errors import GraphError
from qerl_compile.recipe import Recipe
from qerl_compile.rl import footprint
from tests.cli.conftest import command, next_command, refusal

GIB = 2**30
SETTINGS = [
    "--set", "train.prompts_per_step=4", "--set", "train.group_size=4", "--set", "train.max_new_tokens=448",
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
    assert "4 x 4 sequences of 64 + 448 tokens" in lines[0]
    assert "fits 80.0 GiB; nothing was written" in lines[-2]
    words = next_command(large.text)
    assert "train" in words[:2]
    assert "train.max_new_tokens=448" in words
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


def test_a_faulty_recipe_is_refused_before_anything_is_planned(world):
    assert "train.group_size" in refusal("plan", world / "base", "--set", "train.group_size=1")


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


def test_a_run_whose_graphs_cannot_be_predicted_goes_on(world, monkeypatch, capsys):
    def fails(*_, **__):
        raise GraphError(where="layer 0", expected="a graph", got="none", do="Nothing.")

    monkeypatch.setattr(footprint, "Predictor", fails)
    warn_if_too_large(str(world / "base"), Recipe.named("qerl-nvfp4-aqn"), device_bytes=GIB)
    assert "not predicted whether it fits: layer 0" in capsys.readouterr().err
