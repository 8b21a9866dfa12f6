"""How many graphs a training step compiles, whatever the depth; and what the first layer gives for sharing one."""

import pytest
import torch

from qerl_compile.transforming import transform
from tests.models import LONG, SOME_FAMILIES, dequantized_oracle, tiny_model, with_filled_adapters

TOKENS_BT = torch.arange(3, 14).repeat(2, 1)


def graphs(model):
    return [compiler.graphs for compiler in model.qerl.compilers]


@pytest.mark.parametrize("family", SOME_FAMILIES if LONG else ("gemma3",))  # a Llama is counted below
def test_all_layers_train_with_one_graph_for_each_kind_of_layer(family):
    model = transform(tiny_model(family, layers=3), "qerl-nvfp4-aqn", inner="eager")
    for columns in (11, 5):
        model(input_ids=TOKENS_BT[:, :columns], use_cache=False).logits.logsumexp(-1).mean().backward()
    assert graphs(model) == [1]


def test_the_first_layers_adapters_get_the_gradients_that_autograd_gives_them():
    model = tiny_model("llama")
    ours = transform(tiny_model("llama"), "qerl-nvfp4-aqn", inner="eager")
    oracle = dequantized_oracle(model, ours.qerl.plan)
    path = "model.layers.0.self_attn.o_proj"
    site, plain = ours.get_submodule(path), oracle.get_submodule(path)
    with torch.no_grad():
        site.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    a_RK, b_NR = (tensor.detach().clone().requires_grad_() for tensor in (site.lora_A, site.lora_B))
    scaling = ours.qerl.plan.lora[path].alpha / ours.qerl.plan.lora[path].rank
    plain.register_forward_hook(lambda _, args, y: y + args[0] @ a_RK.T @ b_NR.T * scaling)
    for one in (ours, oracle):
        one(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean().backward()
    torch.testing.assert_close(site.lora_A.grad, a_RK.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(site.lora_B.grad, b_NR.grad, rtol=1e-4, atol=1e-7)


def test_a_model_without_anything_to_train_records_no_gradients():
    model = transform(tiny_model("llama"), "qerl-nvfp4-aqn", inner="eager").requires_grad_(False)
    assert not model(input_ids=TOKENS_BT, use_cache=False).logits.requires_grad


def test_embeddings_that_are_trained_still_get_their_gradient():
    model = transform(tiny_model("llama"), "qerl-nvfp4-aqn", inner="eager")
    embedding = model.get_input_embeddings().weight.requires_grad_()
    model(input_ids=TOKENS_BT, use_cache=False).logits.sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.any()
    assert graphs(model) == [1]


def adapted_model():
    """Lowered by AOTAutograd, which settles what needs a gradient when it compiles; B is not 0."""
    return with_filled_adapters(transform(tiny_model("llama"), "nvfp4-lora", inner="aot_eager"))


def without_gradient(model):
    """Names of the parameters that need a gradient and got none from a loss of all logits."""
    model.zero_grad()
    model(input_ids=TOKENS_BT, use_cache=False).logits.float().square().sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def test_adapters_train_in_layers_beside_one_whose_adapters_are_frozen():
    model = adapted_model()
    for name, parameter in model.named_parameters():
        if "layers.0.mlp" in name:
            parameter.requires_grad_(False)
    assert without_gradient(model) == []
    assert graphs(model) == [1, 1]


def test_adapters_that_are_thawed_get_the_gradients_that_they_get_from_the_start():
    model, fresh = adapted_model(), adapted_model()
    factors = [parameter for name, parameter in model.named_parameters() if name.endswith("lora_A")]
    for parameter in factors:
        parameter.requires_grad_(False)
    assert without_gradient(model) == []
    for parameter in factors:
        parameter.requires_grad_(True)
    assert without_gradient(model) == []
    assert without_gradient(fresh) == []
    wanted = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad)
