"""Noise on the weight of a norm: in float32, rounded once where the model rounds, gone without a trace at zero."""

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from qerl_compile.graph import set_owner
from qerl_compile.passes import Noise
from tests.passes.toy import Toy

K = 32


def norm_module(dtype: torch.dtype, *, noise: float = 0.0) -> nn.Module:
    """What the pass needs of a norm: a weight near 1 and the state that the pass gives it."""
    module = nn.Module()
    module.weight = nn.Parameter((1 + 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(1))).to(dtype))
    Noise.state(module, module.weight)
    module.noise.copy_(noise * torch.randn(K, generator=torch.Generator().manual_seed(2)))
    set_owner(module.weight, module)
    return module


def llama_norm(dtype: torch.dtype, *, noise: float = 0.0) -> Toy:
    """w * x̂ in the model's dtype, read by one user."""
    toy = Toy(norm=norm_module(dtype, noise=noise))
    x = toy.input("x", torch.randn(3, K, generator=torch.Generator().manual_seed(3)).to(dtype))
    y = toy.call(torch.mul, toy.read("norm.weight"), x)
    return toy.output(toy.call(torch.neg, y))


def gemma_norm(dtype: torch.dtype, *, noise: float = 0.0) -> Toy:
    """(x̂ * (1 + w.float())).type_as(x): Gemma's weight is an offset from 1."""
    toy = Toy(norm=norm_module(dtype, noise=noise))
    x = toy.input("x", torch.randn(3, K, generator=torch.Generator().manual_seed(3)).to(dtype))
    w = toy.program.graph.call_method("float", (toy.read("norm.weight"),))
    toy.program.infer(w)
    scaled = toy.call(torch.mul, toy.call(torch.Tensor.float, x), toy.call(operator.add, 1.0, w))
    return toy.output(toy.call(torch.Tensor.type_as, scaled, x))


def test_a_bf16_norm_is_computed_in_float32_and_rounded_where_the_model_rounds():
    toy = llama_norm(torch.bfloat16)
    assert_expected_inline(
        toy.text(),
        """\
x: bfloat16[3, 32] = input
norm_weight: bfloat16[32] = weight norm.weight
mul: bfloat16[3, 32] = mul(norm_weight, x)
neg: bfloat16[3, 32] = neg(mul)
return (neg,)""",
    )
    assert_expected_inline(
        toy.rewrite(Noise(frozenset({"norm"}))),
        """\
x: bfloat16[3, 32] = input
norm_weight: bfloat16[32] = weight norm.weight
norm_noise: float32[32] = weight norm.noise
to_dtype: float32[32] = aten.to.dtype(norm_weight, float32)
add: float32[32] = add(to_dtype, norm_noise)
mul: float32[3, 32] = mul(add, x)
to_dtype_1: bfloat16[3, 32] = aten.to.dtype(mul, bfloat16)
neg: bfloat16[3, 32] = neg(to_dtype_1)
return (neg,)""",
    )


def test_a_float32_norm_is_not_cast_afterwards():
    assert_expected_inline(
        llama_norm(torch.float32).rewrite(Noise(frozenset({"norm"}))),
        """\
x: float32[3, 32] = input
norm_weight: float32[32] = weight norm.weight
norm_noise: float32[32] = weight norm.noise
to_dtype: float32[32] = aten.to.dtype(norm_weight, float32)
add: float32[32] = add(to_dtype, norm_noise)
mul: float32[3, 32] = mul(add, x)
neg: float32[3, 32] = neg(mul)
return (neg,)""",
    )


def test_a_weight_that_the_model_casts_itself_gets_its_noise_before_the_cast():
    assert_expected_inline(
        gemma_norm(torch.bfloat16).rewrite(Noise(frozenset({"norm"}))),
        """\
x: bfloat16[3, 32] = input
norm_weight: bfloat16[32] = weight norm.weight
norm_noise: float32[32] = weight norm.noise
to_dtype: float32[32] = aten.to.dtype(norm_weight, float32)
add_1: float32[32] = add(to_dtype, norm_noise)
float_1: float32[32] = float(add_1)
float_2: float32[3, 32] = float(x)
add: float32[32] = add(1.0, float_1)
mul: float32[3, 32] = mul(float_2, add)
type_as: bfloat16[3, 32] = type_as(mul, x)
return (type_as,)""",
    )


@pytest.mark.parametrize("make", [llama_norm, gemma_norm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_silent_noise_changes_no_bit_and_no_dtype(make, dtype):
    (want,) = make(dtype).run()
    toy = make(dtype)
    toy.rewrite(Noise(frozenset({"norm"})))
    (got,) = toy.run()
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_noise_below_bf16_resolution_is_added_in_float32():
    """At sigma 5e-4 a bf16 sum would round back to the weight nearly everywhere; the exact product must not."""
    toy = llama_norm(torch.bfloat16, noise=5e-4)
    module = toy.modules["norm"]
    toy.rewrite(Noise(frozenset({"norm"})))
    (got,) = toy.run()
    x = toy.args[0].double()
    want = -((module.weight.double() + module.noise.double()) * x)
    assert torch.equal(got, want.to(torch.bfloat16))
    in_bf16 = module.weight + module.noise.to(torch.bfloat16)
    assert (in_bf16 == module.weight).float().mean() > 0.8


def test_gemma_noise_is_added_to_the_offset():
    toy = gemma_norm(torch.float32, noise=0.1)
    module = toy.modules["norm"]
    toy.rewrite(Noise(frozenset({"norm"})))
    torch.testing.assert_close(toy.run()[0], toy.args[0] * (1 + module.weight + module.noise))


def test_noise_is_read_anew_in_every_call():
    toy = llama_norm(torch.float32)
    toy.rewrite(Noise(frozenset({"norm"})))
    (clean,) = toy.run()
    toy.modules["norm"].noise.fill_(0.5)
    (noisy,) = toy.run()
    torch.testing.assert_close(noisy, clean - 0.5 * toy.args[0])


def test_a_weight_read_twice_is_noisy_at_both_reads():
    toy = Toy(norm=norm_module(torch.float32, noise=0.1))
    x = toy.input("x", torch.ones(2, K))
    w = toy.read("norm.weight")
    toy.output(toy.call(torch.mul, w, x), toy.call(torch.add, x, w))
    toy.rewrite(Noise(frozenset({"norm"})))
    product, total = toy.run()
    noisy = toy.modules["norm"].weight + toy.modules["norm"].noise
    torch.testing.assert_close(product, noisy.expand(2, K))
    torch.testing.assert_close(total, 1 + noisy.expand(2, K))


@pytest.mark.parametrize("sites", [(), ("other",), ("norm.weight",), ("nor",)])
def test_a_norm_that_is_no_site_is_left_alone(sites):
    assert llama_norm(torch.bfloat16).unchanged_by(Noise(frozenset(sites)))


def test_state_is_a_zero_float32_buffer_that_is_not_saved():
    module = nn.LayerNorm(K, dtype=torch.bfloat16)
    Noise.state(module, module.weight)
    assert (module.noise.dtype, module.noise.shape) == (torch.float32, module.weight.shape)
    assert not module.noise.any()
    assert set(module.state_dict()) == {"weight", "bias"}
