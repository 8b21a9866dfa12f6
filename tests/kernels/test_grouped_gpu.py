"""The grouped operators on a GPU: against a dense oracle, in a CUDA graph, and what a graph cannot hold."""

# ruff: noqa: T201

import pytest
import torch

from qerl_compile.errors import GraphError
from qerl_compile.formats.nvfp4 import dequantize, quantize
from qerl_compile.kernels.grouped import grouped_quantized_linear, grouped_quantized_linear_dx

E, N, K = 8, 256, 512


@pytest.fixture(scope="module")
def stack():
    """(codes, block scales, decode scales [E, 1]) and the dense stack [E, N, K] in float32, on the GPU."""
    torch.manual_seed(0)
    matrices = [quantize(torch.randn(N, K)) for _ in range(E)]
    codes = torch.stack([p.codes_NK2 for p in matrices]).cuda()
    block = torch.stack([p.block_decode_scale_NG.view(torch.uint8) for p in matrices]).cuda()
    decode = torch.stack([p.decode_scale for p in matrices])[:, None].cuda()
    dense = torch.stack([dequantize(p, torch.float32) for p in matrices]).cuda()
    return (codes, block.view(torch.float8_e4m3fn), decode), dense


def sorted_rows(count, features, dtype, seed=1, experts=E):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, experts, (count,), generator=generator).sort().values
    offsets = torch.bincount(owners, minlength=E).cumsum(0).int()
    x = torch.randn(count, features, generator=generator).to(dtype)
    return x.cuda(), owners.cuda(), offsets.cuda()


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 5e-3), (torch.float32, 1e-5)], ids=["bf16", "fp32"])
def test_rows_meet_the_matrix_of_their_expert(stack, dtype, tolerance, count):
    packed, dense_ENK = stack
    x_SK, owners, offsets = sorted_rows(count, K, dtype, experts=3)  # five experts without rows
    dy_SN, _, _ = sorted_rows(count, N, dtype)
    for got, wanted in (
        (
            grouped_quantized_linear(x_SK, offsets, *packed),
            torch.einsum("sk,snk->sn", x_SK.double(), dense_ENK[owners].double()),
        ),
        (
            grouped_quantized_linear_dx(dy_SN, offsets, *packed),
            torch.einsum("sn,snk->sk", dy_SN.double(), dense_ENK[owners].double()),
        ),
    ):
        error = ((got.double() - wanted).norm() / wanted.norm()).item()
        print(f"{dtype} {count} rows: {error:.2e}")
        assert error <= tolerance


def test_a_cuda_graph_follows_the_offsets_of_each_replay(stack):
    packed, _ = stack
    x_SK, _, offsets = sorted_rows(64, K, torch.bfloat16)
    grouped_quantized_linear(x_SK, offsets, *packed)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_SN = grouped_quantized_linear(x_SK, offsets, *packed)
    other_SK, _, other_offsets = sorted_rows(64, K, torch.bfloat16, seed=2)
    assert not torch.equal(other_offsets, offsets)
    x_SK.copy_(other_SK)
    offsets.copy_(other_offsets)
    graph.replay()
    assert torch.equal(y_SN, grouped_quantized_linear(other_SK, other_offsets, *packed))


def test_what_has_to_read_the_offsets_refuses_to_be_captured(stack):
    packed, _ = stack
    x_SK, _, offsets = sorted_rows(4, K, torch.float32)
    grouped_quantized_linear(x_SK, offsets, *packed)
    torch.cuda.synchronize()
    with pytest.raises(GraphError, match="bfloat16 activations"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grouped_quantized_linear(x_SK, offsets, *packed)
