import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qerl_compile.rl.footprint import planned_attention
from qerl_compile.rl.footprint.liveness import Liveness, bytes_of, rounded

KIB = 1024


def peak(function, *shapes, counted=lambda node: True):
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    graph = make_fx(function, tracing_mode="fake")(*tensors).graph
    return Liveness(graph, counted=counted).peak({})


def test_the_allocator_hands_out_512_bytes_at_a_time():
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


# One matrix [16, 64] of float32 is 4 KiB, one [16, 32] 2 KiB.
@pytest.mark.parametrize(
    ("function", "shapes", "kib", "because"),
    [
        (lambda x, w: x @ w, [(16, 64), (64, 64)], 4 + 16 + 4, "operands and result"),
        (
            lambda x, w: torch.relu(x) @ w,
            [(16, 64), (64, 64)],
            4 + 4 + 16,
            "relu for the product, whose result is as large",
        ),
        (lambda x: torch.relu(x).exp().sum(0), [(16, 64)], 4 + 0.5, "elementwise work is fused into the sum"),
        (lambda x: x.t().contiguous(), [(16, 64)], 8, "a copy is returned"),
        (lambda x: x.t(), [(16, 64)], 4, "a view is no memory"),
        (lambda x, w, v: (x @ w) @ v, [(16, 64), (64, 32), (32, 16)], 4 + 8 + 2 + 2, "x and w die before the second"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_lives_at_most(function, shapes, kib, because):
    assert peak(function, *shapes) == kib * KIB, because


def test_weights_that_are_not_counted_leave_the_activations():
    found = peak(lambda x, w: x @ w, (16, 64), (64, 64), counted=lambda node: node.name.startswith("x"))
    assert found == 8 * KIB


def test_a_cast_to_a_wider_dtype_is_made_again_where_it_is_read():
    def function(x, w):
        wide = x.double()
        return wide.sum(0), (x @ w), wide.exp()

    def narrow(x, w):
        return x.sum(0), (x @ w), x.exp()

    # the last result is twice as wide; a kept copy of x in float64 would be 8 KiB more
    assert peak(function, (16, 64), (64, 64)) - peak(narrow, (16, 64), (64, 64)) <= (4 + 0.5) * KIB


def test_attention_keeps_one_number_a_row_and_no_scores():
    q = torch.empty(2, 4, 256, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = planned_attention.planned_attention(q, q, q)
    assert out.shape == q.shape
    assert sorted(set(kept)) == [(2, 4, 256), (2, 4, 256, 16)]
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_bytes_of_results_are_added_up():
    pair = (torch.empty(1000, dtype=torch.uint8, device="meta"), torch.empty(100, device="meta"))
    assert bytes_of(pair, {}) == 1024 + 512
