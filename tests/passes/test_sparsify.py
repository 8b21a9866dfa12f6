"""Which two of four stay, what a mask does to values, codes and gradients, and what the graph says."""

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

from qerl_compile.attach import Attacher
from qerl_compile.errors import FormatError
from qerl_compile.formats.nvfp4 import dequantize, quantize_group
from qerl_compile.passes import FakeQuantize, QuantizeSite, Sparsify
from qerl_compile.passes.quantize import packed_of
from qerl_compile.passes.sparsify import mask_2_4, sparse_2_4
from qerl_compile.plan import Plan
from tests.passes.toy import Toy, linear

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def oracle(score_NK: np.ndarray) -> np.ndarray:
    """Independent of the code: numpy, one four at a time, Python's stable sort."""
    kept = np.zeros(score_NK.shape, dtype=bool)
    for row in range(score_NK.shape[0]):
        for start in range(0, score_NK.shape[1], 4):
            four = list(score_NK[row, start : start + 4])
            for index in sorted(range(4), key=lambda i: -four[i])[:2]:
                kept[row, start + index] = True
    return kept


@pytest.mark.parametrize(
    "row, kept",
    [
        ([1, 2, 3, 4], [0, 0, 1, 1]),
        ([-4, 3, -2, 1], [1, 1, 0, 0]),
        ([1, 1, 1, 1], [1, 1, 0, 0]),
        ([0, 0, 0, 0], [1, 1, 0, 0]),
        ([1, -2, 2, 2], [0, 1, 1, 0]),
        ([2, 1, -1, 1], [1, 1, 0, 0]),
        ([0, -0.0, 0, 5], [1, 0, 0, 1]),
    ],
)
def test_the_two_largest_stay_and_of_equal_ones_the_first(row, kept):
    assert mask_2_4(torch.tensor([row], dtype=torch.float32)).int().tolist() == [kept]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_is_that_of_an_independent_oracle_also_among_many_ties(dtype):
    w = torch.randint(-3, 4, (24, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    w[12:] = torch.randn(12, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert np.array_equal(mask_2_4(w).numpy(), oracle(w.abs().float().numpy()))


def test_wandas_score_weighs_each_column_by_the_norm_of_its_input():
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    norm_K = torch.rand(32, generator=torch.Generator().manual_seed(3))
    kept = mask_2_4(w, norm_K)
    assert np.array_equal(kept.numpy(), oracle(w.float().abs().numpy() * norm_K.numpy()))
    assert not torch.equal(kept, mask_2_4(w))
    assert torch.equal(mask_2_4(w, torch.full((32,), 0.5)), mask_2_4(w))


def test_a_sparse_weight_is_left_as_it_is_whatever_score_made_it_so():
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    by_wanda = w * mask_2_4(w, torch.rand(32, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(sparse_2_4(by_wanda), by_wanda)
    assert torch.equal(sparse_2_4(torch.zeros(2, 16)), torch.zeros(2, 16))


@pytest.mark.parametrize("shape", [(2, 6), (1, 2)])
def test_columns_must_be_whole_fours(shape):
    with pytest.raises(FormatError, match="in_features to be a multiple of 4"):
        mask_2_4(torch.ones(shape))


def test_norms_must_be_one_per_column():
    with pytest.raises(FormatError, match=r"channel_norm_K: .*shape \[8\]; got shape \[4\]"):
        mask_2_4(torch.ones(2, 8), torch.ones(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_is_masked_first_and_decodes_to_exact_zeros(dtype):
    module = torch.nn.ModuleDict({name: linear(8, 64, dtype=dtype, seed=i) for i, name in enumerate("qkv")})
    dense = {name: module[name].weight.data.clone() for name in "qkv"}
    group = ("q", "k", "v")
    sparse = {"q": "magnitude", "k": "magnitude"}
    plan = Plan((), quantize=dict.fromkeys(group, QuantizeSite()), groups=(group,), sparse=sparse)
    attacher = Attacher(module, plan)
    for name, weight in dense.items():
        attacher.weight(name, weight)
    attacher.finish()
    want = quantize_group({name: w * mask_2_4(w) if name != "v" else w for name, w in dense.items()})
    for name in group:
        packed = packed_of(module[name])
        assert packed is not None
        assert torch.equal(packed.codes_NK2, want[name].codes_NK2)
        assert torch.equal(packed.global_scale, want["q"].global_scale)
        values = dequantize(packed, torch.float32)
        if name != "v":
            assert torch.all(values[~mask_2_4(dense[name])] == 0)
            assert torch.all((values.view(-1, 4) != 0).sum(1) <= 2)
    assert torch.any((dequantize(want["v"], torch.float32).view(-1, 4) != 0).sum(1) > 2)


def test_a_frozen_dense_weight_is_masked_once_in_place_and_remembers_nothing():
    module = torch.nn.ModuleDict({"up": linear(8, 64)})
    weight, before = module["up"].weight, module["up"].weight.detach().clone()
    Attacher(module, Plan((), sparse={"up": "magnitude"})).finish()
    assert module["up"].weight is weight
    assert torch.equal(weight, before * mask_2_4(before))
    assert not list(module.buffers())


def sparse_toy(**modules: torch.nn.Linear) -> Toy:
    for module in modules.values():
        Sparsify.state(module, trained=True)
    return Toy(**modules)


X = torch.randn(3, 32, generator=torch.Generator().manual_seed(7))


def test_a_trained_weight_is_masked_in_the_graph():
    toy = sparse_toy(up=linear(8, 32))
    toy.output(toy.linear(toy.input("x", X), "up"))
    assert_expected_inline(
        toy.rewrite(FakeQuantize({"up"}.__contains__), Sparsify({"up"})),
        """\
x: float32[3, 32] = input
up_weight: float32[8, 32] = weight up.weight
up_weight_kept: bool[8, 32] = weight up.weight_kept
where: float32[8, 32] = where(up_weight_kept, up_weight, 0.0)
fake_quantized_linear_default: float32[3, 8] = qerl.fake_quantized_linear(x, where)
return (fake_quantized_linear_default,)""",
    )


def test_gradients_of_masked_weights_are_zero():
    toy = sparse_toy(up=linear(8, 32), down=linear(8, 32, seed=1))
    up, down = (toy.modules[name].requires_grad_() for name in ("up", "down"))
    x = toy.input("x", X)
    toy.output(toy.linear(x, "up"), toy.linear(x, "down"))
    toy.rewrite(Sparsify({"up"}))
    a, b = toy.run()
    torch.testing.assert_close(a, F.linear(X, up.weight))
    (a.sum() + b.sum()).backward()
    straight = torch.ones(8, 3) @ X
    torch.testing.assert_close(down.weight.grad, straight)
    torch.testing.assert_close(up.weight.grad, straight * up.weight_kept)
    assert torch.all(up.weight_kept.view(-1, 4).sum(1) == 2)


def test_what_is_perturbed_outside_of_the_optimizer_stays_masked():
    toy = sparse_toy(up=linear(8, 32))
    toy.output(toy.linear(toy.input("x", X), "up"))
    want = F.linear(X, toy.modules["up"].weight)
    with torch.no_grad():
        toy.modules["up"].weight[~toy.modules["up"].weight_kept] = 100.0
    toy.rewrite(Sparsify({"up"}))
    torch.testing.assert_close(toy.run()[0], want)


def test_other_weights_and_biases_are_left_alone():
    toy = sparse_toy(up=linear(8, 32, bias=True))
    toy.output(toy.linear(toy.input("x", X), "up"))
    assert toy.unchanged_by(Sparsify({"down"}))
    assert "where" not in toy.text()
