"""LoRA branches beside hand-built linears: their text, their numbers, and what is left alone."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from qerl_compile.passes import LoRA, LoraSite
from tests.passes.toy import Toy, linear

SITE = LoraSite(rank=2, alpha=3.0)


def adapted(rows: int, columns: int, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear whose adapter has been trained: B is no longer zero."""
    module = linear(rows, columns, bias=bias, dtype=dtype)
    LoRA.state(module, module.weight, SITE, torch.Generator().manual_seed(5))
    with torch.no_grad():
        module.lora_B.normal_(generator=torch.Generator().manual_seed(6))
    return module


def one_linear(dtype: torch.dtype, *, bias: bool = True) -> Toy:
    toy = Toy(up=adapted(8, 16, bias=bias, dtype=dtype))
    x = toy.input("x", torch.randn(3, 16, generator=torch.Generator().manual_seed(7)).to(dtype))
    return toy.output(toy.call(torch.relu, toy.linear(x, "up")))


def test_a_branch_is_added_to_a_float32_linear():
    toy = one_linear(torch.float32)
    assert_expected_inline(
        toy.text(),
        """\
x: float32[3, 16] = input
up_bias: float32[8] = weight up.bias
up_weight: float32[8, 16] = weight up.weight
linear: float32[3, 8] = linear(x, up_weight, up_bias)
relu: float32[3, 8] = relu(linear)
return (relu,)""",
    )
    assert_expected_inline(
        toy.rewrite(LoRA({"up": SITE})),
        """\
x: float32[3, 16] = input
up_bias: float32[8] = weight up.bias
up_weight: float32[8, 16] = weight up.weight
linear: float32[3, 8] = linear(x, up_weight, up_bias)
up_lora_a: float32[2, 16] = weight up.lora_A
linear_1: float32[3, 2] = linear(x, up_lora_a, None)
mul: float32[3, 2] = mul(linear_1, 1.5)
up_lora_b: float32[8, 2] = weight up.lora_B
linear_2: float32[3, 8] = linear(mul, up_lora_b, None)
add: float32[3, 8] = add(linear, linear_2)
relu: float32[3, 8] = relu(add)
return (relu,)""",
    )


def test_float32_factors_are_cast_to_a_bf16_activation():
    assert_expected_inline(
        one_linear(torch.bfloat16, bias=False).rewrite(LoRA({"up": SITE})),
        """\
x: bfloat16[3, 16] = input
up_weight: bfloat16[8, 16] = weight up.weight
linear: bfloat16[3, 8] = linear(x, up_weight, None)
up_lora_a: float32[2, 16] = weight up.lora_A
type_as_default: bfloat16[2, 16] = aten.type_as(up_lora_a, x)
linear_1: bfloat16[3, 2] = linear(x, type_as_default, None)
mul: bfloat16[3, 2] = mul(linear_1, 1.5)
up_lora_b: float32[8, 2] = weight up.lora_B
type_as_default_1: bfloat16[8, 2] = aten.type_as(up_lora_b, x)
linear_2: bfloat16[3, 8] = linear(mul, type_as_default_1, None)
add: bfloat16[3, 8] = add(linear, linear_2)
relu: bfloat16[3, 8] = relu(add)
return (relu,)""",
    )


@pytest.mark.parametrize("bias", [True, False])
def test_the_branch_computes_its_formula(bias):
    toy = one_linear(torch.float32, bias=bias)
    up = toy.modules["up"]
    toy.rewrite(LoRA({"up": SITE}))
    x = toy.args[0]
    want = F.linear(x, up.weight + 3.0 / 2 * up.lora_B @ up.lora_A, up.bias).relu()
    torch.testing.assert_close(toy.run()[0], want)


def test_a_bf16_branch_keeps_the_models_dtype():
    toy = one_linear(torch.bfloat16)
    up = toy.modules["up"]
    toy.rewrite(LoRA({"up": SITE}))
    (got,) = toy.run()
    merged = up.weight.float() + 1.5 * up.lora_B @ up.lora_A
    want = F.linear(toy.args[0].float(), merged, up.bias.float()).relu()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)


def test_a_new_branch_is_the_identity_and_gradients_reach_b_first():
    toy = one_linear(torch.float32)
    up = toy.modules["up"]
    (want,) = toy.run()
    with torch.no_grad():
        up.lora_B.zero_()
    toy.rewrite(LoRA({"up": SITE}))
    (got,) = toy.run()
    assert torch.equal(got, want)
    got.sum().backward()
    assert up.lora_B.grad.abs().sum() > 0
    assert not up.lora_A.grad.any()


def test_a_weight_used_twice_gets_a_branch_at_each_use():
    toy = Toy(up=adapted(16, 16))
    x = toy.input("x", torch.randn(3, 16, generator=torch.Generator().manual_seed(7)))
    toy.output(toy.linear(toy.linear(x, "up"), "up"))
    toy.rewrite(LoRA({"up": SITE}))
    up = toy.modules["up"]
    merged = up.weight + 1.5 * up.lora_B @ up.lora_A
    torch.testing.assert_close(toy.run()[0], F.linear(F.linear(toy.args[0], merged), merged))


def test_each_site_has_its_own_rank():
    toy = Toy(a=adapted(8, 16), b=linear(8, 16, seed=1))
    LoRA.state(toy.modules["b"], toy.modules["b"].weight, LoraSite(5, 1.0))
    x = toy.input("x", torch.ones(3, 16))
    toy.output(toy.linear(x, "a"), toy.linear(x, "b"))
    text = toy.rewrite(LoRA({"a": SITE, "b": LoraSite(5, 1.0)}))
    assert "a_lora_a: float32[2, 16]" in text
    assert "b_lora_a: float32[5, 16]" in text
    assert "mul(linear_2, 1.5)" in text
    assert "mul(linear_4, 0.2)" in text


@pytest.mark.parametrize("sites", [{}, {"down": SITE}, {"up.weight": SITE}])
def test_a_linear_that_is_no_site_is_left_alone(sites):
    assert one_linear(torch.bfloat16).unchanged_by(LoRA(sites))


def test_a_linear_with_a_computed_weight_is_left_alone():
    toy = Toy(up=adapted(8, 16))
    weight = toy.call(torch.neg, toy.read("up.weight"))
    toy.output(toy.call(F.linear, toy.input("x", torch.ones(2, 16)), weight, None))
    assert toy.unchanged_by(LoRA({"up": SITE}))


def test_state_is_float32_seeded_and_starts_like_peft():
    first, second, other = (nn.Linear(48, 8, bias=False, dtype=torch.bfloat16) for _ in range(3))
    for module, seed in ((first, 1), (second, 1), (other, 2)):
        LoRA.state(module, module.weight, LoraSite(4, 8.0), torch.Generator().manual_seed(seed))
    assert (first.lora_A.shape, first.lora_B.shape) == ((4, 48), (8, 4))
    assert {first.lora_A.dtype, first.lora_B.dtype} == {torch.float32}
    assert torch.equal(first.lora_A, second.lora_A)
    assert not torch.equal(first.lora_A, other.lora_A)
    assert not first.lora_B.any()
    reference = torch.empty(4, 48)
    nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(first.lora_A.detach(), reference)
    assert (first.lora_rank, first.lora_alpha) == (4, 8.0)
