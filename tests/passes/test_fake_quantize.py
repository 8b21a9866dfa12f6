"""Quantization inside the graph: text, numbers, straight-through gradients, and weights that are no module's."""

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

from qerl_compile.formats.nvfp4 import dequantize, quantize, quantize_group
from qerl_compile.passes import FakeQuantize, Fuse
from tests.passes.toy import Toy, linear

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(7))


def selecting(pattern: str) -> FakeQuantize:
    return FakeQuantize(lambda path: re.fullmatch(pattern, path) is not None)


def one_linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> Toy:
    toy = Toy(up=linear(8, 32, bias=bias, dtype=dtype))
    return toy.output(toy.call(torch.relu, toy.linear(toy.input("x", X.to(dtype)), "up")))


def test_a_linear_is_quantized_in_the_graph():
    toy = one_linear(dtype=torch.bfloat16)
    assert_expected_inline(
        toy.rewrite(selecting("up")),
        """\
x: bfloat16[3, 32] = input
up_bias: bfloat16[8] = weight up.bias
up_weight: bfloat16[8, 32] = weight up.weight
fake_quantized_linear_default: bfloat16[3, 8] = qerl.fake_quantized_linear(x, up_weight)
add: bfloat16[3, 8] = add(fake_quantized_linear_default, up_bias)
relu: bfloat16[3, 8] = relu(add)
return (relu,)""",
    )


@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_that_of_the_rounded_weight(bias):
    toy = one_linear(bias=bias)
    up = toy.modules["up"]
    toy.rewrite(selecting("up"))
    want = F.linear(X, dequantize(quantize(up.weight), torch.float32), up.bias).relu()
    torch.testing.assert_close(toy.run()[0], want)


def test_the_members_of_a_fused_linear_share_one_amax():
    toy = Toy(gate=linear(8, 32), up=linear(4, 32, seed=1))
    with torch.no_grad():
        toy.modules["up"].weight.mul_(50)
    x = toy.input("x", X)
    toy.output(toy.linear(x, "gate"), toy.linear(x, "up"))
    assert_expected_inline(
        toy.rewrite(Fuse((("gate", "up"),)), selecting("gate|up")),
        """\
x: float32[3, 32] = input
gate_weight: float32[8, 32] = weight gate.weight
up_weight: float32[4, 32] = weight up.weight
cat: float32[12, 32] = cat([gate_weight, up_weight])
fake_quantized_linear_default: float32[3, 12] = qerl.fake_quantized_linear(x, cat)
split = split(fake_quantized_linear_default, [8, 4], -1)
getitem: float32[3, 8] = getitem(split, 0)
getitem_1: float32[3, 4] = getitem(split, 1)
return (getitem, getitem_1)""",
    )
    packed = quantize_group({name: module.weight for name, module in toy.modules.items()})
    for got, path in zip(toy.run(), ("gate", "up"), strict=True):
        torch.testing.assert_close(got, F.linear(X, dequantize(packed[path], torch.float32)))


def test_gradients_pass_straight_through_the_rounding():
    toy = one_linear(bias=False)
    up = toy.modules["up"].requires_grad_()
    toy.args[0].requires_grad_()
    toy.rewrite(selecting("up"))
    (y,) = toy.run()
    y.sum().backward()
    dy = (y > 0).float()
    torch.testing.assert_close(up.weight.grad, dy.T @ X)
    torch.testing.assert_close(toy.args[0].grad, dy @ dequantize(quantize(up.weight.detach()), torch.float32))


def test_nothing_selected_changes_nothing():
    assert one_linear().unchanged_by(selecting("down"))


def test_a_fused_linear_of_which_one_member_is_not_selected_is_left_alone():
    toy = Toy(gate=linear(8, 32), up=linear(4, 32))
    x = toy.input("x", X)
    weight = toy.call(torch.cat, [toy.read("gate.weight"), toy.read("up.weight")])
    toy.output(toy.call(F.linear, x, weight, None))
    assert toy.unchanged_by(selecting("gate"))


def test_a_weight_that_the_model_computes_is_left_alone():
    toy = Toy(up=linear(8, 32))
    x = toy.input("x", X)
    computed = toy.call(F.linear, x, toy.call(torch.neg, toy.read("up.weight")), None)
    given = toy.call(F.linear, x, toy.input("w", X), None)
    toy.output(computed, given)
    assert toy.unchanged_by(selecting(".*"))
