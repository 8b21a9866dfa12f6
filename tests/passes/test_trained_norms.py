"""A norm that is trained: its float32 weight is read in the place of the base's, with noise on top if it has some."""

import operator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from qerl_compile.graph import set_owner
from qerl_compile.passes import Noise, TrainedNorms
from qerl_compile.passes.trained_norms import norm_weight
from tests.passes.toy import Toy

K = 32
NORM = frozenset({"norm"})


def norm_module(dtype: torch.dtype) -> nn.Module:
    """What the passes need of a norm: a weight near 1, its trained copy, and noise."""
    module = nn.Module()
    weight = (1 + 0.1 * torch.randn(K, generator=torch.Generator().manual_seed(1))).to(dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    TrainedNorms.state(module, module.weight)
    Noise.state(module, module.weight)
    set_owner(module.weight, module)
    return module


def llama_norm(dtype: torch.dtype) -> Toy:
    """w * x̂ in the model's dtype, read by one user."""
    toy = Toy(norm=norm_module(dtype))
    x = toy.input("x", torch.randn(3, K, generator=torch.Generator().manual_seed(3)).to(dtype))
    return toy.output(toy.call(torch.neg, toy.call(torch.mul, toy.read("norm.weight"), x)))


def gemma_norm(dtype: torch.dtype) -> Toy:
    """(x̂ * (1 + w.float())).type_as(x): Gemma's weight is an offset from 1."""
    toy = Toy(norm=norm_module(dtype))
    x = toy.input("x", torch.randn(3, K, generator=torch.Generator().manual_seed(3)).to(dtype))
    w = toy.program.graph.call_method("float", (toy.read("norm.weight"),))
    toy.program.infer(w)
    scaled = toy.call(torch.mul, toy.call(torch.Tensor.float, x), toy.call(operator.add, 1.0, w))
    return toy.output(toy.call(torch.Tensor.type_as, scaled, x))


def test_the_trained_weight_is_read_and_the_base_is_not():
    assert_expected_inline(
        llama_norm(torch.bfloat16).rewrite(TrainedNorms(NORM)),
        """\
x: bfloat16[3, 32] = input
norm_trained_weight: float32[32] = weight norm.trained_weight
mul: float32[3, 32] = mul(norm_trained_weight, x)
to_dtype: bfloat16[3, 32] = aten.to.dtype(mul, bfloat16)
neg: bfloat16[3, 32] = neg(to_dtype)
return (neg,)""",
    )


def test_noise_is_added_to_the_trained_weight():
    assert_expected_inline(
        llama_norm(torch.bfloat16).rewrite(TrainedNorms(NORM), Noise(NORM)),
        """\
x: bfloat16[3, 32] = input
norm_trained_weight: float32[32] = weight norm.trained_weight
norm_noise: float32[32] = weight norm.noise
to_dtype_1: float32[32] = aten.to.dtype(norm_trained_weight, float32)
add: float32[32] = add(to_dtype_1, norm_noise)
mul: float32[3, 32] = mul(add, x)
to_dtype: bfloat16[3, 32] = aten.to.dtype(mul, bfloat16)
neg: bfloat16[3, 32] = neg(to_dtype)
return (neg,)""",
    )


@pytest.mark.parametrize("make", [llama_norm, gemma_norm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_before_the_first_update_no_bit_and_no_dtype_changes(make, dtype):
    (want,) = make(dtype).run()
    toy = make(dtype)
    toy.rewrite(TrainedNorms(NORM), Noise(NORM))
    (got,) = toy.run()
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("make, offset", [(llama_norm, 0.0), (gemma_norm, 1.0)])
def test_an_update_that_bf16_could_not_hold_acts_and_so_does_noise_on_top(make, offset):
    toy = make(torch.bfloat16)
    module = toy.modules["norm"]
    toy.rewrite(TrainedNorms(NORM), Noise(NORM))
    with torch.no_grad():
        module.trained_weight.add_(3e-4)
        module.noise.copy_(5e-4 * torch.randn(K, generator=torch.Generator().manual_seed(2)))
    x, w32 = toy.args[0].float(), module.trained_weight.detach() + module.noise
    want = (x * (offset + w32)).to(torch.bfloat16)
    assert torch.equal(toy.run()[0], want if offset else -want)
    clean = (x * (offset + module.weight.float())).to(torch.bfloat16)
    assert (want != clean).any()


def test_the_gradient_reaches_the_trained_weight_in_float32_and_the_base_gets_none():
    toy = llama_norm(torch.bfloat16)
    module = toy.modules["norm"]
    toy.rewrite(TrainedNorms(NORM), Noise(NORM))
    toy.run()[0].sum().backward()
    torch.testing.assert_close(module.trained_weight.grad, -toy.args[0].float().sum(0))
    assert module.weight.grad is None


def test_a_weight_read_twice_is_replaced_at_both_reads():
    toy = Toy(norm=norm_module(torch.float32))
    x = toy.input("x", torch.ones(2, K))
    w = toy.read("norm.weight")
    toy.output(toy.call(torch.mul, w, x), toy.call(torch.add, x, w))
    toy.rewrite(TrainedNorms(NORM))
    with torch.no_grad():
        toy.modules["norm"].trained_weight.fill_(3.0)
    product, total = toy.run()
    assert torch.equal(product, torch.full((2, K), 3.0))
    assert torch.equal(total, torch.full((2, K), 4.0))


@pytest.mark.parametrize("sites", [(), ("other",), ("norm.weight",), ("nor",)])
def test_a_norm_that_is_no_site_is_left_alone(sites):
    assert llama_norm(torch.bfloat16).unchanged_by(TrainedNorms(frozenset(sites)))


def test_state_is_a_trainable_float32_copy_that_is_saved():
    module = nn.LayerNorm(K, dtype=torch.bfloat16).requires_grad_(False)
    TrainedNorms.state(module, module.weight)
    assert (module.trained_weight.dtype, module.trained_weight.requires_grad) == (torch.float32, True)
    assert torch.equal(module.trained_weight, module.weight.float())
    assert set(module.state_dict()) == {"weight", "bias", "trained_weight"}
    alone = nn.LayerNorm(K)  # float32 already: still a copy
    TrainedNorms.state(alone, alone.weight)
    assert alone.trained_weight.data_ptr() != alone.weight.data_ptr()


def test_what_a_norm_multiplies_with_is_its_trained_weight_or_else_its_weight():
    module = norm_module(torch.bfloat16)
    with torch.no_grad():
        module.trained_weight.add_(1e-4)
        module.noise.fill_(9.0)
    assert torch.equal(norm_weight(module), module.trained_weight)
    plain = nn.LayerNorm(K, dtype=torch.bfloat16)
    assert norm_weight(plain).dtype == torch.float32
    assert torch.equal(norm_weight(plain), plain.weight.float())
