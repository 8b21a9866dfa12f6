"""Linears with a stacked adapter: their formula, what torch sees of them, what they refuse."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from qerl_compile.errors import FormatError, GraphError
from qerl_compile.kernels import adapted
from tests.kernels.oracle import make_weight

# test_schema compares inputs with allclose, which torch does not have for float8; see test_ops.py.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
N, K, R = 24, 48, 16
WEIGHT = make_weight(N, K)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def packed_args(dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (2, 5)):
    return randn(*batch, K, dtype=dtype), *WEIGHT.args, randn(R, K, dtype=dtype), randn(N, R, dtype=dtype)


def dense_args(dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (2, 5), *, bias: bool = True):
    x, *_, a, b = packed_args(dtype, batch)
    return x, randn(N, K, dtype=dtype), randn(N, dtype=dtype) if bias else None, a, b


def test_a_literal_dense_case():
    x, w, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.full((3,), 0.5)
    a, b = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    y = torch.ops.qerl.adapted_dense_linear(x, w, bias, a, b)
    assert y.tolist() == [[0.5, 4.5, 4.5]]  # x·Wᵀ = 1 2 3, bias 0.5, h = -1 2, h·Bᵀ = -1 2 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (70, 2)])
def test_the_branch_is_added_to_the_packed_linear(dtype, tolerance, batch):
    x, *weight, a, b = packed_args(dtype, batch)
    exact = x.double() @ WEIGHT.exact.T + x.double() @ a.double().T @ b.double().T
    y = torch.ops.qerl.adapted_linear(x, *weight, a, b)
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (*batch, N), True)
    assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_branch_is_added_to_the_dense_linear(dtype, tolerance, bias):
    x, w, bias_N, a, b = dense_args(dtype, bias=bias)
    exact = F.linear(x.double(), w.double(), None if bias_N is None else bias_N.double())
    exact = exact + x.double() @ a.double().T @ b.double().T
    y = torch.ops.qerl.adapted_dense_linear(x, w, bias_N, a, b)
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_an_empty_batch_gives_an_empty_result():
    assert torch.ops.qerl.adapted_linear(*packed_args(batch=(0, 3))).shape == (0, 3, N)
    assert torch.ops.qerl.adapted_dense_linear(*dense_args(batch=(0,))).shape == (0, N)


def test_factors_may_be_blocks_of_larger_ones():
    x, *weight, _, _ = packed_args()
    a, b = randn(40, K), randn(100, 40)
    got = torch.ops.qerl.adapted_linear(x, *weight, a[8:24], b[50 : 50 + N, 8:24])
    want = torch.ops.qerl.adapted_linear(x, *weight, a[8:24].clone(), b[50 : 50 + N, 8:24].clone())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("operator, args", [("adapted_linear", packed_args()), ("adapted_dense_linear", dense_args())])
def test_opcheck_accepts(operator, args):
    opcheck(getattr(adapted, operator), args, test_utils=CHECKS)


@pytest.mark.parametrize("operator, args", [("adapted_linear", packed_args), ("adapted_dense_linear", dense_args)])
def test_inputs_are_left_alone(operator, args):
    tensors = args()
    before = [t.flatten().view(torch.uint8).clone() for t in tensors]
    y = getattr(torch.ops.qerl, operator)(*tensors)
    after = [t.flatten().view(torch.uint8) for t in tensors]
    assert all(map(torch.equal, after, before))
    assert y.data_ptr() not in {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("operator, args", [("adapted_linear", packed_args), ("adapted_dense_linear", dense_args)])
@pytest.mark.parametrize("position", [0, -1])
def test_a_call_that_would_need_a_gradient_raises_and_does_not_detach(operator, args, position):
    tensors = args()
    tensors[position].requires_grad_()
    call = getattr(torch.ops.qerl, operator)
    with pytest.raises(GraphError, match=r"torch\.no_grad"):
        call(*tensors)
    with torch.no_grad():
        assert not call(*tensors).requires_grad


def test_a_compiled_call_that_would_need_a_gradient_raises_too():
    x, *rest = packed_args()
    compiled = torch.compile(lambda x: torch.ops.qerl.adapted_linear(x, *rest), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.no_grad"):
        compiled(x.requires_grad_())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"a": randn(R, K + 1)}, r"stacked_A_RK \[R, 48\].*got float32 \[16, 49\]"),
        ({"a": randn(R, K).bfloat16()}, r"stacked_A_RK .*float32.*got bfloat16.*refresh_stacked_adapters"),
        ({"b": randn(N, R + 1)}, r"stacked_B_NR \[24, 16\].*got float32 \[24, 17\]"),
        ({"b": randn(R, N)}, r"stacked_B_NR \[24, 16\].*got float32 \[16, 24\]"),
        ({"b": randn(N, R).double()}, r"stacked_B_NR .*got float64"),
        ({"x": randn(2, K + 16)}, r"x \[\.\.\., 48\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused_with_their_shapes(change, words):
    x, *weight, a, b = packed_args()
    given = {"x": x, "a": a, "b": b, **change}
    with pytest.raises(FormatError, match=words):
        torch.ops.qerl.adapted_linear(given["x"], *weight, given["a"], given["b"])


@pytest.mark.parametrize(
    "index, tensor, words",
    [
        (1, randn(N, K).bfloat16(), r"weight_NK \[N, 48\] in the dtype of x.*bfloat16"),
        (2, randn(N + 1), r"bias_N \[24\].*got float32 \[25\]"),
        (2, randn(N).double(), r"bias_N \[24\].*got float64"),
        (3, randn(R, K - 1), r"stacked_A_RK \[R, 48\]"),
    ],
)
def test_dense_operands_that_do_not_fit_are_refused(index, tensor, words):
    args = list(dense_args())
    args[index] = tensor
    with pytest.raises(FormatError, match=words):
        torch.ops.qerl.adapted_dense_linear(*args)
