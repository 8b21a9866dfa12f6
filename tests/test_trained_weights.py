"""Full weights under quantization-aware training: numbers, gradients, learning, saving, exporting."""

import copy

import pytest
import torch
from safetensors import safe_open

from qerl_compile import load
from qerl_compile.errors import FormatError, ModelError, RecipeError
from qerl_compile.exporters import export
from qerl_compile.formats.nvfp4 import dequantize, quantize_group
from qerl_compile.passes.quantize import packed_of
from qerl_compile.passes.sparsify import mask_2_4
from qerl_compile.plan import Plan
from qerl_compile.rl.trainer import Trainer
from qerl_compile.trained_weights import trained_packed
from qerl_compile.transforming import transform
from tests.models import SOME_FAMILIES, tiny_model
from tests.pages import Pages

LAYERS = r".*layers\.\d+\..*_proj"
TRAINED = {"quantize": [{"match": LAYERS, "weights": "trained"}]}
SPARSE = {**TRAINED, "sparsify": [{"match": LAYERS}]}
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


def rounded(model, plan: Plan):
    """A plain copy of a dense model whose trained weights hold the values that an export would decode to.

    Its gradient with respect to those values is the straight-through gradient.
    """
    oracle = copy.deepcopy(model).requires_grad_(False)
    for group in dict.fromkeys(plan.group_of(path) for path in plan.trained_weights):
        weights = {path: model.get_submodule(path).weight.data for path in group}
        weights = {path: w * mask_2_4(w) if path in plan.sparse else w for path, w in weights.items()}
        for path, packed in quantize_group(weights).items():
            linear = oracle.get_submodule(path)
            linear.weight = torch.nn.Parameter(dequantize(packed, linear.weight.dtype))
    return oracle


def loss(model) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize(
    "family, recipe, inner",
    [
        *((family, TRAINED, "eager") for family in SOME_FAMILIES),
        ("qwen2", SPARSE, "eager"),
        ("llama", SPARSE, "aot_eager"),
    ],
    ids=[*SOME_FAMILIES, "sparse", "aot_eager"],
)
def test_loss_and_gradients_are_those_of_the_rounded_weights(family, recipe, inner):
    """Qwen2 has biases; the members of a group have unequal ranges, so that a scale of one's own would show."""
    base = tiny_model(family, layers=1)
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.weight.mul_(7)
        base.model.layers[0].mlp.up_proj.weight.mul_(0.3)
    model = transform(copy.deepcopy(base), recipe, inner=inner)
    oracle = rounded(base, model.qerl.plan)
    got, want = loss(model), loss(oracle)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{path}.weight" for path in model.qerl.plan.trained_weights}
    assert len(trained) == 7
    for path in model.qerl.plan.trained_weights:
        gradient = oracle.get_submodule(path).weight.grad
        if path in model.qerl.plan.sparse:
            gradient = gradient * mask_2_4(base.get_submodule(path).weight)
        torch.testing.assert_close(model.get_submodule(path).weight.grad, gradient, msg=path)


def test_a_bias_on_one_member_only_does_not_part_the_group():
    """Fuse leaves such members apart; an export packs them with one amax all the same, and so must the graph."""
    base = tiny_model("llama", layers=1)
    base.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.randn(128))
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(0.3)
    recipe = {"quantize": [{"match": ".*(gate|up)_proj", "weights": "trained"}]}
    model = transform(copy.deepcopy(base), recipe, inner="eager")
    oracle = rounded(base, model.qerl.plan)
    got, want = loss(model), loss(oracle)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    for path in model.qerl.plan.trained_weights:
        torch.testing.assert_close(model.get_submodule(path).weight.grad, oracle.get_submodule(path).weight.grad)


@pytest.fixture(scope="module")
def trained():
    """A sparse model after six steps of AdamW with weight decay, with the losses of the steps."""
    model = transform(tiny_model("qwen2", layers=2), SPARSE, inner="eager")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(6):
        step = loss(model)
        step.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.item())
    return model, losses


def test_the_loss_falls(trained):
    _, losses = trained
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_what_was_zero_stays_zero_and_the_rest_moves(trained):
    model, _ = trained
    before = tiny_model("qwen2", layers=2)
    for path in model.qerl.plan.trained_weights:
        weight, old = model.get_submodule(path).weight, before.get_submodule(path).weight
        kept = mask_2_4(old)
        assert torch.all(weight[~kept] == 0)
        assert torch.all(weight[kept] != old[kept])


def test_an_export_decodes_to_what_the_graph_computed_with(trained, tmp_path):
    model, _ = trained
    export(model, tmp_path / "out", target="vllm")
    served = load(tmp_path / "out", inner="eager", dtype=torch.float32)
    packed = {path: weight for group in trained_packed(model, model.qerl.plan) for path, weight in group.items()}
    assert list(packed) == list(dict.fromkeys(model.qerl.plan.trained_weights))
    assert set(served.qerl.plan.quantize) == set(packed)
    for path, weight in packed.items():
        again = packed_of(served.get_submodule(path))
        assert again is not None
        assert torch.equal(again.codes_NK2, weight.codes_NK2)
        assert torch.equal(*(p.block_decode_scale_NG.view(torch.uint8) for p in (again, weight)))
        assert torch.equal(again.global_scale, weight.global_scale)
        values = dequantize(again, torch.float32).view(-1, 4)
        assert torch.all((values != 0).sum(1) <= 2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # the export rounds the rest to bf16
            if name.removesuffix(".weight") not in packed:
                served.get_parameter(name).copy_(tensor)
        torch.testing.assert_close(served(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_group_comes_with_one_scale_and_every_weight_once(trained):
    model, _ = trained
    groups = list(trained_packed(model, model.qerl.plan))
    assert [len(group) for group in groups] == [3, 1, 2, 1] * 2
    for group in groups:
        assert len({packed.global_scale.item() for packed in group.values()}) == 1


def test_a_weight_that_is_not_finite_is_named(trained):
    broken = copy.deepcopy(trained[0])
    with torch.no_grad():
        broken.get_submodule("model.layers.1.mlp.down_proj").weight[0, :4] = float("nan")
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj: expected finite weights"):
        list(trained_packed(broken, broken.qerl.plan))


def test_it_is_saved_as_an_ordinary_dense_model_and_goes_on(trained, tmp_path):
    model, _ = trained
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "kept" in name]  # noqa: SIM118  # not a dict
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is transformers.Qwen2ForCausalLM
    again = load(tmp_path, SPARSE, inner="eager")
    for name, parameter in model.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter)
        assert torch.equal(again.get_parameter(name), parameter)
        assert again.get_parameter(name).requires_grad == parameter.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_copy_has_weights_and_mask_of_its_own(trained):
    model, _ = trained
    other = copy.deepcopy(model)
    with torch.no_grad():
        for path in other.qerl.plan.trained_weights:
            other.get_submodule(path).weight.mul_(2)
        assert not torch.allclose(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    path = "model.layers.0.mlp.up_proj"
    assert other.get_submodule(path).weight_kept.data_ptr() != model.get_submodule(path).weight_kept.data_ptr()


def test_a_rollout_graph_computes_with_the_same_weights(trained):
    model, _ = trained
    with torch.no_grad():
        want = model(input_ids=IDS, use_cache=False).logits
        got = model(input_ids=IDS, use_cache=False, qerl_cache=Pages(2)).logits
    torch.testing.assert_close(got, want)


def test_noise_and_recompute_go_with_trained_weights():
    base = tiny_model("llama", layers=1)
    plain = transform(copy.deepcopy(base), TRAINED, inner="eager")
    both = transform(copy.deepcopy(base), {**TRAINED, "noise": {}, "train": {"recompute": True}}, inner="aot_eager")
    for model in (plain, both):
        loss(model).backward()
    for path in plain.qerl.plan.trained_weights:
        torch.testing.assert_close(both.get_submodule(path).weight.grad, plain.get_submodule(path).weight.grad)


def test_the_reinforcement_learning_loop_refuses_it_before_any_work():
    model = transform(tiny_model("llama", layers=1), TRAINED, inner="eager")
    with pytest.raises(ModelError, match=r"expected a model whose adapters are trained.*7 linears"):
        Trainer(model, *[None] * 7)


def test_a_weight_that_cannot_be_rounded_is_refused_before_any_work():
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("inf")
    with pytest.raises(FormatError, match=r"down_proj: expected finite weights"):
        transform(model, TRAINED)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model, "qerl")


def test_a_packed_checkpoint_cannot_be_trained_or_made_sparse(tmp_path):
    packed = transform(tiny_model("llama", layers=1), {"quantize": [{"match": LAYERS}]}, inner="eager")
    export(packed, tmp_path / "packed", target="vllm")
    with pytest.raises(RecipeError, match=r"quantize: weights: .*packed in 4 bits.*Train it from the bf16 checkpoint"):
        load(tmp_path / "packed", TRAINED)
    with pytest.raises(RecipeError, match=r"sparsify: .*packed in 4 bits.*the bf16 checkpoint"):
        load(tmp_path / "packed", {"sparsify": [{"match": LAYERS}]})
