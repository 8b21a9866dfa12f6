"""The engines under test, all on one model: a tiny Llama in four bits with adapters that matter.

    sampler = ENGINES["hf"](world)              world.model is what they sample from, world.oracle what it computes

To add an engine, add a line to ENGINES.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import qerl_compile
from qerl_compile.adapter_files import adapters_of
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout.hf import HuggingFaceSampler
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.rollout.types import Sampler
from qerl_compile.rl.rollout.vllm import VllmSampler
from qerl_compile.transforming import resample_noise, transform
from tests.models import dequantized_oracle, tiny_model
from tests.rl.rollout.fake_vllm import fake_modules

RECIPE = Recipe.named("qerl-nvfp4-aqn")
PROMPTS = [(5, 9, 17, 33), (7,), (11, 100, 3, 4, 60, 61, 62, 90, 120, 15, 16), (80, 81)]


@dataclass
class World:
    model: Any
    """Transformed, in fp32, with random adapters."""
    oracle: Any
    """The plain model with the same four-bit values, without adapters."""
    base_dir: Path
    """Its export for vLLM."""
    patch: pytest.MonkeyPatch


def make_world(base_dir: Path) -> World:
    model = tiny_model("llama")
    model.lm_head.weight.data.mul_(8)  # probabilities from 0.5 down, as a trained model has them
    oracle = dequantized_oracle(model, make_plan(model, RECIPE))
    model = transform(model, RECIPE, inner="eager")
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters_of(model).values():
        adapter.b_NR.data = torch.randn(adapter.b_NR.shape, generator=generator) * 0.3
    qerl_compile.export(model, base_dir, target="vllm")
    return World(model, oracle, base_dir, pytest.MonkeyPatch())


def reset(world: World) -> None:
    resample_noise(world.model, 0.0)
    world.patch.undo()


def computing(engine: Any, world: World) -> Any:
    """The Hugging Face model that the engine's logits come from."""
    return engine.llm.model.model if isinstance(engine, VllmSampler) else world.model


def vllm_sampler(world: World, version: str = "0.24.0", **options: Any) -> VllmSampler:
    """A VllmSampler on the fake of this version, in fp32 so that its numbers can be compared."""
    for name, module in fake_modules(version, world.oracle).items():
        world.patch.setitem(sys.modules, name, module)
    return VllmSampler(world.model, world.base_dir, **{"dtype": "float32", **options})


ENGINES: dict[str, Callable[[World], Sampler]] = {
    "hf": lambda world: HuggingFaceSampler(world.model, batch=5),
    "paged": lambda world: PagedSampler(world.model, rows=5, page_tokens=4),
    "vllm": lambda world: vllm_sampler(world, logprobs_mode="raw_logprobs"),
}
