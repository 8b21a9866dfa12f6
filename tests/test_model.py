"""Activation checkpointing of a transformed model, under all the names that trainers call it by."""

import pytest
import torch

from qerl_compile.passes import Recompute
from qerl_compile.transforming import transform
from tests.models import tiny_model

TOKENS_BT = torch.arange(12).reshape(2, 6)
RECIPE = {"quantize": [{"match": ".*_proj"}], "lora": [{"match": ".*q_proj", "rank": 4}]}


def recomputes(model) -> bool:
    return all(any(isinstance(one, Recompute) for one in compiler.passes) for compiler in model.qerl.compilers)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_every_name_of_checkpointing_switches_the_recompute_pass(name):
    model = transform(tiny_model("llama", layers=1), RECIPE, inner="eager")
    assert not recomputes(model)
    getattr(model, f"{name}_enable")({"use_reentrant": True})
    assert recomputes(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    getattr(model, f"{name}_disable")()
    assert not recomputes(model)


def test_a_model_that_comes_checkpointed_gets_the_pass_instead_and_trains():
    model = tiny_model("llama", layers=1)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model = transform(model, RECIPE, inner="eager").train()
    assert recomputes(model)
    model(input_ids=TOKENS_BT, use_cache=False).logits.sum().backward()
    assert model.get_submodule("model.layers.0.self_attn.q_proj").lora_B.grad.abs().sum() > 0
