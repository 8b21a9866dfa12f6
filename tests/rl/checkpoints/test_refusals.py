"""A checkpoint of another run, or one that is hostile, changes nothing: parameters, optimizer and generators stay."""

import hashlib
import json
import os
import struct

import pytest
import torch

from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.rl.checkpoints import latest, restore, save, version_changes
from qerl_compile.rl.checkpoints.manifest import MANIFEST, write_manifest
from qerl_compile.rl.checkpoints.progress import base_fingerprint
from tests.rl.checkpoints.world import RECIPE, Toy, adamw, one_step, progress, same, state_of, trained, who


@pytest.fixture
def saved(tmp_path):
    """The directory of a checkpoint after one step."""
    model = Toy()
    optimizer = adamw(model)
    one_step(model, optimizer)
    return save(tmp_path, who(model), progress(1), model, optimizer)


def refused(directory, match, *, model=None, optimizer=None, **changes):
    """Restore into a run that has gone another way, see it refused, and everything left as it was."""
    model = model or Toy()
    optimizer = optimizer or adamw(model)
    one_step(model, optimizer)
    before = state_of(model, optimizer)
    found, rejected = latest(directory.parents[1])
    assert found is not None, rejected
    with pytest.raises(CheckpointError, match=match):
        restore(found, who(model, **changes), model, optimizer)
    assert same(state_of(model, optimizer), before)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("train.learning_rate=0.5", r"recipe: train.learning_rate: expected train.learning_rate = 5e-06; got .* = 0.5"),
        ("train.steps=601", r"train.steps = 600; got train.steps = 601"),
        ("lora[0].rank=8", r"lora\[0\].rank = 32; got lora\[0\].rank = 8"),
        ("noise.stages=4", r"noise"),
        ("trainable_norms='.*'", r"trainable_norms = None; got trainable_norms = '\.\*'"),
    ],
)
def test_another_recipe_is_refused_with_the_key_that_differs(saved, override, match):
    refused(saved, match, recipe=RECIPE.with_overrides([override]))


def test_another_base_model_is_refused_though_its_shapes_are_the_same(saved):
    refused(saved, r"base_fingerprint: expected the base model that the run began with, 'toy'", model=Toy(seed=1))


def test_a_base_that_lies_elsewhere_is_the_same(saved):
    model = Toy()
    assert restore(latest(saved.parents[1])[0], who(model, base="/moved/toy"), model, adamw(model)).step == 1


def test_another_number_of_ranks_is_refused(saved):
    refused(saved, r"world_size: expected 1 ranks, as the run began; got 2", world_size=2)


def test_another_set_of_parameters_is_refused_by_the_first_that_differs(saved):
    model = Toy()
    some = torch.optim.AdamW([p for p in trained(model) if p is not model.up.lora_B], lr=1e-2)
    match = r"trained parameter 1: expected norm.trained_weight .*; got up.lora_B torch.float32 \[3, 2\]"
    refused(saved, match, model=model, optimizer=some)


def test_another_rank_of_a_branch_is_refused_before_the_adapter_is_read(saved):
    model = Toy(rank=1)
    model.down.weight.data.copy_(Toy().down.weight)
    refused(saved, r"trained parameter 0: expected up.lora_A torch.float32 \[1, 4\]; got .*\[2, 4\]", model=model)


def test_another_optimizer_is_refused(saved):
    model = Toy()
    sgd = torch.optim.SGD(trained(model), lr=0.1)
    refused(saved, r"param_groups\[0\]: expected the settings", model=model, optimizer=sgd)
    model = Toy()
    two = torch.optim.AdamW([{"params": trained(model)[:1]}, {"params": trained(model)[1:]}])
    refused(saved, r"param_groups: expected 2 groups", model=model, optimizer=two)


def rewritten(directory, name, change):
    """Change a JSON file of a checkpoint and make the manifest fit, as somebody would who means it."""
    file = directory / name
    data = json.loads(file.read_text())
    changed = change(data)
    file.write_text(json.dumps(data if changed is None else changed))
    write_manifest(directory)


def replaced(directory, name, data):
    (directory / name).write_bytes(data)
    write_manifest(directory)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


HOSTILE_JSON = {
    "no state at all": lambda data: [],
    "an object with two meanings": lambda data: {"dict": [], "tuple": []},
    "a tensor that is not there": lambda data: {"tensor": "t999"},
    "a key that is a list": lambda data: {"dict": [[["x"], 1]]},
    "a key twice": lambda data: {"dict": [["x", 1], ["x", 2]]},
    "lists without end": lambda data: nested(500),
    "a number as text": lambda data: {"float": "1e999"},
}


@pytest.mark.parametrize("name", ["optimizer.json", "random.json"])
@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_state_that_is_not_ours_is_refused(saved, name, kind):
    rewritten(saved, name, HOSTILE_JSON[kind])
    refused(saved, r"(optimizer|random)(\.json)?: expected")


def test_json_without_bounds_is_refused(saved):
    replaced(saved, "random.json", b"[" * 200_000)
    refused(saved, r"random\.json: expected JSON of moderate depth")
    replaced(saved, "random.json", b"[" + b"0," * 5_000_000 + b"0]")
    refused(saved, r"random\.json: expected at most 4000000 JSON values")
    replaced(saved, "random.json", b'{"a": 1, "a": 2}')
    refused(saved, r"random\.json: expected each key once")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "a header of at most"),
        (b"\x80\x04\x95", "at least 8 bytes"),
        (struct.pack("<Q", 2) + b"{}" + b"hidden", "trailing bytes"),
    ],
)
@pytest.mark.parametrize("name", ["optimizer.safetensors", "random.safetensors", "adapter/adapter_model.safetensors"])
def test_tensor_files_are_judged_before_the_library_sees_them(saved, name, data, match):
    replaced(saved, name, data)
    refused(saved, match)


def test_state_that_is_not_finite_is_refused_by_name(saved):
    from safetensors.torch import load_file, save_file

    file = saved / "optimizer.safetensors"
    tensors = load_file(file)
    tensors["t1"] = torch.full_like(tensors["t1"], float("nan"))
    save_file(tensors, file)
    write_manifest(saved)
    refused(saved, r"optimizer: tensor 'state\.0\.exp_avg': expected finite numbers; got nan at")


def test_a_generator_state_of_another_length_is_refused(saved):
    rewritten(saved, "random.json", lambda data: data["dict"][0].__setitem__(1, {"tuple": [3, {"tuple": [1]}, None]}))
    refused(saved, r"random: expected the states of Python's, numpy's and torch's generators; got ValueError")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "adapter/../progress.json", "sub/x", "x\n"])
def test_a_manifest_cannot_name_another_file(saved, name):
    file = saved / MANIFEST
    data = json.loads(file.read_text())
    data["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    file.write_text(json.dumps(data, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"files: expected exactly adapter/adapter_config\.json"):
        latest(saved.parents[1])


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
@pytest.mark.parametrize("name", ["progress.json", MANIFEST, "adapter/adapter_model.safetensors"])
def test_what_is_no_regular_file_is_refused_without_being_opened(saved, tmp_path, name, kind):
    file = saved / name
    aside = tmp_path / "aside"
    file.rename(aside)
    {"link": lambda: file.symlink_to(aside), "pipe": lambda: os.mkfifo(file), "directory": file.mkdir}[kind]()
    with pytest.raises(CheckpointError, match=r"expected a regular file; got a"):
        latest(saved.parents[1])


@pytest.mark.parametrize("name", ["", "adapter"])
def test_a_link_in_the_place_of_a_directory_is_refused(saved, tmp_path, name):
    place = saved / name
    place.rename(tmp_path / "aside")
    place.symlink_to(tmp_path / "aside")
    with pytest.raises(CheckpointError, match="expected a directory; got a link or a file"):
        latest(saved.parents[1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data.update(format_version=2), "format_version: expected 1; got 2"),
        (lambda data: data["progress"].update(step=-1), "expected an integer >= 0; got -1"),
        (lambda data: data["progress"].update(step=True), "expected an integer >= 0; got True"),
        (lambda data: data["progress"].__delitem__("cursor"), "the progress of a run"),
        (lambda data: data["recipe"]["train"].update(steps="many"), "recipe"),
        (lambda data: data.__delitem__("base"), "KeyError: 'base'"),
    ],
)
def test_progress_that_is_not_ours_is_refused(saved, change, match):
    rewritten(saved, "progress.json", change)
    with pytest.raises(CheckpointError, match=match):
        latest(saved.parents[1])


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    model = Toy()
    optimizer = adamw(model)
    one_step(model, optimizer)
    good = save(tmp_path, who(model), progress(1), model, optimizer)
    optimizer.state[model.up.lora_A]["exp_avg"][0, 0] = float("inf")
    with pytest.raises(ExportError, match=r"optimizer: state\.0\.exp_avg: expected finite numbers"):
        save(tmp_path, who(model), progress(2), model, optimizer)
    optimizer.state[model.up.lora_A]["exp_avg"][0, 0] = 0
    with torch.no_grad():
        model.down.lora_B[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"down\.lora_B: expected finite numbers"):
        save(tmp_path, who(model), progress(2), model, optimizer)
    assert list(good.parent.iterdir()) == [good]


def test_a_parameter_that_adapter_files_do_not_hold_is_not_lost_silently(tmp_path):
    model = Toy()
    model.up.weight.requires_grad_(True)
    with pytest.raises(ExportError, match=r"optimizer: up\.weight: expected LoRA factors and trained norms only"):
        save(tmp_path, who(model), progress(1), model, adamw(model))


@pytest.mark.parametrize("extra", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": object()}])
def test_extras_that_json_would_change_are_refused(tmp_path, extra):
    model = Toy()
    with pytest.raises(ExportError, match="progress: extra: expected values that JSON gives back as they were"):
        save(tmp_path, who(model), progress(1, extra=extra), model, adamw(model))


def test_the_fingerprint_is_of_frozen_values_only():
    model = Toy()
    before = base_fingerprint(model)
    one_step(model, adamw(model))
    assert base_fingerprint(model) == before
    with torch.no_grad():
        model.up.weight[0, 0] += 1
    assert base_fingerprint(model) != before


def test_other_versions_are_told(saved):
    versions = latest(saved.parents[1])[0].versions
    assert version_changes(versions) == []
    assert version_changes({**versions, "torch": "1.0"}) == [f"torch 1.0 → {versions['torch']}"]
