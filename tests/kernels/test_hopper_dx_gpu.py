"""The Hopper backward kernel on a GPU: against float64 in every form, run-to-run equality, graphs.

The tables are printed (`pytest -s`): one run shows every form's error, not the first failure alone.
"""

# ruff: noqa: T201

import pytest
import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import nvfp4_hopper_dx, nvfp4_workspace, ops

LIMIT = 4e-3
TWO_PER_SM = {"steps": 1, "registers": 104, "max_registers": 80, "per_sm": 2, "waves": -1, "share": 4, "groups": 1}
ONE_PER_SM = {"registers": 232, "max_registers": 0, "per_sm": 1, "waves": -1, "share": 8, "groups": 4}
FORMS = {
    "8 x2": {"tokens": 8, "slots": 8, **TWO_PER_SM},
    "16 x2": {"tokens": 16, "slots": 8, **TWO_PER_SM},
    "32 x2": {"tokens": 32, "slots": 7, **TWO_PER_SM},
    "32": {"tokens": 32, "slots": 7, "steps": 2, **ONE_PER_SM},
    "64 single": {"tokens": 64, "slots": 11, "steps": 1, **ONE_PER_SM},
    "64": {"tokens": 64, "slots": 5, "steps": 2, **ONE_PER_SM},
    "128 single": {"tokens": 128, "slots": 8, "steps": 1, **ONE_PER_SM},
    "128": {"tokens": 128, "slots": 4, "steps": 2, **ONE_PER_SM},
}


def multiprocessors():
    return torch.cuda.get_device_properties(0).multi_processor_count


def packed(n, k):
    codes, block, global_scale = ops.quantize((torch.randn(n, k, device="cuda") * 0.02).bfloat16())
    return codes, block, global_scale.reciprocal()


def gradient(m, n):
    return torch.randn(m, n, device="cuda").bfloat16()


def product(dy, weight, config):
    return nvfp4_hopper_dx.linear_dx(dy, *weight, config, multiprocessors())


def poison():
    nvfp4_workspace.partial_sums(torch.device("cuda", torch.cuda.current_device()), 1).fill_(float("nan"))
    torch.full((1 << 24,), float("nan"), device="cuda", dtype=torch.bfloat16)  # freed: the next outputs land here


def test_every_form_agrees_with_float64_and_repeats_to_the_bit():
    bad = []
    for n, k in [(72, 256), (640, 1024), (1000, 2304), (5120, 3584), (3584, 18944)]:
        weight = packed(n, k)
        assert nvfp4_hopper_dx.supports(weight[0], weight[1])
        exact = nvfp4.exact_products(weight[0], weight[1], torch.float32).double() * weight[2].double()
        for name, form in FORMS.items():
            for waves, share, groups in ((-1, 4, 1), (0, 4, 4), (0, 1000, 1)):
                config = {**form, "waves": waves, "share": share, "groups": groups}
                errors = []
                for m in (1, form["tokens"] - 3, form["tokens"], 3 * form["tokens"] + 1):
                    dy = gradient(m, n)
                    poison()
                    dx = product(dy, weight, config)
                    expected = dy.double() @ exact
                    error = ((dx.double() - expected).norm() / expected.norm()).item()
                    again = sum(not torch.equal(dx, product(dy, weight, config)) for _ in range(8))
                    errors.append(f"{error:.1e}" + (f" ({again} of 8 differ)" if again else ""))
                    if not error < LIMIT or again:
                        bad.append((n, k, name, waves, share, groups, m, errors[-1]))
                print(f"{n}x{k} {name:10} waves {waves:2} share {share:4} groups {groups}: {errors}", flush=True)
        assert not nvfp4_workspace.flags(weight[0].device, 1).any()
    assert not bad, bad


def test_an_expanded_gradient_is_copied_and_not_read_by_the_copy_engine():
    """The gradient of a sum is one row expanded to M: its row stride is 0, which TMA refuses."""
    weight = packed(1024, 2048)
    row = gradient(1, 1024)
    exact = row.double() @ (nvfp4.exact_products(weight[0], weight[1], torch.float32).double() * weight[2].double())
    for m in (5, 200):
        dx = ops.quantized_linear_dx(row.expand(m, 1024), *weight)
        assert ((dx.double() - exact).norm() / exact.norm()).item() / m**0.5 < LIMIT
        assert torch.equal(dx, dx[:1].expand(m, 2048))


def test_identity_gradients_read_out_every_code_under_every_scale():
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(128, 1)
    block = torch.arange(128, dtype=torch.uint8, device="cuda").clamp(max=126)[:, None].repeat(1, 32)
    weight = codes, block.view(torch.float8_e4m3fn), torch.ones(1, device="cuda")
    expected = nvfp4.exact_products(weight[0], weight[1], torch.float32)
    for name, form in FORMS.items():
        assert torch.equal(product(torch.eye(128, device="cuda").bfloat16(), weight, form).float(), expected), name


@pytest.mark.parametrize("name", ["64", "128"])
def test_a_graph_replays_what_a_call_gives(name):
    weight, dy = packed(5120, 3584), gradient(200, 5120)
    for _ in range(3):
        product(dy, weight, FORMS[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = product(dy, weight, FORMS[name])
    for _ in range(5):
        dy.normal_()
        graph.replay()
        assert torch.equal(dx, product(dy, weight, FORMS[name]))
