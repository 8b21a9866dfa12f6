"""What the ONNX export refuses, and that it then writes nothing."""

import importlib.util

import pytest
import torch

from qerl_compile.errors import ExportError
from qerl_compile.exporters.onnx import export_onnx
from qerl_compile.exporters.onnx.twin import make_twin
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import transform
from tests.models import tiny_model


@pytest.fixture
def model():
    return transform(tiny_model("llama", layers=1), "nvfp4-lora", inner="eager")


@pytest.mark.parametrize("choice", [{"runtime": "tensorrt"}, {"adapter": "merged"}])
def test_an_unknown_choice_is_refused(choice, model, tmp_path):
    with pytest.raises(ExportError, match=r"expected one of .*; got '(tensorrt|merged)'"):
        export_onnx(model, tmp_path / "out", **choice)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_is_refused(model, tmp_path):
    with pytest.raises(ExportError, match="does not exist yet"):
        export_onnx(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_with_the_command_that_installs_it(model, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ExportError, match=r"no onnxscript\. Run `pip install 'qerl-compile\[onnx\]'`"):
        export_onnx(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.lora_B"])
def test_nan_is_refused_by_name(name, model, tmp_path):
    model.get_parameter(name).data.view(-1)[3] = float("nan")
    with pytest.raises(ExportError, match=f"{name}: expected finite numbers"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_overwritten_block_scale_is_refused(model, tmp_path):
    path = "model.layers.0.mlp.up_proj"
    model.get_submodule(path).weight_scale.data.view(torch.uint8)[0, 0] = 0xFF
    with pytest.raises(ExportError, match=rf"{path}: block_decode_scale_NG: expected no NaN"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_folded_into_a_head_that_is_the_embedding(tmp_path):
    quantize = [{"match": ".*_proj", "format": "nvfp4"}]
    lora = [{"match": "lm_head", "rank": 4, "alpha": 8}]
    recipe = Recipe.resolve({"version": 1, "quantize": quantize, "lora": lora})
    model = transform(tiny_model("gemma3", layers=1), recipe, inner="eager")
    with pytest.raises(ExportError, match="lm_head: expected a weight of its own"):
        export_onnx(model, tmp_path / "out", adapter="folded")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_state_is_no_growing_cache_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ExportError, match="layers that cache keys and values"):
        make_twin(MambaForCausalLM(config), {})


def test_a_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(ExportError, match="expected a transformers causal LM"):
        make_twin(torch.nn.Linear(2, 2), {})
