"""The adapter's first product on the CPU, by Triton's interpreter: indexing, masks, slices, what is left in tickets.

Needs Triton (Linux) with numpy < 2.4.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.kernels import lora_down
from tests.kernels.interpreted import interpreted
from tests.models import LONG


@pytest.fixture(scope="module")
def results():
    return interpreted("lora_down_interpreted_checks.py")


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-3), ("float32", 1e-6)][: 1 + LONG])
def test_every_form_agrees_with_float64_and_leaves_its_tickets_at_zero(results, dtype, limit):
    errors = {name: value for name, value in results.items() if name.startswith(f"torch.{dtype}")}
    assert len(errors) == 29
    assert not any(math.isnan(value) for value in errors.values())
    assert max(errors.values()) < limit, max(errors, key=lambda name: errors[name])


def test_one_launch_makes_h_and_orders_x_and_clears_only_the_counters(results):
    errors = {name: value for name, value in results.items() if name.startswith("lead-in")}
    assert len(errors) == 16
    assert not any(math.isnan(value) for value in errors.values())
    assert max(errors.values()) < 1e-3, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "r", "k"), [(0, 16, 64), (3, 5, 24), (300, 16, 64)])
def test_what_the_kernel_does_not_take_goes_to_torch(dtype, m, r, k):
    x, a = torch.randn(m, k).to(dtype), torch.randn(r, k).to(dtype)
    assert torch.equal(lora_down.lora_down(x, a), torch.nn.functional.linear(x, a))


@given(m=st.integers(1, 256), rank=st.integers(1, 16), k=st.integers(1, 2000))
def test_config_is_a_form_that_the_kernel_has(m, rank, k):
    form = lora_down.config(m, 16 * k)
    for name in ("BM", "BR", "KS", "num_warps"):
        assert form[name] & (form[name] - 1) == 0
    # a group of dots is a warp's; a capture has 4096 tickets
    assert form["GROUPS"] in (0, 1, form["num_warps"])
    assert form["KS"] >= 16 * form["GROUPS"]
    assert form["BM"] < 2 * max(m, 16)
    tiles = -(-m // form["BM"]) * -(-16 * rank // form["BR"])
    assert tiles <= 4096
