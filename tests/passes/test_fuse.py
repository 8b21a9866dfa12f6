"""Fusion of hand-built linears that share an input, and everything that must not be fused."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

from qerl_compile.passes import Fuse
from tests.passes.toy import Toy, linear

ROWS = {"q": 8, "k": 4, "v": 4}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(7))


def projections(*, bias: tuple[bool, ...] = (False, False, False), dtype: torch.dtype = torch.float32) -> Toy:
    toy = Toy(
        **{
            name: linear(rows, 16, bias=has, dtype=dtype, seed=rows)
            for (name, rows), has in zip(ROWS.items(), bias, strict=True)
        }
    )
    x = toy.input("x", X.to(dtype))
    q, k, v = (toy.linear(x, name) for name in ROWS)
    return toy.output(toy.call(torch.relu, q), k, toy.call(torch.neg, v))


GROUP = Fuse((("q", "k", "v"),))


def test_three_projections_become_one_linear_and_a_split():
    toy = projections()
    assert_expected_inline(
        toy.text(),
        """\
x: float32[3, 16] = input
q_weight: float32[8, 16] = weight q.weight
k_weight: float32[4, 16] = weight k.weight
v_weight: float32[4, 16] = weight v.weight
linear: float32[3, 8] = linear(x, q_weight, None)
linear_1: float32[3, 4] = linear(x, k_weight, None)
linear_2: float32[3, 4] = linear(x, v_weight, None)
relu: float32[3, 8] = relu(linear)
neg: float32[3, 4] = neg(linear_2)
return (relu, linear_1, neg)""",
    )
    assert_expected_inline(
        toy.rewrite(GROUP),
        """\
x: float32[3, 16] = input
q_weight: float32[8, 16] = weight q.weight
k_weight: float32[4, 16] = weight k.weight
v_weight: float32[4, 16] = weight v.weight
cat: float32[16, 16] = cat([q_weight, k_weight, v_weight])
linear_3: float32[3, 16] = linear(x, cat, None)
split = split(linear_3, [8, 4, 4], -1)
getitem: float32[3, 8] = getitem(split, 0)
getitem_1: float32[3, 4] = getitem(split, 1)
getitem_2: float32[3, 4] = getitem(split, 2)
relu: float32[3, 8] = relu(getitem)
neg: float32[3, 4] = neg(getitem_2)
return (relu, getitem_1, neg)""",
    )


def test_biases_are_fused_with_their_weights():
    assert_expected_inline(
        projections(bias=(True, True, True)).rewrite(GROUP),
        """\
x: float32[3, 16] = input
q_bias: float32[8] = weight q.bias
q_weight: float32[8, 16] = weight q.weight
k_bias: float32[4] = weight k.bias
k_weight: float32[4, 16] = weight k.weight
v_bias: float32[4] = weight v.bias
v_weight: float32[4, 16] = weight v.weight
cat: float32[16, 16] = cat([q_weight, k_weight, v_weight])
cat_1: float32[16] = cat([q_bias, k_bias, v_bias])
linear_3: float32[3, 16] = linear(x, cat, cat_1)
split = split(linear_3, [8, 4, 4], -1)
getitem: float32[3, 8] = getitem(split, 0)
getitem_1: float32[3, 4] = getitem(split, 1)
getitem_2: float32[3, 4] = getitem(split, 2)
relu: float32[3, 8] = relu(getitem)
neg: float32[3, 4] = neg(getitem_2)
return (relu, getitem_1, neg)""",
    )


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_results_equal_the_separate_ones(bias, dtype):
    want = projections(bias=bias, dtype=dtype).run()
    toy = projections(bias=bias, dtype=dtype)
    toy.rewrite(GROUP)
    for got, separate in zip(toy.run(), want, strict=True):
        torch.testing.assert_close(got, separate)


def test_rows_lie_in_the_order_of_the_group_whatever_the_order_of_the_calls():
    toy = projections()
    want = projections().run()
    text = toy.rewrite(Fuse((("v", "q", "k"),)))
    assert "cat([v_weight, q_weight, k_weight])" in text
    assert "split(linear_3, [4, 8, 4], -1)" in text
    for got, separate in zip(toy.run(), want, strict=True):
        torch.testing.assert_close(got, separate)


@pytest.mark.parametrize("bias", [(True, False, False), (True, True, False)])
def test_members_with_and_without_bias_are_not_fused(bias):
    assert projections(bias=bias).unchanged_by(GROUP)


@pytest.mark.parametrize("groups", [(), (("q", "gate"),), (("q", "k", "v", "o"),)])
def test_a_group_that_is_not_all_there_is_not_fused(groups):
    assert projections().unchanged_by(Fuse(groups))


def test_linears_with_different_inputs_are_not_fused():
    toy = Toy(q=linear(8, 16), k=linear(4, 16))
    q = toy.linear(toy.input("x", X), "q")
    toy.output(q, toy.linear(toy.input("z", X), "k"))
    assert toy.unchanged_by(Fuse((("q", "k"),)))


def test_a_shared_weight_is_not_fused_with_itself():
    shared = linear(8, 16)
    toy = Toy(q=shared)
    x, weight = toy.input("x", X), toy.read("q.weight")
    toy.output(toy.call(F.linear, x, weight, None), toy.call(F.linear, x, weight, None))
    assert toy.unchanged_by(Fuse((("q", "q"),)))


def test_a_weight_used_twice_keeps_its_other_use():
    toy = Toy(q=linear(16, 16), k=linear(4, 16, seed=1))
    x, weight = toy.input("x", X), toy.read("q.weight")
    earlier = toy.call(F.linear, toy.call(torch.neg, x), weight, None)
    again = toy.call(F.linear, x, weight, None)
    toy.output(earlier, again, toy.linear(x, "k"))
    want = toy.run()
    toy.rewrite(Fuse((("q", "k"),)))
    for got, separate in zip(toy.run(), want, strict=True):
        torch.testing.assert_close(got, separate)


def test_linears_called_with_keywords_are_fused_too():
    toy = Toy(q=linear(8, 16, bias=True), k=linear(4, 16, bias=True))
    x = toy.input("x", X)
    for path in ("q", "k"):
        operands = {"weight": toy.read(f"{path}.weight"), "bias": toy.read(f"{path}.bias")}
        node = toy.program.graph.call_function(F.linear, (x,), operands)
        toy.program.infer(node)
    toy.output(*toy.program.graph.find_nodes(op="call_function", target=F.linear))
    want = toy.run()
    assert toy.rewrite(Fuse((("q", "k"),))).count("= linear(") == 1
    for got, separate in zip(toy.run(), want, strict=True):
        torch.testing.assert_close(got, separate)


def test_two_groups_are_fused_apart():
    toy = Toy(**{name: linear(4, 16, seed=seed) for seed, name in enumerate(("q", "k", "gate", "up"))})
    x = toy.input("x", X)
    z = toy.call(torch.neg, x)
    toy.output(*(toy.linear(source, path) for path, source in (("q", x), ("gate", z), ("k", x), ("up", z))))
    want = toy.run()
    assert toy.rewrite(Fuse((("q", "k"), ("gate", "up")))).count("= linear(") == 2
    for got, separate in zip(toy.run(), want, strict=True):
        torch.testing.assert_close(got, separate)
