"""The Hopper forward kernel without a GPU: its source runs on torch tensors, as `nvfp4_hopper.linear` would launch it.

x is permuted by `column_order` and not by the kernel that does so (test_triton_interpreted.py runs that one). Scratch
and output are full of NaN and no larger than they have to be; the counters are zero. CTAs run in launch order, so an
owner that waits for a CTA launched after it is found out, and so is a CTA without a run.
"""

import pytest
import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import nvfp4_hopper, nvfp4_permute, nvfp4_persistent, nvfp4_wgmma
from tests.kernels.gluon_on_torch import Descriptor, Pointer, run
from tests.kernels.oracle import make_weight

FORM = {"tokens": 8, "rows": 64, "consumers": 1, "slots_w": 2, "slots_x": 2, "waves": -1, "per_sm": 1, "groups": 1,
        "dependent": 1, "registers": 0, "max_registers": 0}  # fmt: skip


def permuted(x, tokens, rows):
    """What nvfp4_permute.permute gives; NaN where it writes nothing."""
    m, k = x.shape
    tiles = -(-m // tokens)
    out = torch.full((tiles * tokens, k), float("nan"), dtype=x.dtype)
    out[:m] = x[:, nvfp4_permute.column_order(k)]
    out = out.view(tiles, tokens, k // 64, 64).transpose(1, 2).reshape(-1, 64)
    assert out.shape[0] == rows
    return out


def multiply(x, codes, block, decode, config, multiprocessors, h=None, lora=None, residual=None):
    """What nvfp4_hopper.linear launches, on torch tensors; also the plan. With an adapter, x has been counted."""
    config = FORM | config
    (m, k), n, rank = x.shape, codes.shape[0], 0 if h is None else h.shape[1]
    plan = nvfp4_hopper._plan(m, n, k, rank, residual is not None, multiprocessors, tuple(config.items()))
    y = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    part = torch.full((plan.partial + plan.counters,), float("nan"))
    part[plan.partial :] = 0
    strides = (1, 1) if h is None else (h.stride(0), lora.stride(0))
    arguments = (
        Descriptor(permuted(x, config["tokens"], plan.rows_x), plan.x.shape),
        Descriptor(codes, plan.w.shape),
        *map(Pointer, (block, decode.reshape(1), y, part)),
        *(None if t is None else Pointer(t) for t in (h, lora, residual)),
        *((Pointer(torch.tensor([7, 3], dtype=torch.int32)), 1, 3) if rank else (None, 0, 0)),
        *plan.integers,
        *strides,
        1 if residual is None else residual.stride(0),
    )
    constants = {
        "TOKENS": config["tokens"], "ROWS": config["rows"], "CONSUMERS": config["consumers"],
        "SLOTS_W": config["slots_w"], "SLOTS_X": config["slots_x"], "GROUP": plan.x.shape[0] // config["tokens"],
        "CONSUMER_REGISTERS": 0, "DEPENDENT": config["dependent"], "RANK": rank, "RESIDUAL": residual is not None,
    }  # fmt: skip
    run(nvfp4_wgmma, arguments, constants, plan.grid, pack_dim=-1)
    assert part[plan.partial :].view(torch.int32).tolist() == helpers(plan, config["consumers"])
    return y, plan


def helpers(plan, consumers):
    """What every counter holds in the end: of a shared tile, the CTAs of its group that work on it after the first."""
    *_, k_tiles, _, groups, _, units, _ = plan.integers
    workers = plan.grid[0] // groups
    tile_of = [[u // k_tiles for u in range(w * units // workers, (w + 1) * units // workers)] for w in range(workers)]
    assert all(tile_of) or not units
    return [
        sum(tile in run for run in tile_of) - 1 for tile in range(units // k_tiles) for _ in range(groups * consumers)
    ]


TWO = {"consumers": 2}
TALL = {"consumers": 2, "rows": 128, "tokens": 64, "dependent": 3}
CASES = {  # N, K, M, LoRA's rank, multiprocessors, config; CTAs and waves that the case is there for
    "one CTA, whole tiles, tails of N and M": (200, 512, 21, 0, 1, {"tokens": 16}, 1, 8),
    "whole tiles, then one shared by three": (256, 768, 8, 16, 3, {"dependent": 0}, 3, 1),
    "everything shared, runs across tiles": (392, 768, 40, 0, 5, {**TWO, "tokens": 32, "waves": 0}, 5, 0),
    "one tile shared by five": (56, 1280, 5, 16, 7, {}, 5, 0),
    "fewer steps left over than CTAs": (576, 256, 8, 0, 4, {"dependent": 2}, 4, 1),
    "two groups of three": (200, 768, 64, 16, 7, {**TWO, "tokens": 32, "groups": 4, "waves": 0}, 6, 0),
    "three groups of two, two tiles of tokens each": (136, 512, 90, 0, 7, {"tokens": 16, "groups": 3}, 6, 3),
    "groups that have nothing to share": (128, 512, 30, 0, 8, {"tokens": 16, "groups": 2, "per_sm": 2}, 8, 0),
    "two accumulators, whole tiles": (256, 512, 64, 0, 1, TALL, 1, 1),
    "two accumulators, tails, all shared": (600, 512, 61, 32, 4, {**TALL, "waves": 0}, 4, 0),
    "two accumulators, groups, planes by two": (300, 512, 250, 0, 3, {**TALL, "tokens": 128, "groups": 2}, 2, 2),
    "two accumulators, one consumer": (136, 768, 9, 64, 5, {**TALL, **{"consumers": 1, "tokens": 16}}, 5, 0),
    "planes one by one, five slots": (72, 512, 260, 0, 3, {"tokens": 256, "slots_x": 5, "slots_w": 3}, 3, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_source_on_torch_tensors_agrees_with_float64(case):
    n, k, m, rank, multiprocessors, config, ctas, waves = CASES[case]
    w = make_weight(n, k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).bfloat16()
    exact = x.double() @ w.exact.T
    h = lora = None
    if rank:  # as large as x · Wᵀ, and columns of larger matrices
        h = torch.randn(m, rank + 8, generator=generator).bfloat16()[:, :rank]
        lora = torch.randn(n, rank + 16, generator=generator).bfloat16()[:, :rank]
        exact += h.double() @ lora.double().T
    y, plan = multiply(x, *w.args, config, multiprocessors, h, lora)
    assert ((y.double() - exact).norm() / exact.norm()).item() < 2.5e-3
    if rank:
        residual = torch.randn(m, n + 8, generator=generator).bfloat16()[:, :n]
        assert torch.equal(multiply(x, *w.args, config, multiprocessors, h, lora, residual)[0], y + residual)
    assert (plan.grid, plan.integers[5]) == ((ctas,), waves)


@pytest.mark.parametrize(
    ("tiles", "pieces", "workers", "waves", "expected"),
    [
        (216, 20, 132, -1, (1, 84)),
        (133, 20, 132, -1, (0, 133)),  # 20 pieces left for 132 workers: one would wait for workers without any
        (264, 20, 132, -1, (2, 0)),
        (216, 20, 132, 0, (0, 216)),
        (5, 4, 20, -1, (0, 5)),
    ],
)
def test_every_worker_gets_a_piece_of_what_is_shared(tiles, pieces, workers, waves, expected):
    assert nvfp4_persistent.whole_and_shared(tiles, pieces, workers, waves) == expected


@pytest.mark.parametrize("rows", [64, 128])
def test_identity_activations_read_out_every_code_under_every_scale(rows):
    codes = torch.arange(256).to(torch.uint8).view(2, 128).repeat(127, 1)
    block = (torch.arange(254)[:, None] // 2 + torch.arange(16)) % 127  # each column holds all 127, twice
    block = block.to(torch.uint8).view(torch.float8_e4m3fn)
    config = {"tokens": 64, "rows": rows, "consumers": 2}
    y, _ = multiply(torch.eye(256).bfloat16(), codes, block, torch.ones(1), config, 2)
    assert torch.equal(y.float().T, nvfp4.exact_products(codes, block, torch.float32))
