"""The stream kernel on a GPU: every form against float64, run-to-run equality, graphs, every code under every scale.

Run with `-s`: a test goes through all of its cases, prints one table and only then judges. All forms are first compiled
in parallel, into the caches where the launches find them.
"""

# ruff: noqa: T201

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import triton

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import nvfp4_fragments, nvfp4_stream_launch, nvfp4_workspace, ops

CAPABILITY = torch.cuda.get_device_capability()
DEVICE = torch.device("cuda", torch.cuda.current_device())
LIMIT = 4e-3
RANK = 32
SHAPES = [(24, 256), (1000, 1536), (1040, 3584), (5120, 5120), (3584, 18944)]
TO_COMPILE = [(24, 256), (24, 1024), (32, 1024)]  # with K=256 slices become one; 16 divides N, or not


def forms():
    """Name -> (config, rank): all (dependent, rank) for the smallest tile, one of them by turns for the others."""
    made, turns = {}, itertools.cycle(range(4))
    for rows, tokens in itertools.product((16, 32), (8, 16, 32)):
        small = (rows, tokens) == (16, 8)
        for warps, slices, natural in ((4, 1, 0), (4, 1, 1), (2, 2, 0), (8, 4, 0), (1, 3, 0)):
            pairs = [(1, 0), (0, RANK), (0, 0), (1, RANK)]
            for dependent, rank in pairs if small else [pairs[next(turns)]]:
                config = {"R": rows, "W": warps, "T": tokens, "SLICES": slices, "NATURAL": natural, "max_registers": 0}
                config["dependent"] = dependent if CAPABILITY >= (9, 0) else 0
                name = f"R{rows} T{tokens} W{warps} S{slices} {'as it is' if natural else 'fragments'}"
                made[f"{name} dependent {dependent} rank {rank}"] = config, rank
    return made


FORMS = forms()


def normal(*shape):
    return torch.randn(*shape, device=DEVICE).bfloat16()


def product(x, weight, config, branch=None):
    h, lora = branch or (None, None)
    h = None if h is None else h[: x.shape[0]]
    return nvfp4_stream_launch.linear(x, *weight, config, h_MR=h, lora_B_NR=lora)


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    def prepare(kernel, **constants):
        return lambda grid, *arguments: kernel.warmup(*arguments, grid=grid, **constants)

    begin = time.perf_counter()
    with (
        mock.patch.object(nvfp4_stream_launch, "prepare", prepare),
        mock.patch.object(nvfp4_fragments, "prepare", prepare),
        ThreadPoolExecutor(os.cpu_count()) as executor,
        triton.AsyncCompileMode(executor) as mode,
    ):
        for (n, k), (config, rank) in itertools.product(TO_COMPILE, FORMS.values()):
            block = torch.zeros(n, k // 16, dtype=torch.float8_e4m3fn, device=DEVICE)
            weight = torch.zeros(n, k // 2, dtype=torch.uint8, device=DEVICE), block, torch.ones(1, device=DEVICE)
            product(normal(config["T"], k), weight, config, (normal(32, rank), normal(n, rank)) if rank else None)
    print(f"\n{len(mode.raw_futures)} kernels compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def poisoned_product(*arguments):
    """The same, with every output and all scratch full of NaN before."""

    def filled(tensor, *shape):
        return torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)

    nvfp4_workspace.partial_sums(DEVICE, 1).fill_(float("nan"))
    with mock.patch.object(torch.Tensor, "new_empty", filled):
        return product(*arguments)


def test_every_form_agrees_with_float64_and_repeats_to_the_bit():
    worst, bad = dict.fromkeys(FORMS, 0.0), []
    for n, k in SHAPES:
        codes, block, global_scale = ops.quantize((torch.randn(n, k, device=DEVICE) * 0.02).bfloat16())
        weight = codes, block, global_scale.reciprocal()
        assert nvfp4_stream_launch.supports(codes, block)
        x, other = normal(2, 32, k)
        h, lora = normal(32, RANK), normal(n, RANK) * 0.3  # as large as x · Wᵀ: a wrong row or rank cannot hide
        exact = x.double() @ (nvfp4.exact_products(codes, block, torch.float32).double() * weight[2].double()).T
        of_rank = {0: exact, RANK: exact + h.double() @ lora.double().T}
        for name, (config, rank) in FORMS.items():
            branch = (h, lora) if rank else None
            for m in (1, config["T"] - 3, config["T"]):
                y = poisoned_product(x[:m], weight, config, branch)
                error = ((y.double() - of_rank[rank][:m]).norm() / of_rank[rank][:m].norm()).item()
                # Back to back and with another x in between: scratch that is used too early, or not cleared, shows.
                again = [product(v[:m], weight, config, branch) for v in (other, x) * 4][1::2]
                differ = sum(not torch.equal(y, repeated) for repeated in again)
                if not error < LIMIT or differ:
                    bad.append(f"{n}x{k} M={m} {name}: {error:.1e}, {differ} of 4 differ")
                worst[name] = max(worst[name], error if error < LIMIT else float("inf"))
    for name, error in worst.items():
        print(f"{name:48} {error:.1e}")
    print(*bad[:60], f"{len(bad)} bad", sep="\n", flush=True)
    assert not bad


def test_identity_activations_read_out_every_code_under_every_scale():
    codes = torch.arange(256, device=DEVICE).to(torch.uint8).view(2, 128).repeat(127, 4)
    block = (torch.arange(254)[:, None] // 2 + torch.arange(64)) % 127  # each column holds all 127, twice
    block = block.to(torch.uint8).to(DEVICE).view(torch.float8_e4m3fn)
    weight = codes, block, torch.ones(1, device=DEVICE)
    expected = nvfp4.exact_products(codes, block, torch.float32)
    eye, wrong = torch.eye(1024, device=DEVICE).bfloat16(), {}
    for name, (config, rank) in FORMS.items():
        if not rank:
            y = torch.cat([poisoned_product(x, weight, config) for x in eye.split(config["T"])])
            wrong[name] = int((expected != y.float().T).sum())
    wrong = {name: count for name, count in wrong.items() if count}
    assert not wrong, wrong


def test_graphs_of_two_calls_replay_what_calls_give():
    n, k = 1000, 1536
    codes, block, global_scale = ops.quantize((torch.randn(n, k, device=DEVICE) * 0.02).bfloat16())
    weight = codes, block, global_scale.reciprocal()
    branch, bad = (normal(32, RANK), normal(n, RANK)), []
    for name, (config, rank) in FORMS.items():
        xs = normal(2, config["T"], k)
        branch_of_form = branch if rank else None
        for _ in range(3):  # loads the kernel, then prepares its launch
            product(xs[0], weight, config, branch_of_form)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [product(x, weight, config, branch_of_form) for x in xs]
        for _ in range(3):
            xs.normal_()
            graph.replay()
            expected = [product(x, weight, config, branch_of_form) for x in xs]
            bad += [name for y, e in zip(ys, expected, strict=True) if not torch.equal(y, e)]
    assert not bad, bad
