"""`adapters_off`: the base inside, every bit restored after, in training graphs and in rollouts, without compiling."""

import copy

import pytest
import torch

from qerl_compile.adapter_files import adapters_of
from qerl_compile.adapters_off import adapters_are_off, adapters_off, learned_parameters
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout import PagedSampler, Sampling
from qerl_compile.transforming import transform
from tests.models import SOME_FAMILIES, tiny_model

TOKENS_BT = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12)]
GREEDY = Sampling(8, (), 0, 0.0)


def recipes(name):
    """A built-in recipe that also trains norms, and the same one without anything to learn."""
    recipe = Recipe.named(name).model_copy(update={"trainable_norms": ".*"})
    return recipe, recipe.model_copy(update={"trainable_norms": None, "lora": ()})


def pair(family="llama", name="nvfp4-lora", dtype=torch.float32):
    """A model that has learned something, and its base: transformed, never adapted."""
    adapted, bare = recipes(name)
    model = transform(tiny_model(family, dtype=dtype), adapted, inner="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, transform(tiny_model(family, dtype=dtype), bare, inner="eager")


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS_BT, use_cache=False).logits


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_inside_is_the_packed_base_bit_for_bit_and_after_it_all_is_as_before(family, dtype):
    model, base = pair(family, dtype=dtype)
    before, learned = bits(model), logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
    assert same(bits(model), before)
    assert torch.equal(logits(model), learned)
    assert not torch.equal(learned, logits(base))


def test_a_dense_base_too():
    model, base = pair(name="bf16-lora", dtype=torch.bfloat16)
    learned = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), learned)


def test_rollouts_inside_are_the_bases_and_need_no_new_graph():
    model, base = pair()
    engine, of_base = (PagedSampler(each, rows=4) for each in (model, base))
    learned, plain = (each.generate(PROMPTS, 1, GREEDY).rollouts for each in (engine, of_base))
    assert learned != plain
    graphs = [compiler.graphs for compiler in model.qerl.compilers]
    with adapters_off(model):
        assert engine.generate(PROMPTS, 1, GREEDY).rollouts == plain
    assert engine.generate(PROMPTS, 1, GREEDY).rollouts == learned
    assert [compiler.graphs for compiler in model.qerl.compilers] == graphs


def test_no_graph_is_compiled_for_it():
    model, _ = pair()
    logits(model)
    graphs = [compiler.graphs for compiler in model.qerl.compilers]
    with adapters_off(model):
        logits(model)
    assert [compiler.graphs for compiler in model.qerl.compilers] == graphs


def test_after_an_exception_all_is_as_before():
    model, _ = pair()
    before = bits(model)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert same(bits(model), before)
    assert not adapters_are_off(model)
    assert torch.is_grad_enabled()


def test_blocks_may_be_nested():
    model, base = pair()
    before = bits(model)
    with adapters_off(model):
        with adapters_off(model):
            assert torch.equal(logits(model), logits(base))
        assert adapters_are_off(model)
        assert torch.equal(logits(model), logits(base))
    assert same(bits(model), before)
    assert not adapters_are_off(model)


def test_a_graph_recorded_before_the_block_runs_backward_after_it():
    model, _ = pair()
    other = copy.deepcopy(model)
    model(input_ids=TOKENS_BT, use_cache=False).logits.square().sum().backward()
    loss = other(input_ids=TOKENS_BT, use_cache=False).logits.square().sum()
    with adapters_off(other):
        assert not other(input_ids=TOKENS_BT, use_cache=False).logits.requires_grad
    loss.backward()
    for ours, theirs in zip(learned_parameters(other), learned_parameters(model), strict=True):
        assert ours.grad.abs().sum() > 0
        assert torch.equal(ours.grad, theirs.grad)


def test_what_was_learned_is_factors_and_norms():
    model, _ = pair()
    assert len(learned_parameters(model)) == 2 * len(adapters_of(model)) + 4
    assert {id(one) for one in learned_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
