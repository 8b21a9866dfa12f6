"""The last sum of a layer inside its linear: text, bits, and sums that must stay outside."""

import operator

import pytest
import torch
from expecttest import assert_expected_inline

from qerl_compile.passes import Residual
from tests.kernels.oracle import make_weight
from tests.passes.toy import Toy

N, K, R = 24, 48, 16
ADAPTED = torch.ops.qerl.adapted_linear.default


def layer(combine=operator.add, *, other=(3, N), dtype=torch.bfloat16, other_dtype=torch.bfloat16):
    """An adapted linear of h whose result meets x in `combine(toy, f, x)`."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    toy = Toy()
    x = toy.input("x", random(*other, dtype=other_dtype))
    names = ("h", "codes", "block", "scale", "a", "b")
    values = (random(3, K), *make_weight(N, K).args, random(R, K), random(N, R))
    f = toy.call(ADAPTED, *(toy.input(name, value) for name, value in zip(names, values, strict=True)))
    return toy.output(*combine(toy, f, x))


def total(toy, f, x):
    return (toy.call(operator.add, x, f),)


def test_a_sum_that_only_the_output_reads_moves_into_the_linear():
    toy = layer(total)
    want = toy.run()
    assert_expected_inline(
        toy.rewrite(Residual()),
        """\
x: bfloat16[3, 24] = input
h: bfloat16[3, 48] = input
codes: uint8[24, 24] = input
block: float8_e4m3fn[24, 3] = input
scale: float32[] = input
a: bfloat16[16, 48] = input
b: bfloat16[24, 16] = input
adapted_linear_default_1: bfloat16[3, 24] = qerl.adapted_linear(h, codes, block, scale, a, b, x)
return (adapted_linear_default_1,)""",
    )
    assert torch.equal(toy.run()[0], want[0])
    assert toy.unchanged_by(Residual())


@pytest.mark.parametrize("add", [operator.add, torch.add], ids=["+", "torch.add"])
@pytest.mark.parametrize("first", [True, False], ids=["f + x", "x + f"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_come_in_either_order(add, first, dtype):
    toy = layer(lambda toy, f, x: (toy.call(add, *((f, x) if first else (x, f))),), dtype=dtype, other_dtype=dtype)
    want = toy.run()
    toy.rewrite(Residual())
    assert [node.target for node in toy.program.graph.nodes if node.op == "call_function"] == [ADAPTED]
    assert torch.equal(toy.run()[0], want[0])


def read_again(toy, f, x):
    y = toy.call(operator.add, x, f)
    return y, toy.call(operator.neg, y)


STAY = {
    "the sum is read by something else": (read_again, {}),
    "the linear is": (lambda toy, f, x: (toy.call(operator.add, x, f), f), {}),
    "it is added to itself": (lambda toy, f, x: (toy.call(operator.add, f, f), x), {}),
    "it is a difference": (lambda toy, f, x: (toy.call(operator.sub, x, f),), {}),
    "it is scaled": (lambda toy, f, x: (toy.call(lambda a, b: torch.add(a, b, alpha=2), x, f),), {}),
    "a row is broadcast": (total, {"other": (N,)}),
    "the dtype is another": (total, {"other_dtype": torch.float32}),
}


@pytest.mark.parametrize("case", STAY)
def test_what_does_not_match_is_left_as_it_is(case):
    combine, options = STAY[case]
    assert layer(combine, **options).unchanged_by(Residual())
