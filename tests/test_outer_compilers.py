"""Compilers around a transformed model, and other things that reach past its compiled calls."""

import copy

import pytest
import torch
from transformers.generation.configuration_utils import CompileConfig

from qerl_compile.errors import GraphError, ModelError
from qerl_compile.transforming import transform
from tests.models import tiny_model, with_filled_adapters

TOKENS_BT = torch.arange(3, 14).repeat(2, 1)


def adapted(recipe="nvfp4-lora", model=None, **options):
    return with_filled_adapters(transform(model or tiny_model("llama"), recipe, inner="eager", **options))


@pytest.mark.parametrize("recipe", ["nvfp4-lora", "bf16-lora"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_around_the_model_changes_nothing(recipe, backend):
    model = adapted(recipe)
    want = model(input_ids=TOKENS_BT, use_cache=False).logits
    got = torch.compile(model, backend=backend)(input_ids=TOKENS_BT, use_cache=False).logits
    torch.testing.assert_close(got, want)
    got.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_model_that_was_compiled_before_is_transformed_like_any_other():
    model = tiny_model("llama")
    model.compile(backend="eager")
    got, want = adapted(model=model), adapted()
    torch.testing.assert_close(got(input_ids=TOKENS_BT).logits, want(input_ids=TOKENS_BT).logits)


@pytest.mark.parametrize("decode", ["regional", "whole"])
def test_generate_may_compile_for_a_static_cache(decode):
    """As it does by itself on a GPU."""
    model = adapted(decode=decode)
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    given = {"max_new_tokens": 6, "do_sample": False}
    compiled = model.generate(TOKENS_BT, cache_implementation="static", compile_config=config, **given)
    assert torch.equal(compiled, model.generate(TOKENS_BT, **given))


def test_a_packed_module_in_somebody_elses_graph_is_refused():
    model = adapted()
    with pytest.raises(GraphError, match="rewritten graph"):
        torch.compile(model.model.layers[0].mlp, backend="eager")(torch.zeros(1, 3, 64))


def test_embeddings_of_inference_mode_can_be_trained_on():
    model = adapted()
    with torch.inference_mode():
        embeddings_BTD = model.get_input_embeddings()(TOKENS_BT)
    model(inputs_embeds=embeddings_BTD, use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("key", ["output_hidden_states", "output_attentions"])
def test_what_transformers_collects_within_layers_is_refused_and_leaves_the_model_as_it_was(key):
    model = adapted()
    with pytest.raises(ModelError, match=f"{key}=True"):
        model(input_ids=TOKENS_BT, **{key: True})
    assert model(input_ids=TOKENS_BT).logits.isfinite().all()


def test_hooks_that_transformers_left_behind_are_taken_away():
    model = tiny_model("llama")
    model(input_ids=TOKENS_BT, output_hidden_states=True)
    want = adapted()
    torch.testing.assert_close(adapted(model=model)(input_ids=TOKENS_BT).logits, want(input_ids=TOKENS_BT).logits)


@pytest.mark.parametrize("recipe", ["qerl-nvfp4-aqn", "bf16-lora"])
def test_a_weight_that_took_anothers_place_is_named(recipe):
    model = adapted(recipe)
    path = "model.layers.0." + ("input_layernorm" if recipe == "qerl-nvfp4-aqn" else "self_attn.q_proj")
    module = model.get_submodule(path)
    module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    with pytest.raises(Exception, match=rf"{path}: expected the weight that transform left"):
        model(input_ids=TOKENS_BT)


def test_assigning_a_state_dict_is_refused_for_dense_sites_too():
    model = adapted("bf16-lora")
    with pytest.raises(ModelError, match="assign=True"):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
