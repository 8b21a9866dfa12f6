"""Our export against what llm-compressor 0.14 wrote for the same models; oracle_llmcompressor.py keeps the fixture."""

import copy
import json

import pytest
import torch
from oracle_llmcompressor import FIXTURE, digests, tiny_model
from safetensors.torch import load_file

from qerl_compile.exporters.compressed_tensors import export_compressed_tensors

EXPECTED = json.loads(FIXTURE.read_text())


@pytest.fixture(params=sorted(EXPECTED))
def exported(request, state, tmp_path):
    model = tiny_model(request.param)
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "out")
    return tmp_path / "out", EXPECTED[request.param]


def test_every_tensor_has_the_name_dtype_shape_and_bytes_of_llmcompressors(exported):
    directory, expected = exported
    ours, theirs = digests(directory), dict(expected["tensors"])
    assert [name for name in expected["rounded"] if not name.endswith("norm.weight")] == []
    for name in expected["rounded"]:  # norms that llm-compressor itself rounds; see oracle_llmcompressor.py
        assert ours[name][:2] == theirs[name][:2]
        theirs[name] = ours[name]
    assert ours == theirs


def test_norms_are_the_models_own_where_llmcompressor_rounds_them(state, tmp_path):
    model = tiny_model("gemma3")
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert len(EXPECTED["gemma3"]["rounded"]) == 13
    for name in EXPECTED["gemma3"]["rounded"]:
        assert torch.equal(tensors[name], model.get_parameter(name))


def test_all_other_families_have_nothing_that_is_rounded():
    assert [family for family in EXPECTED if EXPECTED[family]["rounded"]] == ["gemma3"]


def test_the_quantization_config_says_what_llmcompressors_says(exported):
    directory, expected = exported
    ours = json.loads((directory / "config.json").read_text())["quantization_config"]
    theirs = copy.deepcopy(expected["quantization_config"])
    our_weights, their_weights = (each["config_groups"]["group_0"].pop("weights") for each in (ours, theirs))
    # Keys that one version of compressed-tensors writes and the other leaves out are defaults.
    assert {key: their_weights[key] for key in our_weights} == our_weights
    assert {key for key, value in their_weights.items() if value} - set(our_weights) <= {"observer"}
    assert {key: ours.get(key) for key in theirs.keys() - {"version"}} == {
        key: value for key, value in theirs.items() if key != "version"
    }


def test_the_models_exercise_what_can_go_wrong():
    for family in EXPECTED:
        weights = dict(tiny_model(family).named_parameters())
        q_proj, k_proj = (weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
        assert q_proj.abs().max() != k_proj.abs().max()  # or sharing a scale would change nothing
        assert (q_proj.view(torch.int16) == -(2**15)).any()  # -0.0
        assert (q_proj.unflatten(-1, (-1, 16)) == 0).all(-1).any()  # a block of zeros
        assert (q_proj.abs() > 10 * q_proj.abs().median()).any()  # outliers


def test_the_odd_model_has_zeros_of_every_kind_and_sizes_that_are_no_multiples_of_32():
    weights = {n: w for n, w in tiny_model("odd").named_parameters() if w.dim() == 2 and "layers" in n}
    assert {n for n, w in weights.items() if not w.any()} == {
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert all((w == 0).all(-1).any() for w in weights.values())
    assert {(40, 48), (80, 48), (48, 80), (112, 48), (48, 112)} == {tuple(w.shape) for w in weights.values()}
