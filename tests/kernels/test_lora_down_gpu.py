"""The adapter's first product on a GPU: against float64, poisoned scratch, equality of runs, graphs; a table of times.

pytest tests/kernels/test_lora_down_gpu.py -s -k table       prints µs per call under graph replay, A cold, x warm
"""

# ruff: noqa: T201

import math

import pytest
import torch
from torch.nn import functional as F

from qerl_compile.kernels import nvfp4_workspace as workspace
from qerl_compile.kernels.lora_down import config, lora_down

LIMIT = 4e-3  # of the largest result: half a unit in the last place of bfloat16 is 2e-3 of a result
SHAPES = [(3584, 128), (3584, 64), (18944, 32), (5120, 128), (5120, 64), (27648, 32)]
TOKENS = [1, 8, 16, 64, 256]
ON_HOPPER = torch.cuda.get_device_capability()[0] >= 9


def dots(bm, br, ks, steps, groups, *, warps=0, stages=0):
    return {
        "BM": bm, "BR": br, "KS": ks, "STEPS": steps, "GROUPS": groups, "num_warps": warps or max(groups, 4),
        "num_stages": stages or steps + 1,
    }  # fmt: skip


def rows(m, ks, warps, br=1, steps=1):
    return dots(1 << (m - 1).bit_length(), br, ks, steps, 0, warps=warps, stages=2)


def forms(m, k):
    """What the table compares, by name: tile, columns at once x steps, warps."""
    whole = 1 << (k - 1).bit_length()
    if m <= 8:
        tried = {"r1 4096 w8": rows(m, 4096, 8), "r2 2048 w8": rows(m, 2048, 8, 2)}
        if whole <= 8192:
            tried |= {"r1 all w4": rows(m, whole, 4), "r1 all w8": rows(m, whole, 8), "r1 all w16": rows(m, whole, 16)}
        tried |= {"r1 1024 w4": rows(m, 1024, 4), "r4 1024 w4": rows(m, 1024, 4, 4)}
    elif m <= 16:
        tried = {"16x16 64x4 w4": dots(16, 16, 64, 4, 4), "16x32 256x2 w4": dots(16, 32, 256, 2, 4)}
    elif m <= 64:
        tried = {
            "32x16 128x2 w4": dots(32, 16, 128, 2, 4),
            "32x16 256x2 w4": dots(32, 16, 256, 2, 4),
            "32x16 256x2 w8": dots(32, 16, 256, 2, 8),
            "32x32 256x2 w4": dots(32, 32, 256, 2, 4),
            "64x16 128x2": dots(64, 16, 128, 2, 1),
            "64x16 128x4": dots(64, 16, 128, 4, 1),
            "64x32 128x2": dots(64, 32, 128, 2, 1),
            "16x16 256x2 w4": dots(16, 16, 256, 2, 4),
        }
    else:
        tried = {
            "64x16 128x4": dots(64, 16, 128, 4, 1),
            "64x32 128x4": dots(64, 32, 128, 4, 1, stages=3),
            "64x32 128x8": dots(64, 32, 128, 8, 1, stages=4),
            "64x64 128x4": dots(64, 64, 128, 4, 1, stages=3),
            "32x32 256x2 w4": dots(32, 32, 256, 2, 4),
            "64x16 256x1": dots(64, 16, 256, 1, 1),
        }
    if m <= 16:
        tried |= {
            "16x16 128x2 w4": dots(16, 16, 128, 2, 4),
            "16x16 256x2 w4": dots(16, 16, 256, 2, 4),
            "16x16 512x2 w8": dots(16, 16, 512, 2, 8),
            "16x16 512x1 w4": dots(16, 16, 512, 1, 4),
            "16x16 256x1 w1": dots(16, 16, 256, 1, 1, warps=1),
        }
    return tried


def operands(m, r, k, seed=0):
    """x as columns of a larger matrix whose other columns are poison, and A."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.full((m, k + 64), float("nan"), dtype=torch.bfloat16, device="cuda")[:, 32 : 32 + k]
    x.copy_(torch.randn(m, k, generator=generator, device="cuda"))
    a = torch.randn(r, k, generator=generator, device="cuda") * k**-0.5
    return x, a.bfloat16()


def error(h, x, a):
    exact = x.double() @ a.double().T
    assert h.shape == exact.shape
    assert h.is_contiguous()
    return ((h.double() - exact).abs().max() / exact.abs().max()).item()


def poison():
    """What a kernel reads without having written it is NaN."""
    workspace.partial_sums(torch.device("cuda"), 1).fill_(float("nan"))
    _ = [torch.full((1 << 14,), float("nan"), device="cuda") for _ in range(16)]  # freed at once: results land here


def assert_tickets_are_zero():
    assert not workspace.flags(torch.device("cuda"), 1).any()
    assert not any(taken.any() for taken in workspace._TAKEN)


@pytest.mark.parametrize(("k", "r"), [*SHAPES, (896, 16), (4864, 48), (3584, 256), (1040, 32)])
def test_it_is_the_product_up_to_rounding_and_repeats_to_the_bit(k, r):
    for m in (1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 65, 100, 255, 256):
        x, a = operands(m, r, k, m)
        poison()
        h = lora_down(x, a)
        assert error(h, x, a) <= LIMIT, m
        for _ in range(5):  # the first two launches are Triton's, the others prepared ones
            poison()
            assert torch.equal(lora_down(x, a), h), m
    assert_tickets_are_zero()


@pytest.mark.parametrize("dependent", [False, True] if ON_HOPPER else [False])
@pytest.mark.parametrize("m", [1, 7, 16, 50, 256])
def test_every_form_of_the_table(m, dependent):
    k, r = 3584, 64
    x, a = operands(m, r, k)
    for name, form in forms(m, k).items():
        poison()
        h = lora_down(x, a, form | {"DEPENDENT": dependent})
        assert error(h, x, a) <= LIMIT, name
        for _ in range(4):
            assert torch.equal(lora_down(x, a, form | {"DEPENDENT": dependent}), h), name
    assert_tickets_are_zero()


def test_rows_at_odd_addresses_are_read_too():
    for m in (1, 16, 64, 200):
        for shift in (1, 2, 4):
            base = torch.randn(m, 3584 + shift, device="cuda").bfloat16()
            _, a = operands(m, 32, 3584)
            h = lora_down(base[:, shift:], a)
            assert error(h, base[:, shift:], a) <= LIMIT, (m, shift)


def test_calls_one_after_another_with_other_shapes_do_not_disturb_each_other():
    cases = [operands(m, r, k, m) for k, r in SHAPES for m in (1, 64, 16, 256, 4)]
    for _ in range(3):
        poison()
        results = [lora_down(x, a) for x, a in cases for _ in range(2)]  # nobody waits between them
        for i, (x, a) in enumerate(cases):
            assert error(results[2 * i], x, a) <= LIMIT
            assert torch.equal(results[2 * i], results[2 * i + 1])
    assert_tickets_are_zero()


@pytest.mark.parametrize("dependent", [False, True] if ON_HOPPER else [False])
def test_a_graph_sees_other_inputs_and_other_adapters(dependent):
    cases = [operands(m, r, k) for k, r in SHAPES[:3] for m in TOKENS]
    choice = {"DEPENDENT": dependent}
    for x, a in cases:
        for _ in range(3):
            lora_down(x, a, choice)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [lora_down(x, a, choice) for x, a in cases]
    for turn in range(4):
        for i, (x, a) in enumerate(cases):
            other_x, other_a = operands(x.shape[0], *a.shape, seed=100 * turn + i)
            x.copy_(other_x)
            a.copy_(other_a)
        for h in results:
            h.fill_(float("nan"))
        for _ in range(3):
            graph.replay()
        for h, (x, a) in zip(results, cases, strict=True):
            assert error(h, x, a) <= LIMIT
    assert_tickets_are_zero()


def test_table_of_times():
    from benchmarks.gpu_timing import Capture, GpuClock, interleaved

    clock, copies = GpuClock(), 64  # each sample starts with an overwritten L2 and meets every copy of A once
    print(
        f"\n{torch.cuda.get_device_name()}; µs per call: torch, config's choice, the same as a dependent launch; others"
    )
    for k, r in SHAPES:
        matrices = [operands(1, r, k, seed)[1] for seed in range(copies)]
        for m in TOKENS:
            x, _ = operands(m, r, k)
            choices = {"config": {}, **forms(m, k)}
            if ON_HOPPER:
                choices["config pdl"] = {"DEPENDENT": True}
            capture, graphs = Capture(), {}
            graphs["torch"] = capture([lambda a=a, x=x: F.linear(x, a) for a in matrices]).replay
            for name, choice in choices.items():
                assert error(lora_down(x, matrices[0], choice), x, matrices[0]) <= LIMIT, name
                calls = [lambda a=a, x=x, choice=choice: lora_down(x, a, choice) for a in matrices]
                for call in calls[:3]:
                    call()
                graphs[name] = capture(calls).replay
            times = interleaved(graphs, 9, clock, calls=dict.fromkeys(graphs, copies))
            first = [name for name in ("torch", "config", "config pdl") if name in times]
            rest = sorted((name for name in times if name not in first), key=lambda name: times[name][0])
            cells = [f"{name} {times[name][0]:.2f}" for name in (*first, *rest)]
            print(f"K{k} R{r} M{m}: " + ", ".join(cells), flush=True)
            form = config(m, k)
            ctas = math.ceil(m / form["BM"]) * r // form["BR"] * math.ceil(k / (form["KS"] * form["STEPS"]))
            print(f"    config: {ctas} CTAs, {form}")
