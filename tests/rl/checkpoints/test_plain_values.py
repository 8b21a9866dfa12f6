"""Values come back with their types and every bit; whatever has no such form is refused, with where it is."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.rl.checkpoints.plain_values import pack, unpack
from tests.rl.checkpoints.world import same

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=10,
)


def back(value):
    packed, tensors = pack(value, "value")
    return unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors, "value")


@given(VALUES)
def test_every_value_comes_back(value):
    assert same(back(value), value)


def test_the_form_is_as_the_essay_says():
    packed, tensors = pack({0: {"step": torch.tensor(3.0)}, "betas": (0.9, math.inf)}, "value")
    assert packed == {
        "dict": [[0, {"dict": [["step", {"tensor": "t0"}]]}], ["betas", {"tuple": [0.9, {"float": "inf"}]}]]
    }
    assert list(tensors) == ["t0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_tensors_come_back_through_a_file(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    whole = torch.arange(12).to(dtype).reshape(3, 4)
    value = [whole, whole, whole[1], whole.T, torch.tensor(1).to(dtype), torch.empty(0, dtype=dtype)]
    packed, tensors = pack(value, "value")
    save_file(tensors, tmp_path / "x.safetensors")  # which refuses tensors that share memory
    assert same(unpack(packed, load_file(tmp_path / "x.safetensors"), "x"), [each.contiguous() for each in value])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": [object()]}, r"value\['a'\]\[0\]: .* got object"),
        ({(1, 2): 3}, "value: .* got dict"),
        ({True: 3}, "value: .* got dict"),
        (b"x", "got bytes"),
    ],
)
def test_what_has_no_form_is_refused_with_its_place(value, match):
    with pytest.raises(ExportError, match=match):
        pack(value, "value")


def test_a_value_without_end_is_refused():
    value = []
    value.append(value)
    with pytest.raises(ExportError, match="at most 32 levels of nesting"):
        pack(value, "value")
    deepest = 0
    for _ in range(32):
        deepest = {"x": (deepest,)} if isinstance(deepest, int) else [deepest]
    assert same(back(deepest[0]), deepest[0])


def test_a_tensor_that_is_used_twice_or_never_is_refused():
    tensor = torch.zeros(1)
    with pytest.raises(CheckpointError):
        unpack([{"tensor": "t0"}, {"tensor": "t0"}], {"t0": tensor}, "x")
    with pytest.raises(CheckpointError, match="a use of every tensor; got none of 't1'"):
        unpack([{"tensor": "t0"}], {"t0": tensor, "t1": tensor}, "x")
