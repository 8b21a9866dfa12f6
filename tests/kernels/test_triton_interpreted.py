"""The Triton kernels, run on the CPU by Triton's interpreter: indexing, masks, split sums and bit-exact arithmetic.

The interpreter truncates where a GPU rounds to bfloat16, so outputs in bfloat16 get twice the tolerance here; what must
be exact to the bit is checked in fp32 and fp16. Needs Triton (Linux) with numpy < 2.4.
"""

import pytest

from tests.kernels.interpreted import interpreted


@pytest.fixture(scope="module")
def results():
    return interpreted("interpreted_checks.py")


def test_the_quantizer_writes_the_bytes_of_the_format(results):
    wrong = {name: count for name, count in results.items() if name.startswith("quantize")}
    assert len(wrong) >= 5
    assert set(wrong.values()) == {0}, wrong


def test_every_code_under_every_scale_decodes_exactly(results):
    wrong = {name: count for name, count in results.items() if name.startswith("dequantize")}
    assert len(wrong) == 3
    assert set(wrong.values()) == {0}, wrong


def test_products_agree_with_float64(results):
    errors = {name: e for name, e in results.items() if name.startswith(("decode", "dx"))}
    assert len(errors) == 30
    assert max(errors.values()) < 8e-3, max(errors, key=errors.get)


def test_the_permutation_is_the_documented_one(results):
    assert results["permute"] == 0


def test_fragments_lie_as_documented_and_tickets_are_cleared(results):
    wrong = {name: count for name, count in results.items() if name.startswith("fragments")}
    assert len(wrong) == 3
    assert set(wrong.values()) == {0}, wrong
