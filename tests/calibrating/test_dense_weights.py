"""A checkpoint is read layer by layer, and what is wrong with it is an error that names the place."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_compile.calibrating.dense_weights import FromCheckpoint
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import CheckpointError
from qerl_compile.loading import empty_model
from qerl_compile.plan import Plan
from tests.models import tiny_model

PLAN = Plan(layers=("model.layers.0", "model.layers.1"))


@pytest.fixture(params=["llama", "gemma3"])
def saved(request, tmp_path):
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def opened(root):
    model = empty_model(root)
    return model, FromCheckpoint(model, open_checkpoint(root), torch.device("cpu"), str(root))


def test_each_layer_comes_when_asked_for(saved):
    original, root = saved
    model, weights = opened(root)
    weights.outside(PLAN)
    assert all(p.is_meta == name.startswith("model.layers.") for name, p in model.named_parameters())
    weights.layer("model.layers.0")
    assert all(p.is_meta == name.startswith("model.layers.1.") for name, p in model.named_parameters())
    weights.layer("model.layers.1")
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model.eval()(ids).logits, original(ids).logits)


def change(root, edit):
    tensors = load_file(root / "model.safetensors")
    edit(tensors)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused_before_reading(saved):
    _, root = saved
    change(root, lambda tensors: tensors.update({NAME: tensors[NAME][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{NAME}'?: expected shape"):
        opened(root)
    change(root, lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match="1 missing"):
        opened(root)


def test_a_tensor_of_another_format_is_refused_before_reading(saved):
    _, root = saved
    change(root, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=rf"{NAME}'?: expected dtype BF16 or .*; got F8_E4M3"):
        opened(root)


def test_a_nan_is_found_when_its_layer_is_read(saved):
    _, root = saved
    change(root, lambda tensors: tensors[NAME][3, 4].fill_(torch.nan))
    _, weights = opened(root)
    weights.outside(PLAN)
    weights.layer("model.layers.0")
    with pytest.raises(CheckpointError, match=rf"{NAME}.*expected finite numbers; got nan at \[3, 4\]"):
        weights.layer("model.layers.1")
