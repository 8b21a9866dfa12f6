"""What modules own after attaching, whatever the order in which weights arrive; links that come and go."""

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from qerl_compile.attach import Attacher, link, unlink
from qerl_compile.errors import GraphError, ModelError
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize, quantize, quantize_group
from qerl_compile.graph import is_ghost, owner_of
from qerl_compile.passes import LoraSite, QuantizeSite
from qerl_compile.plan import Plan

NAMES = ("q", "k", "v", "o")
PLAN = Plan(
    layers=(),
    quantize=dict.fromkeys(NAMES, QuantizeSite()),
    groups=(("q", "k", "v"),),
    lora={"q": LoraSite(2, 4.0), "o": LoraSite(3, 1.0)},
    noise=("norm",),
)
TRAINED = replace(PLAN, trained_norms=("norm",))


class Tiny(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        for rows, name in zip((32, 16, 16, 32), NAMES, strict=True):
            self.add_module(name, nn.Linear(32, rows, bias=name == "q", dtype=dtype))
        self.norm = nn.LayerNorm(32, dtype=dtype)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.data for name in NAMES}


def attached(plan: Plan = PLAN, order=NAMES, seed: int = 0) -> tuple[Tiny, Plan]:
    model = Tiny()
    weights = weights_of(model)
    attacher = Attacher(model, plan, seed=seed)
    for name in order:
        attacher.weight(name, weights[name])
    return model, attacher.finish()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in model.state_dict().items()}


def test_groups_share_one_amax_and_the_rest_have_their_own():
    model, _ = attached()
    want = quantize_group({name: weights_of(Tiny())[name] for name in "qkv"}) | {"o": quantize(weights_of(Tiny())["o"])}
    for name in NAMES:
        module = model.get_submodule(name)
        assert torch.equal(module.weight_packed, want[name].codes_NK2)
        assert torch.equal(module.weight_global_scale, want[name].global_scale)
    assert model.q.weight_global_scale == model.v.weight_global_scale


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES))[1::5])
def test_the_order_of_arrival_changes_no_bit(order):
    assert bits(attached(order=order)[0]) == bits(attached()[0])


def test_a_group_waits_for_its_last_member_and_then_lets_go_of_all():
    model = Tiny()
    attacher = Attacher(model, PLAN)
    alive = {}

    def give(name):
        weight = weights_of(model)[name].clone()
        alive[name] = weakref.ref(weight)
        attacher.weight(name, weight)

    give("q")
    give("k")
    gc.collect()
    assert alive["q"]() is not None
    assert not hasattr(model.q, "weight_packed")
    give("v")
    gc.collect()
    assert [reference() for reference in alive.values()] == [None, None, None]
    assert hasattr(model.q, "weight_packed")


def as_multiplier(packed: PackedNVFP4) -> PackedNVFP4:
    scalar = packed.decode_scale.reshape(1)
    return PackedNVFP4(packed.codes_NK2, packed.block_decode_scale_NG, scalar, "multiplier")


def test_a_group_that_came_with_multipliers_is_fused_and_keeps_them_and_the_scales_of_its_input():
    model = Tiny()
    attacher = Attacher(model, PLAN)
    packed = quantize_group({name: weights_of(model)[name] for name in "qkv"})
    for name, each in packed.items():
        attacher.packed(name, as_multiplier(each), torch.float32, input_scale=torch.tensor([0.25]))
    attacher.weight("o", weights_of(model)["o"])
    assert attacher.finish().groups == PLAN.groups
    for name, each in packed.items():
        module = model.get_submodule(name)
        assert torch.equal(module.weight_scale_2, each.decode_scale.reshape(1))
        assert torch.equal(module.input_scale, torch.tensor([0.25]))
    assert not hasattr(model.o, "weight_scale_2")
    assert not hasattr(model.o, "input_scale")


@pytest.mark.parametrize("factor, groups", [(1.0, PLAN.groups), (2.0, ())])
def test_one_gemm_asks_for_one_multiplier_however_its_members_spell_it(factor, groups):
    """q comes with a divisor, a power of two so that its reciprocal is exact; k and v with multipliers."""
    model = Tiny()
    attacher = Attacher(model, PLAN)
    for name in "qkv":
        packed = quantize(weights_of(model)[name])
        direction = "divisor" if name == "q" else "multiplier"
        scalar = torch.tensor([4.0 if name == "q" else 0.25 * factor])
        attacher.packed(
            name, PackedNVFP4(packed.codes_NK2, packed.block_decode_scale_NG, scalar, direction), torch.float32
        )
    attacher.weight("o", weights_of(model)["o"])
    assert attacher.finish().groups == groups


def test_only_adapters_are_trained():
    model, _ = attached()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"q.lora_A", "q.lora_B", "o.lora_A", "o.lora_B"}
    model, _ = attached(TRAINED)
    norms = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - trained
    assert norms == {"norm.trained_weight"}


def test_a_trained_norm_keeps_the_bases_weight_beside_its_own_and_adapters_start_as_without_it():
    model, _ = attached(TRAINED)
    assert model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(model.norm.weight, Tiny().norm.weight)
    assert model.norm.trained_weight.dtype == torch.float32
    assert torch.equal(model.norm.trained_weight, model.norm.weight.float())
    without = bits(attached()[0])
    assert {name: value for name, value in bits(model).items() if name in without} == without


@pytest.mark.parametrize("noise", [(), ("norm",)])
def test_a_trained_norm_knows_its_module_and_survives_unlinking(noise):
    model, plan = attached(replace(TRAINED, noise=noise))
    assert owner_of(model.norm.weight) is model.norm
    unlink(model, plan)
    assert owner_of(model.norm.weight) is None
    assert model.norm.trained_weight.requires_grad
    link(model, plan)
    assert owner_of(model.norm.weight) is model.norm


def test_adapters_follow_the_seed():
    assert bits(attached(seed=3)[0]) == bits(attached(seed=3)[0])
    assert bits(attached(seed=3)[0]) != bits(attached(seed=4)[0])


def test_what_is_derived_is_not_saved():
    model, _ = attached()
    own = {"weight_packed", "weight_scale", "weight_global_scale"}
    saved = {name for name in model.state_dict() if name.startswith("k.")}
    assert saved == {f"k.{name}" for name in own}
    assert {"norm.weight", "q.bias"} <= set(model.state_dict())
    assert not any(name.endswith(("noise", "decode_scale", "fused_packed")) for name in model.state_dict())


def test_every_site_knows_its_module():
    model, _ = attached()
    for name in (*NAMES, "norm"):
        assert owner_of(model.get_submodule(name).weight) is model.get_submodule(name)


def test_unlink_drops_what_link_derives_and_link_restores_it():
    model, plan = attached()
    before = {name: t.clone() for name, t in model.named_buffers()}
    unlink(model, plan)
    assert set(dict(model.named_buffers())) == {f"{name}.weight_global_scale" for name in NAMES} | {"norm.noise"}
    assert owner_of(model.norm.weight) is None
    link(model, plan)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert is_ghost(tensor) or torch.equal(tensor.float(), before[name].float())
    assert model.q.fused_packed.untyped_storage().data_ptr() == model.v.weight_packed.untyped_storage().data_ptr()


def test_a_dense_dtype_other_than_the_weights_is_what_the_ghost_has():
    model = Tiny()
    attacher = Attacher(model, PLAN)
    for name, weight in weights_of(Tiny(torch.float32)).items():
        attacher.weight(name, weight, dtype=torch.float16)
    attacher.finish()
    assert {model.get_submodule(name).weight.dtype for name in NAMES} == {torch.float16}
    want = quantize(weights_of(Tiny(torch.float32))["o"])
    assert torch.equal(model.o.weight_packed, want.codes_NK2)


def packed_one_by_one(scale_k: float) -> tuple[Tiny, Plan]:
    model = Tiny()
    attacher = Attacher(model, PLAN)
    group = quantize_group({name: weights_of(Tiny())[name] for name in "qkv"})
    weights = weights_of(Tiny())
    for name in "qkv":
        packed = quantize(weights[name] * scale_k) if name == "k" and scale_k != 1 else group[name]
        attacher.packed(name, packed, torch.bfloat16)
    attacher.packed("o", quantize(weights["o"]), torch.bfloat16)
    return model, attacher.finish()


def test_members_that_came_packed_with_one_scale_are_fused():
    model, plan = packed_one_by_one(1)
    assert plan.groups == PLAN.groups
    assert model.q.fused_packed.shape == (64, 16)


def test_members_that_came_packed_with_unequal_scales_are_not():
    model, plan = packed_one_by_one(3.0)
    assert plan.groups == ()
    assert not hasattr(model.q, "fused_packed")


def test_the_dense_rest_of_a_group_shares_its_own_amax():
    model = Tiny()
    weights = weights_of(Tiny())
    attacher = Attacher(model, PLAN)
    attacher.packed("q", quantize(weights["q"] * 9), torch.bfloat16)
    for name in "kvo":
        attacher.weight(name, weights[name])
    plan = attacher.finish()
    want = quantize_group({name: weights[name] for name in "kv"})
    assert plan.groups == ()
    for name in "kv":
        assert torch.equal(model.get_submodule(name).weight_packed, want[name].codes_NK2)


def test_a_packed_module_refuses_a_call_in_plain_python():
    model, _ = attached()
    with pytest.raises(GraphError, match=r"o: expected a call from inside a rewritten graph"):
        model.o(torch.zeros(1, 32))


def test_loading_a_state_dict_copies_into_the_groups_storage_and_derives_the_multiplier():
    source = Tiny()
    with torch.no_grad():
        for name in NAMES:
            source.get_submodule(name).weight.mul_(5)
    weights = weights_of(source)
    attacher = Attacher(source, PLAN)
    for name in NAMES:
        attacher.weight(name, weights[name])
    attacher.finish()
    model, _ = attached()
    storage = model.q.fused_packed.untyped_storage().data_ptr()
    model.load_state_dict(source.state_dict())
    assert bits(model) == bits(source)
    assert model.q.fused_packed.untyped_storage().data_ptr() == storage
    assert torch.equal(model.q.fused_packed, source.q.fused_packed)
    assert torch.equal(model.k.decode_scale, source.k.decode_scale)
    with pytest.raises(ModelError, match="assign=True"):
        model.load_state_dict(source.state_dict(), assign=True)


def test_the_packed_form_stands_for_the_rounded_weight():
    model, _ = attached()
    want = dequantize(quantize(weights_of(Tiny())["o"]), torch.float32)
    got = torch.ops.qerl.dequantize(model.o.weight_packed, model.o.weight_scale, model.o.decode_scale, torch.float32)
    assert torch.equal(got, want)
