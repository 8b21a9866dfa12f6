"""Lowering of hand-built linears to packed ones: text, numbers, and what a packed module owns."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn import functional as F

from qerl_compile.errors import GraphError
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize, quantize, quantize_group
from qerl_compile.graph import is_ghost, set_owner
from qerl_compile.passes import Fuse, Quantize
from qerl_compile.passes.quantize import packed_of, share_storage
from tests.passes.toy import Toy, linear

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(7))


def pack(**modules: nn.Linear) -> dict[str, Tensor]:
    """Pack linears as one group; return their dequantized weights."""
    dense: dict[str, Tensor] = {}
    packed = quantize_group({name: module.weight.data for name, module in modules.items()})
    for name, module in modules.items():
        dtype = module.weight.dtype
        dense[name] = dequantize(packed[name], torch.float32)
        Quantize.state(module, packed[name], dtype)
    if len(modules) > 1:
        share_storage(list(modules.values()))
    for module in modules.values():
        set_owner(module.weight, module)
    return dense


def one_linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Toy, Tensor]:
    toy = Toy(up=linear(8, 32, bias=bias, dtype=dtype))
    (dense,) = pack(**toy.modules).values()
    toy.output(toy.call(torch.relu, toy.linear(toy.input("x", X.to(dtype)), "up")))
    return toy, dense


def two_linears(*, bias: bool) -> tuple[Toy, dict[str, Tensor]]:
    toy = Toy(q=linear(8, 32, bias=bias), up=linear(4, 32, bias=bias, seed=1))
    dense = pack(**toy.modules)
    x = toy.input("x", X)
    return toy.output(toy.linear(x, "q"), toy.linear(x, "up")), dense


SITES = frozenset({"q", "up"})
GROUPS = (("q", "up"),)


def test_a_linear_becomes_a_packed_linear_and_a_dense_bias():
    toy, _ = one_linear(dtype=torch.bfloat16)
    assert_expected_inline(
        toy.text(),
        """\
x: bfloat16[3, 32] = input
up_bias: bfloat16[8] = weight up.bias
up_weight: bfloat16[8, 32] = weight up.weight
linear: bfloat16[3, 8] = linear(x, up_weight, up_bias)
relu: bfloat16[3, 8] = relu(linear)
return (relu,)""",
    )
    assert_expected_inline(
        toy.rewrite(Quantize(frozenset({"up"}))),
        """\
x: bfloat16[3, 32] = input
up_bias: bfloat16[8] = weight up.bias
up_weight_packed: uint8[8, 16] = weight up.weight_packed
up_weight_scale: float8_e4m3fn[8, 2] = weight up.weight_scale
up_decode_scale: float32[] = weight up.decode_scale
quantized_linear_default: bfloat16[3, 8] = qerl.quantized_linear(x, up_weight_packed, up_weight_scale, up_decode_scale)
add: bfloat16[3, 8] = add(quantized_linear_default, up_bias)
relu: bfloat16[3, 8] = relu(add)
return (relu,)""",
    )


def test_a_fused_linear_reads_the_storage_of_its_group():
    toy, _ = two_linears(bias=True)
    assert_expected_inline(
        toy.rewrite(Fuse(GROUPS), Quantize(SITES, GROUPS)),
        """\
x: float32[3, 32] = input
q_bias: float32[8] = weight q.bias
up_bias: float32[4] = weight up.bias
cat_1: float32[12] = cat([q_bias, up_bias])
q_fused_packed: uint8[12, 16] = weight q.fused_packed
q_fused_scale: float8_e4m3fn[12, 2] = weight q.fused_scale
q_decode_scale: float32[] = weight q.decode_scale
quantized_linear_default: float32[3, 12] = qerl.quantized_linear(x, q_fused_packed, q_fused_scale, q_decode_scale)
add: float32[3, 12] = add(quantized_linear_default, cat_1)
split = split(add, [8, 4], -1)
getitem: float32[3, 8] = getitem(split, 0)
getitem_1: float32[3, 4] = getitem(split, 1)
return (getitem, getitem_1)""",
    )


@pytest.mark.parametrize("bias", [True, False])
def test_the_packed_linear_multiplies_by_the_dequantized_weight(bias):
    toy, dense = one_linear(bias=bias)
    toy.rewrite(Quantize(frozenset({"up"})))
    torch.testing.assert_close(toy.run()[0], F.linear(X, dense, toy.modules["up"].bias).relu())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_group_gives_the_same_numbers_fused_or_not(bias, fuse):
    toy, dense = two_linears(bias=bias)
    toy.rewrite(*[Fuse(GROUPS)] * fuse, Quantize(SITES, GROUPS))
    for got, path in zip(toy.run(), ("q", "up"), strict=True):
        torch.testing.assert_close(got, F.linear(X, dense[path], toy.modules[path].bias))


def test_a_bf16_result_stays_bf16():
    toy, dense = one_linear(dtype=torch.bfloat16)
    toy.rewrite(Quantize(frozenset({"up"})))
    (got,) = toy.run()
    want = F.linear(toy.args[0].float(), dense, toy.modules["up"].bias.float()).relu()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.05)


def test_a_packed_weight_used_twice_is_lowered_at_both_uses():
    toy = Toy(o=linear(32, 32))
    (dense,) = pack(**toy.modules).values()
    toy.output(toy.linear(toy.linear(toy.input("x", X), "o"), "o"))
    text = toy.rewrite(Quantize(frozenset({"o"})))
    assert text.count("= qerl.quantized_linear(") == 2
    assert "weight o.weight\n" not in text
    torch.testing.assert_close(toy.run()[0], X @ dense.T @ dense.T)


@pytest.mark.parametrize("quantize", [Quantize(frozenset()), Quantize(frozenset({"down", "u", "up.weight"}))])
def test_a_linear_that_is_no_site_is_left_alone_and_then_refused_as_a_ghost(quantize):
    toy, _ = one_linear()
    assert toy.unchanged_by(quantize)
    with pytest.raises(GraphError, match=r"up\.weight: expected .* got a graph in which linear still reads it"):
        toy.run()


def test_a_dense_linear_stays_dense_beside_a_packed_one():
    toy = Toy(up=linear(8, 32), dense=linear(8, 32, seed=3))
    pack(up=toy.modules["up"])
    x = toy.input("x", X)
    toy.output(toy.linear(x, "up"), toy.linear(x, "dense"))
    text = toy.rewrite(Quantize(frozenset({"up"})))
    assert text.count("= linear(") == 1
    torch.testing.assert_close(toy.run()[1], F.linear(X, toy.modules["dense"].weight))


def test_a_concatenation_that_is_no_group_is_left_alone():
    toy, _ = two_linears(bias=False)
    toy.rewrite(Fuse((("up", "q"),)))
    assert toy.unchanged_by(Quantize(frozenset(), GROUPS))


def test_state_names_are_those_of_the_checkpoint_and_the_ghost_is_small():
    module = linear(8, 32, dtype=torch.bfloat16)
    pack(up=module)
    assert {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()} == {
        "weight_packed": ((8, 16), torch.uint8),
        "weight_scale": ((8, 2), torch.float8_e4m3fn),
        "weight_global_scale": ((1,), torch.float32),
    }
    assert is_ghost(module.weight)
    assert (module.weight.shape, module.weight.dtype) == ((8, 32), torch.bfloat16)
    assert module.weight.untyped_storage().nbytes() == 2
    assert module.weight.isnan().all()
    assert {name for name, _ in module.named_parameters()} == {"weight_packed", "weight_scale"}
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_group_has_one_copy_of_its_codes():
    q, up = linear(8, 32), linear(4, 32, seed=1)
    pack(q=q, up=up)
    assert q.fused_packed.shape == (12, 16)
    assert q.fused_scale.shape == (12, 2)
    whole = q.fused_packed.untyped_storage().data_ptr()
    assert {m.weight_packed.untyped_storage().data_ptr() for m in (q, up)} == {whole}
    assert torch.equal(q.fused_packed[8:], up.weight_packed)
    assert not hasattr(up, "fused_packed")
    q.fused_packed[9, 3] = 77
    assert up.weight_packed[1, 3] == 77


def test_the_divisor_of_a_checkpoint_becomes_a_multiplier():
    module = linear(8, 32)
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    block = torch.ones(8, 2).to(torch.float8_e4m3fn)
    Quantize.state(module, PackedNVFP4(codes, block, torch.tensor([4.0]), direction="divisor"), torch.float32)
    assert module.decode_scale.shape == ()
    assert module.decode_scale.item() == 0.25


def test_the_multiplier_of_a_checkpoint_is_used_as_it_is():
    """0.7361809 is one of the numbers whose reciprocal's reciprocal is another number."""
    codes, block = torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 2).to(torch.float8_e4m3fn)
    multiplier = torch.tensor([0.7361809])
    assert multiplier.reciprocal().reciprocal() != multiplier
    module = linear(8, 32)
    Quantize.state(module, PackedNVFP4(codes, block, multiplier.clone(), direction="multiplier"), torch.float32)
    assert set(module.state_dict()) == {"weight_packed", "weight_scale", "weight_scale_2"}
    assert torch.equal(module.weight_scale_2, multiplier)
    assert torch.equal(module.decode_scale, multiplier[0])
    module.decode_scale.zero_()  # derived: writing into it leaves the source's number alone
    assert torch.equal(module.weight_scale_2, multiplier)


@pytest.mark.parametrize("direction", ["divisor", "multiplier"])
def test_a_module_gives_back_the_packed_weight_that_it_was_given(direction):
    given = quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)))
    given = PackedNVFP4(given.codes_NK2, given.block_decode_scale_NG, torch.tensor([0.7361809]), direction)
    module = linear(8, 32)
    assert packed_of(module) is None
    Quantize.state(module, given, torch.float32)
    got = packed_of(module)
    assert got is not None
    assert got.direction == direction
    assert torch.equal(got.codes_NK2, given.codes_NK2)
    assert torch.equal(got.global_scale, given.global_scale)
    assert torch.equal(got.decode_scale, module.decode_scale)


def test_packing_a_module_again_leaves_one_scalar():
    module, packed = linear(8, 32), quantize(torch.ones(8, 32))
    Quantize.state(module, packed, torch.float32)
    again = PackedNVFP4(packed.codes_NK2, packed.block_decode_scale_NG, torch.ones(1), "multiplier")
    Quantize.state(module, again, torch.float32)
    assert "weight_global_scale" not in module.state_dict()
    assert module.decode_scale.item() == 1.0
