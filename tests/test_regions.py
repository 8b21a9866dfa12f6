"""What the capture of a layer finds out, on seven families; and what it does not touch."""

import pytest
import torch
import transformers
from torch import nn

from qerl_compile.errors import GraphError
from qerl_compile.regions import LayerFacts, capture, decoder_layers, kind, layer_facts, skeleton
from tests.models import SIZES, tiny_model
from tests.passes.toy import Toy, linear

LAYER = "model.layers.0"
QKV = tuple(f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
OUT = f"{LAYER}.self_attn.o_proj"
GATE_UP = tuple(f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up"))
DOWN = f"{LAYER}.mlp.down_proj"
INPUT_NORM = f"{LAYER}.input_layernorm"


def facts_of(model_class: type, config: transformers.PreTrainedConfig) -> LayerFacts:
    with torch.device("meta"):
        model = model_class(config).to(torch.bfloat16)
    found = capture(model)
    assert list(found) == [LAYER]
    return found[LAYER]


def sizes(**changes):
    return {**SIZES, "num_hidden_layers": 1, **changes}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral"])
def test_the_common_layer_has_two_groups_and_two_norms(family):
    config, model = (getattr(transformers, f"{family}{kind}") for kind in ("Config", "ForCausalLM"))
    assert facts_of(model, config(**sizes())) == LayerFacts(
        linears=(*QKV, OUT, *GATE_UP, DOWN),
        groups=(QKV, GATE_UP),
        norms=(INPUT_NORM, f"{LAYER}.post_attention_layernorm"),
    )


def test_norms_of_queries_and_keys_feed_no_linear_in_qwen3():
    found = facts_of(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**sizes()))
    assert found.groups == (QKV, GATE_UP)
    assert found.norms == (INPUT_NORM, f"{LAYER}.post_attention_layernorm")


def test_only_the_norms_before_a_linear_count_in_gemma3():
    """Gemma 3 has four norms per layer; those after attention and MLP feed the residual stream."""
    found = facts_of(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**sizes()))
    assert found.groups == (QKV, GATE_UP)
    assert found.norms == (INPUT_NORM, f"{LAYER}.pre_feedforward_layernorm")


def test_linears_that_are_fused_already_form_no_group_in_phi3():
    found = facts_of(transformers.Phi3ForCausalLM, transformers.Phi3Config(**sizes()))
    assert found == LayerFacts(
        linears=(f"{LAYER}.self_attn.qkv_proj", OUT, f"{LAYER}.mlp.gate_up_proj", DOWN),
        groups=(),
        norms=(INPUT_NORM, f"{LAYER}.post_attention_layernorm"),
    )


def test_experts_of_a_mixture_are_no_linears():
    """Qwen3-MoE: expert weights are 3-D parameters, seen as stacks; the router is seen too, and is no nn.Linear."""
    config = transformers.Qwen3MoeConfig(**sizes(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))
    found = facts_of(transformers.Qwen3MoeForCausalLM, config)
    stacks = tuple(f"{LAYER}.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
    linears = (*QKV, OUT, f"{LAYER}.mlp.gate")
    assert found == LayerFacts(linears=linears, groups=(QKV,), norms=(INPUT_NORM,), stacks=stacks)


def test_norms_after_the_linears_are_not_taken_for_norms_before_them_in_olmo2():
    assert facts_of(transformers.Olmo2ForCausalLM, transformers.Olmo2Config(**sizes())).norms == ()


@pytest.mark.parametrize(
    "gain, modules, norms",
    [
        (torch.ones(16), ("norm", "norm"), ("gain",)),
        (torch.ones(3, 16), ("norm", "norm"), ()),  # not one number per feature
        (torch.ones(16), ("norm", "attention"), ()),  # multiplied elsewhere, cast here
    ],
)
def test_a_norm_is_a_vector_multiplied_in_by_the_module_whose_output_is_read(gain, modules, norms):
    module = nn.Module()
    module.weight = nn.Parameter(gain)
    toy = Toy(gain=module, up=linear(8, 16))
    product = toy.call(torch.mul, toy.read("gain.weight"), toy.input("x", torch.ones(3, 16)))
    cast = toy.call(torch.Tensor.type_as, product, product)
    for node, name in zip((product, cast), modules, strict=True):
        node.meta["nn_module_stack"] = {"layer": ("layer", nn.Module), name: (name, nn.Module)}
    toy.output(toy.linear(cast, "up"))
    assert layer_facts(toy.program).norms == norms


def test_layers_of_one_kind_are_captured_once_and_renamed(monkeypatch):
    seen = []
    monkeypatch.setattr("qerl_compile.regions.layer_facts", lambda program: seen.append(program) or FACTS)
    found = capture(tiny_model("llama", layers=3))
    assert len(seen) == 1
    assert list(found) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert found["model.layers.2"].groups == (("model.layers.2.a", "model.layers.2.b"),)


FACTS = LayerFacts(("model.layers.0.a",), (("model.layers.0.a", "model.layers.0.b"),), ())


def test_capture_leaves_the_model_and_compiled_code_alone():
    model = tiny_model("llama", layers=1)
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    other = torch.compile(torch.sin, backend=backend)
    other(torch.ones(3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(model)
    other(torch.ones(3))
    assert len(graphs) == 1
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model).values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_skeleton_has_shapes_dtypes_and_ties_but_no_storage():
    model = tiny_model("gemma3", layers=1, dtype=torch.bfloat16)
    shadow = skeleton(model)
    assert {t.device.type for t in [*shadow.parameters(), *shadow.buffers()]} == {"meta"}
    assert shadow.lm_head.weight is shadow.model.embed_tokens.weight
    described = [
        {name: (t.shape, t.dtype, t.requires_grad) for name, t in m.named_parameters()} for m in (model, shadow)
    ]
    assert described[0] == described[1]
    assert next(model.parameters()).device.type == "cpu"


def test_layers_of_other_shapes_or_types_are_of_another_kind():
    with torch.device("meta"):
        first, second = (tiny_model("llama", layers=1).model.layers[0] for _ in range(2))
        wide = tiny_model("llama", layers=1, intermediate_size=256).model.layers[0]
        other = tiny_model("qwen2", layers=1).model.layers[0]
    assert kind(first) == kind(second)
    assert len({kind(layer) for layer in (first, wide, other)}) == 3


def test_a_model_without_marked_layers_is_refused():
    with pytest.raises(GraphError, match=r"Sequential: expected decoder layers .* got none"):
        decoder_layers(nn.Sequential(nn.Linear(4, 4)))


def test_layers_inside_layers_are_one_region():
    from transformers.modeling_layers import GradientCheckpointingLayer

    outer = GradientCheckpointingLayer()
    outer.inner = GradientCheckpointingLayer()
    assert list(decoder_layers(nn.ModuleDict({"a": outer, "b": GradientCheckpointingLayer()}))) == ["a", "b"]


def test_a_layer_that_is_never_called_is_refused_by_name():
    model = tiny_model("llama", layers=1)
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.vision = GradientCheckpointingLayer()
    with pytest.raises(GraphError, match=r"vision: expected a decoder layer that runs .* not called"):
        capture(model)


def test_a_layer_that_is_no_single_graph_is_refused():
    model = tiny_model("llama", layers=1)
    model.model.layers[0].mlp.forward = _breaking
    with pytest.raises(GraphError, match=r"LlamaForCausalLM: expected decoder layers .* one graph each"):
        capture(model)


def _breaking(x):
    torch._dynamo.graph_break()
    return x
