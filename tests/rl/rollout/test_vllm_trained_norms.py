"""Trained norms on their way into vLLM: pushed like noisy ones, left out of the adapter, which vLLM would refuse."""

import json
from pathlib import Path

import pytest
import torch

import qerl_compile
from qerl_compile.adapter_files import trained_norms_of
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import transform
from tests.models import dequantized_oracle, tiny_model
from tests.rl.rollout.engines import World, reset, vllm_sampler


def test_trained_norms_are_pushed_like_noisy_ones_and_are_not_in_the_adapter(tmp_path):
    recipe = Recipe.named("nvfp4-lora").model_copy(update={"trainable_norms": r".*\.input_layernorm"})
    model = tiny_model("llama")
    oracle = dequantized_oracle(model, make_plan(model, recipe))
    model = transform(model, recipe, inner="eager")
    qerl_compile.export(model, tmp_path / "base", target="vllm")
    world = World(model, oracle, tmp_path / "base", pytest.MonkeyPatch())
    try:
        sampler = vllm_sampler(world)
        with torch.no_grad():
            for weight in trained_norms_of(model).values():
                weight.add_(0.1)
        request, metrics = sampler.update.push(sampler.llm)
    finally:
        reset(world)
    assert metrics == {"rollout/norms": 2.0, "noise/rms_served": 0.0}
    for path, weight in trained_norms_of(model).items():
        assert torch.equal(sampler.llm.model.get_parameter(f"{path}.weight"), weight)
    config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
