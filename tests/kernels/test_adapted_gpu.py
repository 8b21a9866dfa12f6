"""Linears with a stacked adapter on a GPU, at the shapes of Qwen2.5-7B: numbers, and adapters changed under a graph."""

# ruff: noqa: T201

import pytest
import torch

from qerl_compile.kernels import ops
from tests.kernels.oracle import make_weight

# (N, K, members' rows, ranks): q/k/v, o, gate/up, down, and a small odd one
SHAPES = [
    (4608, 3584, (3584, 512, 512), (32, 32, 32)),
    (3584, 3584, (3584,), (32,)),
    (2 * 4736, 3584, (4736, 4736), (32, 32)),
    (3584, 4736, (3584,), (16,)),
    (96, 64, (48, 48), (3, 0)),
]
PADDED = (16, 32, 64, 128)


def operands(n, k, rows, ranks, m, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(n + m)
    rank = next(width for width in PADDED if sum(ranks) <= width)
    a, b = torch.zeros(rank, k), torch.zeros(n, rank)
    row = column = 0
    for height, width in zip(rows, ranks, strict=True):
        a[column : column + width] = torch.randn(width, k, generator=generator) * k**-0.5
        b[row : row + height, column : column + width] = torch.randn(height, width, generator=generator)
        row, column = row + height, column + width
    x = torch.randn(m, k, generator=generator)
    return (t.to(dtype).cuda() for t in (x, a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_equal_float64_up_to_rounding(dtype):
    worst, tolerance = 0.0, {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-17}[dtype]
    for n, k, rows, ranks in SHAPES:
        weight = make_weight(n, k)
        packed, exact = [t.cuda() for t in weight.args], weight.exact.cuda()
        for m in (1, 3, 8, 16, 64, 200, 256) if dtype == torch.bfloat16 else (1, 33):
            x, a, b = operands(n, k, rows, ranks, m, dtype)
            branch = x.double() @ a.double().T @ b.double().T
            for name, got, want in (
                ("packed", torch.ops.qerl.adapted_linear(x, *packed, a, b), x.double() @ exact.T + branch),
                (
                    "dense",
                    torch.ops.qerl.adapted_dense_linear(x, exact.to(dtype), None, a, b),
                    x.double() @ exact.to(dtype).double().T + branch,
                ),
            ):
                error = ((got.double() - want).abs().max() / want.abs().max()).item()
                worst = max(worst, error)
                print(f"{name} N={n} K={k} R={a.shape[0]} M={m} {dtype}: relative error {error:.2e}")
    assert worst <= tolerance


def test_blocks_of_stacked_factors_are_read_with_their_strides():
    weight = make_weight(256, 512)
    packed = [t.cuda() for t in weight.args]
    x, a, b = operands(256, 512, (256,), (128,), 8)
    for width in (16, 32, 48):
        got = torch.ops.qerl.adapted_linear(x, *packed, a[16 : 16 + width], b[:, 16 : 16 + width])
        branch = x.double() @ a[16 : 16 + width].double().T @ b[:, 16 : 16 + width].double().T
        want = ops.quantized_linear(x.double(), *packed) + branch
        assert (got.double() - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("m", [1, 8, 64, 256])
def test_adapters_changed_in_place_are_seen_by_a_captured_graph(m):
    n, k, rows, ranks = SHAPES[0]
    packed = [t.cuda() for t in make_weight(n, k).args]
    x, a, b = operands(n, k, rows, ranks, m)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.ops.qerl.adapted_linear(x, *packed, a, b)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.qerl.adapted_linear(x, *packed, a, b)
    for scale in (1.0, -2.0, 0.0):
        b.mul_(scale)
        a.add_(0.01)
        graph.replay()
        assert torch.equal(y, torch.ops.qerl.adapted_linear(x, *packed, a, b))


def test_a_model_generates_the_same_logits_as_its_training_graph():
    """Prefill and decode shapes of a tiny model in bf16, with the kernels of this GPU under both graphs."""
    from qerl_compile.stacked_adapters import refresh_stacked_adapters
    from qerl_compile.transforming import transform
    from tests.models import tiny_model
    from tests.pages import Pages

    for recipe in ("qerl-nvfp4-aqn", "bf16-lora-aqn"):
        model = transform(tiny_model("qwen2", dtype=torch.bfloat16).cuda(), recipe)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        assert refresh_stacked_adapters(model)
        for shape in ((4, 11), (4, 1), (1, 1)):
            ids = torch.randint(3, 128, shape, device="cuda")
            with torch.no_grad():
                want = model(input_ids=ids, use_cache=False).logits.float()
            pages = Pages(shape[0], device="cuda")
            got = model(input_ids=ids, use_cache=False, qerl_cache=pages).logits.float()
            error = ((got - want).abs().max() / want.abs().max()).item()
            print(f"{recipe} {shape}: relative difference {error:.2e}")
            assert error <= 0.05
