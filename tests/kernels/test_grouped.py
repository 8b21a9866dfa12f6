"""Products of rows with the packed matrices of their experts, against dense ones; on the CPU, both ways to compute."""

import pytest
import torch
from torch.library import opcheck

from qerl_compile.errors import FormatError
from qerl_compile.formats.nvfp4 import exact_products, quantize
from qerl_compile.kernels import grouped_cuda
from qerl_compile.kernels.grouped import grouped_quantized_linear, grouped_quantized_linear_dx

E, N, K = 4, 32, 64
OFFSETS = torch.tensor([3, 3, 10, 12], dtype=torch.int32)  # expert 1 has no rows, and two rows have no expert
OWNERS = torch.tensor([0] * 3 + [2] * 7 + [3] * 2)
ROWS = len(OWNERS)


@pytest.fixture(scope="module", params=[1, 2], ids=["one scale", "a scale for each half"])
def stack(request):
    """(codes, block scales, decode scales [E, P]) and the dense stack [E, N, K] in float64."""
    torch.manual_seed(0)
    parts = request.param
    matrices = [[quantize(torch.randn(N // parts, K) * (3**part)) for part in range(parts)] for _ in range(E)]
    codes = torch.stack([torch.cat([p.codes_NK2 for p in each]) for each in matrices])
    block = torch.stack([torch.cat([p.block_decode_scale_NG.view(torch.uint8) for p in each]) for each in matrices])
    decode = torch.stack([torch.stack([p.decode_scale for p in each]) for each in matrices])
    dense = torch.stack([torch.cat([weights(p) for p in each]) for each in matrices])
    return (codes, block.view(torch.float8_e4m3fn), decode), dense


def weights(packed):
    products = exact_products(packed.codes_NK2, packed.block_decode_scale_NG, torch.float32)
    return products.double() * packed.decode_scale


def rows(features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(ROWS + 2, features, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_every_row_is_multiplied_with_the_matrix_of_its_expert(stack, dtype, tolerance):
    packed, dense_ENK = stack
    x_SK, dy_SN = rows(K, dtype), rows(N, dtype)
    y_SN = grouped_quantized_linear(x_SK, OFFSETS, *packed)
    dx_SK = grouped_quantized_linear_dx(dy_SN, OFFSETS, *packed)
    mine = dense_ENK[OWNERS]
    for got, wanted in (
        (y_SN, torch.einsum("sk,snk->sn", x_SK[:ROWS].double(), mine)),
        (dx_SK, torch.einsum("sn,snk->sk", dy_SN[:ROWS].double(), mine)),
    ):
        assert got.dtype == dtype
        assert (got[:ROWS] - wanted).norm() <= tolerance * wanted.norm()
        assert got[ROWS:].abs().max() == 0


def test_decoding_the_stack_and_one_grouped_gemm_give_the_same_in_bfloat16(stack):
    """What CUDA runs, here with torch's CPU form of the grouped GEMM; two roundings to bf16 instead of one."""
    packed, _ = stack
    x_SK, dy_SN = rows(K, torch.bfloat16), rows(N, torch.bfloat16)
    columns_first = [values[1:].T.contiguous().T for values in (x_SK, dy_SN)]  # 13 rows: no multiple of 16 bytes
    for x, dy in ((x_SK, dy_SN), columns_first):
        for got, wanted in (
            (grouped_cuda.two_step(x, OFFSETS, *packed), grouped_quantized_linear(x, OFFSETS, *packed)),
            (grouped_cuda.two_step_dx(dy, OFFSETS, *packed), grouped_quantized_linear_dx(dy, OFFSETS, *packed)),
        ):
            assert got.is_contiguous()
            assert got.dtype == torch.bfloat16
            assert (got - wanted).double().norm() <= 5e-3 * wanted.double().norm()
            assert got[ROWS:].abs().max() == 0


def test_the_gradient_of_the_rows_is_that_of_the_dense_product_and_has_one_itself(stack):
    packed, dense_ENK = stack
    x_SK = rows(K, torch.float64).requires_grad_()
    upstream = rows(N, torch.float64)
    (grouped_quantized_linear(x_SK, OFFSETS, *packed) * upstream).sum().backward()
    wanted = torch.einsum("sn,snk->sk", upstream[:ROWS], dense_ENK[OWNERS])
    assert torch.allclose(x_SK.grad[:ROWS], wanted, rtol=1e-6, atol=1e-12)
    dy_SN = upstream.clone().requires_grad_()
    grouped_quantized_linear_dx(dy_SN, OFFSETS, *packed).square().sum().backward()
    twice = 2 * torch.einsum("sk,snk->sn", wanted, dense_ENK[OWNERS])
    assert torch.allclose(dy_SN.grad[:ROWS], twice, rtol=1e-6, atol=1e-12)


def test_no_rows_at_all_give_an_empty_result(stack):
    packed, _ = stack
    assert grouped_quantized_linear(torch.empty(0, K), torch.zeros(E, dtype=torch.int32), *packed).shape == (0, N)


def test_the_operators_are_what_compilers_expect(stack):
    packed, _ = stack
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # no schema: float8
    opcheck(grouped_quantized_linear, (rows(K).requires_grad_(), OFFSETS, *packed), test_utils=checks)
    opcheck(grouped_quantized_linear_dx, (rows(N).requires_grad_(), OFFSETS, *packed), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": OFFSETS.long()}, r"offsets int32 \[4\] on cpu; got int64 \[4\]"),
        ({"offsets": OFFSETS[:3]}, r"offsets int32 \[4\] on cpu; got int32 \[3\]"),
        ({"decode": torch.ones(4, 3)}, r"decode_scale float32 \[4, P\] with P a divisor of 32; got float32 \[4, 3\]"),
        ({"decode": torch.ones(4)}, r"decode_scale float32 \[4, P\]"),
        ({"block": torch.ones(4, 32, 4)}, r"block_decode_scale_NG float8_e4m3fn \[32, 4\]"),
        ({"codes": torch.ones(32, 32, dtype=torch.uint8)}, r"codes uint8 \[E, N, K/2\] .* got uint8 \[32, 32\]"),
        ({"x": torch.ones(14, 32)}, r"x \[\.\.\., 64\]; got float32 \[14, 32\]"),
        ({"x": torch.ones(2, 7, 64)}, r"x \[S, features\]; got float32 \[2, 7, 64\]"),
    ],
    ids=["wide offsets", "few offsets", "odd parts", "flat scales", "wide blocks", "one matrix", "features", "batch"],
)
def test_operands_that_do_not_fit_are_refused(stack, change, message):
    (codes, block, decode), _ = stack
    given = {"x": rows(K), "offsets": OFFSETS, "codes": codes, "block": block, "decode": decode} | change
    with pytest.raises(FormatError, match=f"qerl::grouped_quantized_linear: expected {message}"):
        grouped_quantized_linear(*given.values())
