"""The paged Triton kernels, run on the CPU by Triton's interpreter: indexing, masks, splits, what is written where.

Needs Triton (Linux) with numpy < 2.4.
"""

import pytest

from tests.kernels.interpreted import interpreted
from tests.models import LONG


@pytest.fixture(scope="module")
def results():
    return interpreted("paged_interpreted_checks.py")


@pytest.mark.parametrize(("dtype", "limit", "count"), [("float32", 2e-6, 24), ("float16", 1e-3, 12)][: 1 + LONG])
def test_every_split_and_window_agrees_with_float64_and_writes_one_position(results, dtype, limit, count):
    errors = {name: value for name, value in results.items() if name.startswith(f"decode torch.{dtype}")}
    assert len(errors) == count
    assert max(errors.values()) < limit, max(errors, key=errors.get)


@pytest.mark.parametrize(("dtype", "limit", "count"), [("float32", 2e-6, 10), ("float16", 1e-3, 9)][: 1 + LONG])
def test_bias_and_rotary_embedding_come_before_attention_and_before_the_page(results, dtype, limit, count):
    errors = {name: value for name, value in results.items() if name.startswith(f"before torch.{dtype}")}
    assert len(errors) == count
    assert max(errors.values()) < limit, max(errors, key=errors.get)


def test_write_fills_the_live_positions_alone(results):
    assert {name: value for name, value in results.items() if name.startswith("write")} == {
        "write D64 page16": 0,
        "write D80 page64": 0,
        "write D16 page7": 0,
    }
