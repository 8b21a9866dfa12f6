"""Final norm and rotary tables compiled for the time of a step: which modules, what they compute, and for how long."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from qerl_compile.rl.rollout.cache import CacheShape, PagedCache, paged_attention
from qerl_compile.rl.rollout.decode import DecodeStep, Rows, StepCode
from qerl_compile.rl.rollout.leaves import calling, compiled_leaves
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.stacked_adapters import refresh_stacked_adapters
from qerl_compile.transforming import transform
from tests.models import SOME_FAMILIES, tiny_model
from tests.rl.rollout.engines import RECIPE


def transformed(family="llama", inner="inductor", **options):
    return transform(tiny_model(family, **options), RECIPE, inner=inner)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_final_norm_and_rotary_tables_are_found_in_every_family(family):
    model = transformed(family)
    assert set(compiled_leaves(model)) == {model.model.norm, model.model.rotary_emb}


def test_without_inductor_or_a_transform_there_are_none():
    assert not compiled_leaves(transformed(inner="eager"))
    assert not compiled_leaves(tiny_model("llama"))


@pytest.mark.parametrize("kinds", ["dynamic", "longrope", {"full": "default", "sliding": "longrope"}])
def test_rotary_tables_that_change_on_the_way_are_left_alone(kinds):
    model = transformed()
    model.model.rotary_emb.rope_type = kinds
    assert set(compiled_leaves(model)) == {model.model.norm}


def test_a_module_that_a_plan_changes_is_left_alone():
    model = transformed()
    model.model.norm._compiled_call_impl = model.model.norm.forward
    assert set(compiled_leaves(model)) == {model.model.rotary_emb}


def test_one_graph_each_for_all_sizes_computes_the_same_but_for_rounding():
    model = transformed(dtype=torch.bfloat16)
    norm, rotary = model.model.norm, model.model.rotary_emb
    norm.weight.data = torch.rand(64).bfloat16()
    compiled, before = compiled_leaves(model), counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        for size in (4, 2, 9):
            hidden_B1D, position_B1 = torch.randn(size, 1, 64).bfloat16(), torch.arange(size)[:, None] * 37
            want = norm(hidden_B1D), *rotary(hidden_B1D, position_B1)
            with calling(compiled):
                got = norm(hidden_B1D), *rotary(hidden_B1D, position_B1)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-9)
    assert counters["stats"]["unique_graphs"] == before + 2


def test_modules_have_their_own_calls_again_even_after_an_error():
    module, called = torch.nn.Identity(), []
    with pytest.raises(KeyError), calling({module: called.append}):
        module(1)
        raise KeyError
    module(2)
    assert called == [1]


@torch.inference_mode()
def test_a_step_uses_them_and_nothing_else_does():
    model = transformed(layers=1)
    refresh_stacked_adapters(model)
    rows = Rows.make(2, 2, 2, torch.device("cpu"))
    rows.begin(Sampling(2, (), 0, 0.0))
    cache = PagedCache(CacheShape.of(model, 4), 4, torch.device("cpu"))
    called = []

    def noting(module):
        return lambda *args, **kwargs: (called.append(module), module.forward(*args, **kwargs))[1]

    leaves = {module: noting(module) for module in compiled_leaves(model)}
    code = replace(StepCode.of(model, Sampling(2, (), 0, 0.0), leaves, graphs=True), advance=lambda *_: None)
    step = DecodeStep(code, cache, rows, graphs=True)
    with paged_attention(model):
        step._step(2)
    assert called == [model.model.rotary_emb, model.model.norm]
    model(input_ids=torch.zeros(2, 2, dtype=torch.long), use_cache=False)
    assert len(called) == 2
    assert not compiled_leaves(SimpleNamespace())
