"""h and x in order from one launch, and dependent launches along a layer, on a GPU: the bits of separate launches.

A layer is built as a decode step has it (norm, q/k/v, attention, o, norm, gate/up, silu, down), several are captured in
one graph, and every replay must give the bits of another graph, where each launch does one thing (`lora_down`, then
`cuda.linear` with h given, then a sum for the residual) and attention is no dependent. Memory is poisoned in between.
"""

import pytest
import torch
from torch.nn import functional as F

from qerl_compile.kernels import cuda, dispatch, flash_decode, lead_in, nvfp4_workspace, ops
from qerl_compile.kernels.lora_down import lora_down
from qerl_compile.kernels.paged_attention import paged_decode

HEADS = {3584: (28, 4), 5120: (40, 8)}  # of queries, of keys
REPLAYS = 50


def draw(generator, *shape, scale=1.0):
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()


def packed(generator, n, k, ranks):
    codes, block, scale = ops.quantize(draw(generator, n, k, scale=k**-0.5))
    a, b = draw(generator, ranks, k, scale=k**-0.5), draw(generator, n, ranks, scale=0.1)
    return codes, block, scale.reciprocal(), a, b


def one_by_one(x, codes, block, decode_scale, a, b, residual=None):
    """`cuda.adapted_linear` in launches that each do one thing."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    choice = dispatch.choose("adapted", len(b), x.shape[1], len(x), torch.cuda.get_device_capability(), multiprocessors)
    y = cuda.linear(x, codes, block, decode_scale, lora_down(x, a), b, choice=choice)
    return y if residual is None else y + residual


def ordinary_attention(*args):
    """`paged_decode` without dependent launches."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return flash_decode.decode(*args, multiprocessors=multiprocessors, choice={"dependent": False})


def poison_memory():
    """What a kernel reads without having written it is NaN."""
    device = torch.device("cuda")
    nvfp4_workspace.partial_sums(device, 1).fill_(float("nan"))
    nvfp4_workspace.permuted(device, 1).fill_(float("nan"))
    _ = [torch.full((1 << 14,), float("nan"), device="cuda") for _ in range(16)]


@pytest.mark.parametrize(
    ("n", "k", "rank"),
    [
        (4608, 3584, 128), (3584, 18944, 32), (7168, 5120, 128), (5120, 5120, 32), (5120, 27648, 32),
        (1152, 896, 16), (896, 4864, 64),
    ],
)  # fmt: skip
def test_one_launch_is_two_to_the_bit(n, k, rank):
    weight = packed(torch.Generator("cuda").manual_seed(n), n, k, rank)
    for m in (1, 2, 7, 13):
        x = draw(torch.Generator("cuda").manual_seed(m), m, k + 64)[:, 32 : 32 + k]
        want, h = one_by_one(x, *weight), lora_down(x, weight[3])
        exact = ops.dequantize(*weight[:3], torch.float32).double()
        exact = x.double() @ exact.T + h.double() @ weight[4].double().T
        assert ((want.double() - exact).abs().max() / exact.abs().max()).item() < 2**-7
        residual = draw(torch.Generator("cuda").manual_seed(m + 1), m, n + 8)[:, :n]
        for _ in range(5):  # the first two launches are Triton's, the others prepared ones
            poison_memory()
            assert torch.equal(cuda.adapted_linear(x, *weight), want), m
            assert torch.equal(cuda.adapted_linear(x, *weight, residual), want + residual), m
    assert not nvfp4_workspace.flags(torch.device("cuda"), 1).any()


class Layer:
    """One decoder layer of a decode step, of random weights."""

    def __init__(self, generator, hidden, inner, rows):
        self.heads, self.heads_kv = HEADS[hidden]
        wide = (self.heads + 2 * self.heads_kv) * 128
        self.qkv, self.o = packed(generator, wide, hidden, 128), packed(generator, hidden, self.heads * 128, 32)
        self.up, self.down = packed(generator, 2 * inner, hidden, 64), packed(generator, hidden, inner, 32)
        self.norms = [1 + draw(generator, hidden, scale=0.1) for _ in range(2)]
        self.pages = [draw(generator, rows * 8, self.heads_kv, 64, 128) for _ in range(2)]

    def __call__(self, x, table, length, kept, linear, attention):
        def norm(x, weight):
            return F.rms_norm(x, weight.shape, weight, 1e-6)

        q, k, v = (
            kept(linear(kept(norm(x, self.norms[0])), *self.qkv))
            .unflatten(1, (-1, 128))
            .split([self.heads, self.heads_kv, self.heads_kv], 1)
        )
        y = kept(attention(q, k, v, *self.pages, table, length, 128**-0.5, 0))
        x = kept(x + kept(linear(y.flatten(1), *self.o)))
        gate, up = kept(linear(kept(norm(x, self.norms[1])), *self.up)).chunk(2, 1)
        return kept(linear(kept(F.silu(gate) * up), *self.down, x))


@pytest.mark.parametrize("rows", [2, 8, 16])
@pytest.mark.parametrize(("hidden", "inner"), [(3584, 18944), (5120, 27648)])
@pytest.mark.parametrize("keep", [False, True], ids=["memory is reused", "every result has its own"])
def test_layers_in_a_graph_give_the_bits_of_ordinary_launches_at_every_replay(hidden, inner, rows, keep, monkeypatch):
    """One product more before them than four a layer where memory is reused: a replay then begins with the word full
    by which the last one ended."""
    seen, launch = [], lead_in.launch
    monkeypatch.setattr(lead_in, "launch", lambda *args, **options: seen.append(launch(*args, **options)) or seen[-1])
    generator = torch.Generator("cuda").manual_seed(rows)
    layers = [Layer(generator, hidden, inner, rows) for _ in range(3)]
    table = torch.randperm(rows * 8, device="cuda").int().view(rows, 8)
    length = torch.randint(1, 500, (rows,), generator=generator, device="cuda").int()
    x = draw(generator, rows, hidden)
    first = packed(generator, hidden, hidden, 32)

    def captured(linear, attention):
        """A graph, its result, and what lies between, where that is kept."""
        held = []

        def forward(kept=lambda tensor: tensor):
            y = x if keep else kept(linear(x, *first))
            for layer in layers:
                y = layer(y, table, length, kept, linear, attention)
            return y

        for _ in range(3):
            forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = forward(lambda tensor: held.append(tensor) or tensor) if keep else forward()
        return graph, y, held

    reference, want, _ = captured(one_by_one, ordinary_attention)
    graph, y, held = captured(cuda.adapted_linear, paged_decode)
    calls = 4 * len(layers) + (not keep)
    assert [lead.arriving > 0 for lead in seen[-calls:]] == [False] + [True] * (calls - 1)
    assert not any(lead.arriving for lead in seen[:-calls])  # outside of a capture
    for turn in range(REPLAYS):
        x.copy_(draw(generator, rows, hidden))
        length.copy_(torch.randint(0 if turn % 2 else 1, 500, (rows,), generator=generator, device="cuda"))
        reference.replay()
        assert want.isfinite().all()
        for tensor in (y, *held):
            tensor.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want), turn
    assert not any(taken.any() for taken in nvfp4_workspace._TAKEN)
