"""Stacked adapters on hand-built linears: text, numbers, and who gets which block."""

# ruff: noqa: E501  # graph text

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from qerl_compile.errors import GraphError
from qerl_compile.formats.nvfp4 import dequantize, quantize_group
from qerl_compile.graph import set_owner
from qerl_compile.passes import Adapt, Fuse, LoRA, LoraSite, Quantize
from qerl_compile.passes.adapt import blocks, padded_rank
from qerl_compile.passes.quantize import lay_together, share_storage
from tests.passes.toy import Toy, linear

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(7))
ROWS = {"q": 16, "k": 8, "v": 8}
GROUPS = (("q", "k", "v"),)
MIXED = {"q": LoraSite(2, 3.0), "v": LoraSite(5, 1.0)}  # k has none


def adapted(sites, *, bias=(False, False, False), packed=True, group=True, dtype=torch.float32) -> tuple[Toy, Tensor]:
    """q, k, v over one input with trained adapters on some; what they should give, side by side."""
    modules = {
        name: linear(rows, 32, bias=has, dtype=dtype, seed=rows)
        for (name, rows), has in zip(ROWS.items(), bias, strict=True)
    }
    generator = torch.Generator().manual_seed(5)
    for name, site in sites.items():
        LoRA.state(modules[name], modules[name].weight, site, generator)
        nn.init.normal_(modules[name].lora_B, generator=generator)
    want = torch.cat([F.linear(X, *_merged(modules[n], sites.get(n), modules, packed)) for n in ROWS], -1)
    if packed:
        for name, form in quantize_group({n: m.weight.data for n, m in modules.items()}).items():
            Quantize.state(modules[name], form, dtype)
        share_storage(list(modules.values()))
    elif group:
        lay_together(list(modules.values()), "weight", "fused_weight")
    if group and all(bias):
        lay_together(list(modules.values()), "bias", "fused_bias")
    for module in modules.values():
        set_owner(module.weight, module)
    for members in GROUPS if group else [(name,) for name in sites]:
        _stack({name: modules[name] for name in members}, sites)
    toy = Toy(**modules)
    x = toy.input("x", X.to(dtype))
    return toy.output(*(toy.linear(x, name) for name in ROWS)), want


def _merged(module, site, modules, packed) -> tuple[Tensor, Tensor | None]:
    name = next(name for name, one in modules.items() if one is module)
    weight = module.weight.data.float()
    if packed:
        weights = {n: m.weight.data for n, m in modules.items()}
        weight = dequantize(quantize_group(weights)[name], torch.float32)
    if site is not None:
        weight = weight + site.alpha / site.rank * module.lora_B.data @ module.lora_A.data
    return weight, None if module.bias is None else module.bias.float()


@torch.no_grad()
def _stack(members, sites) -> None:
    Adapt.state(members, sites)
    first = next(iter(members.values()))
    for name, block in blocks(members, sites).items():
        if name in sites:
            first.stacked_lora_A[block.ranks] = members[name].lora_A * sites[name].alpha / sites[name].rank
            first.stacked_lora_B[block.rows, block.ranks] = members[name].lora_B


def passes(sites, *, packed=True, groups=GROUPS):
    quantize = Quantize(frozenset(ROWS), groups) if packed else Quantize(frozenset())
    return Fuse(groups), quantize, Adapt(sites, groups)


def test_a_fused_packed_group_gets_one_adapted_linear_and_one_bias():
    toy, _ = adapted(MIXED, bias=(True, True, True), dtype=torch.bfloat16)
    assert_expected_inline(
        toy.rewrite(*passes(MIXED)),
        """\
x: bfloat16[3, 32] = input
q_fused_bias: bfloat16[32] = weight q.fused_bias
q_fused_packed: uint8[32, 16] = weight q.fused_packed
q_fused_scale: float8_e4m3fn[32, 2] = weight q.fused_scale
q_decode_scale: float32[] = weight q.decode_scale
q_stacked_lora_a: bfloat16[16, 32] = weight q.stacked_lora_A
q_stacked_lora_b: bfloat16[32, 16] = weight q.stacked_lora_B
adapted_linear_default: bfloat16[3, 32] = qerl.adapted_linear(x, q_fused_packed, q_fused_scale, q_decode_scale, q_stacked_lora_a, q_stacked_lora_b)
add: bfloat16[3, 32] = add(adapted_linear_default, q_fused_bias)
split = split(add, [16, 8, 8], -1)
getitem: bfloat16[3, 16] = getitem(split, 0)
getitem_1: bfloat16[3, 8] = getitem(split, 1)
getitem_2: bfloat16[3, 8] = getitem(split, 2)
return (getitem, getitem_1, getitem_2)""",
    )


def test_a_dense_group_reads_the_tensors_of_which_its_weights_are_slices():
    toy, _ = adapted(MIXED, bias=(True, True, True), packed=False)
    assert_expected_inline(
        toy.rewrite(*passes(MIXED, packed=False)),
        """\
x: float32[3, 32] = input
q_fused_weight: float32[32, 32] = weight q.fused_weight
q_fused_bias: float32[32] = weight q.fused_bias
q_stacked_lora_a: float32[16, 32] = weight q.stacked_lora_A
q_stacked_lora_b: float32[32, 16] = weight q.stacked_lora_B
adapted_dense_linear_default: float32[3, 32] = qerl.adapted_dense_linear(x, q_fused_weight, q_fused_bias, q_stacked_lora_a, q_stacked_lora_b)
split = split(adapted_dense_linear_default, [16, 8, 8], -1)
getitem: float32[3, 16] = getitem(split, 0)
getitem_1: float32[3, 8] = getitem(split, 1)
getitem_2: float32[3, 8] = getitem(split, 2)
return (getitem, getitem_1, getitem_2)""",
    )


def test_a_dense_group_without_adapters_is_one_ordinary_linear():
    toy, _ = adapted({}, packed=False)
    assert_expected_inline(
        toy.rewrite(*passes({}, packed=False)),
        """\
x: float32[3, 32] = input
q_fused_weight: float32[32, 32] = weight q.fused_weight
linear_3: float32[3, 32] = linear(x, q_fused_weight, None)
split = split(linear_3, [16, 8, 8], -1)
getitem: float32[3, 16] = getitem(split, 0)
getitem_1: float32[3, 8] = getitem(split, 1)
getitem_2: float32[3, 8] = getitem(split, 2)
return (getitem, getitem_1, getitem_2)""",
    )


def test_a_packed_group_without_adapters_stays_a_quantized_linear():
    toy, _ = adapted({})
    toy.rewrite(*passes({})[:2])
    assert toy.unchanged_by(Adapt({}, GROUPS))


def test_members_that_were_not_fused_read_their_own_blocks():
    toy, _ = adapted(MIXED, bias=(True, False, False))
    assert_expected_inline(
        toy.rewrite(*passes(MIXED)),
        """\
x: float32[3, 32] = input
q_bias: float32[16] = weight q.bias
q_weight_packed: uint8[16, 16] = weight q.weight_packed
q_weight_scale: float8_e4m3fn[16, 2] = weight q.weight_scale
q_decode_scale: float32[] = weight q.decode_scale
q_stacked_lora_a: float32[16, 32] = weight q.stacked_lora_A
q_stacked_lora_b: float32[32, 16] = weight q.stacked_lora_B
getitem: float32[2, 32] = getitem(q_stacked_lora_a, slice(0, 2, None))
getitem_1: float32[16, 2] = getitem(q_stacked_lora_b, (slice(0, 16, None), slice(0, 2, None)))
adapted_linear_default: float32[3, 16] = qerl.adapted_linear(x, q_weight_packed, q_weight_scale, q_decode_scale, getitem, getitem_1)
add: float32[3, 16] = add(adapted_linear_default, q_bias)
k_weight_packed: uint8[8, 16] = weight k.weight_packed
k_weight_scale: float8_e4m3fn[8, 2] = weight k.weight_scale
k_decode_scale: float32[] = weight k.decode_scale
quantized_linear_default_1: float32[3, 8] = qerl.quantized_linear(x, k_weight_packed, k_weight_scale, k_decode_scale)
v_weight_packed: uint8[8, 16] = weight v.weight_packed
v_weight_scale: float8_e4m3fn[8, 2] = weight v.weight_scale
v_decode_scale: float32[] = weight v.decode_scale
q_stacked_lora_a_1: float32[16, 32] = weight q.stacked_lora_A
q_stacked_lora_b_1: float32[32, 16] = weight q.stacked_lora_B
getitem_2: float32[5, 32] = getitem(q_stacked_lora_a_1, slice(2, 7, None))
getitem_3: float32[8, 5] = getitem(q_stacked_lora_b_1, (slice(24, 32, None), slice(2, 7, None)))
adapted_linear_default_1: float32[3, 8] = qerl.adapted_linear(x, v_weight_packed, v_weight_scale, v_decode_scale, getitem_2, getitem_3)
return (add, quantized_linear_default_1, adapted_linear_default_1)""",
    )


SITES = {
    "all": {"q": LoraSite(4, 4.0), "k": LoraSite(4, 4.0), "v": LoraSite(4, 4.0)},
    "mixed ranks and alphas": {"q": LoraSite(2, 3.0), "k": LoraSite(7, 0.5), "v": LoraSite(16, 4.0)},
    "not the first": {"k": LoraSite(3, 2.0), "v": LoraSite(1, 5.0)},
    "some": MIXED,
    "none": {},
}


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES.keys())
@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("group", [True, False])
def test_outputs_are_those_of_the_merged_weights(sites, bias, packed, group):
    """Members with biases on some stand alone and read blocks; without a group each has an adapter of its own."""
    toy, want = adapted(sites, bias=bias, packed=packed, group=group)
    toy.rewrite(*passes(sites, packed=packed, groups=GROUPS if group else ()))
    torch.testing.assert_close(torch.cat(toy.run(), -1), want, rtol=1e-5, atol=1e-5)


def test_a_linear_that_is_no_site_is_left_alone():
    toy, _ = adapted({}, packed=False, group=False)
    assert toy.unchanged_by(Adapt({"o": LoraSite(2, 2.0)}))


def test_a_concatenation_that_is_no_group_is_left_alone():
    toy, _ = adapted({}, packed=False, group=False)
    weights = [toy.read(f"{name}.weight") for name in ("k", "q", "v")]
    toy.program.graph.erase_node(next(iter(reversed(toy.program.graph.nodes))))
    toy.output(toy.call(torch.cat, weights))
    assert toy.unchanged_by(Adapt({}, GROUPS))


def test_a_weight_that_the_model_computes_gets_no_adapter():
    toy, _ = adapted(MIXED, packed=False, group=False)
    weight = toy.call(torch.neg, toy.read("q.weight"))
    toy.program.graph.erase_node(next(node for node in toy.program.graph.nodes if node.op == "output"))
    toy.output(toy.call(F.linear, toy.input("z", X), weight, None))
    text = toy.rewrite(Adapt(MIXED))
    assert "linear(z, neg, None)" in text


def test_missing_buffers_are_an_error_that_says_what_to_call():
    toy, _ = adapted(MIXED)
    del toy.modules["q"].stacked_lora_A
    with pytest.raises(GraphError, match=r"q\.stacked_lora_A: .*refresh_stacked_adapters\(model\)"):
        toy.rewrite(*passes(MIXED))


def test_blocks_are_diagonal_and_cover_every_row():
    modules = {"q": linear(16, 32), "k": linear(8, 32), "v": linear(8, 32)}
    found = blocks(modules, MIXED)
    assert {name: (block.rows, block.ranks) for name, block in found.items()} == {
        "q": (slice(0, 16), slice(0, 2)),
        "k": (slice(16, 24), slice(2, 2)),
        "v": (slice(24, 32), slice(2, 7)),
    }


@pytest.mark.parametrize(
    "rank, padded", [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (96, 128), (128, 128), (129, 144), (192, 192)]
)
def test_ranks_are_padded_to_what_the_kernels_know(rank, padded):
    assert padded_rank(rank) == padded


def test_state_is_zero_in_the_dtype_of_the_weight_and_not_saved():
    modules = {name: linear(rows, 32, dtype=torch.bfloat16) for name, rows in ROWS.items()}
    Adapt.state(modules, MIXED)
    assert modules["q"].stacked_lora_A.shape == (16, 32)
    assert modules["q"].stacked_lora_B.shape == (32, 16)
    assert {modules["q"].stacked_lora_A.dtype, modules["q"].stacked_lora_B.dtype} == {torch.bfloat16}
    assert not modules["q"].stacked_lora_A.any() | modules["q"].stacked_lora_B.any()
    assert set(modules["q"].state_dict()) == {"weight"}
    assert not list(modules["k"].buffers())
