"""Names are compared with the model's, numbers are looked at one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile import checkpoint_tensors
from qerl_compile.checkpoint_tensors import compare_names, finite_or_raise
from qerl_compile.errors import CheckpointError


def refusal(expected: list[str], found: list[str], **options: list[str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        compare_names(expected, found, where="model", **options)
    return str(caught.value)


def test_equal_names_in_any_order_pass() -> None:
    compare_names(["a", "b"], ["b", "a"], where="model")


def test_a_missing_tensor_is_named_with_the_one_that_was_probably_meant() -> None:
    message = refusal(["layers.0.q_proj.weight"], ["layers.0.q_porj.weight"])
    assert "1 missing: 'layers.0.q_proj.weight' (is it 'layers.0.q_porj.weight'?)" in message


def test_an_extra_tensor_is_named() -> None:
    assert "1 extra: 'zzz'" in refusal(["a"], ["a", "zzz"])


def test_five_names_are_listed_and_the_rest_counted() -> None:
    message = refusal([f"n{i}" for i in range(12)], [])
    assert "'n4' and 7 more" in message and "n5" not in message


def test_an_optional_tensor_may_be_there_or_not() -> None:
    compare_names(["a", "lm_head.weight"], ["a"], where="model", optional=["lm_head.weight"])
    compare_names(["a"], ["a", "lm_head.weight"], where="model", optional=["lm_head.weight"])


def test_an_ignored_tensor_may_be_extra_but_does_not_excuse_a_missing_one() -> None:
    compare_names(["a"], ["a", "inv_freq"], where="model", ignored=["inv_freq"])
    assert "1 missing: 'inv_freq'" in refusal(["a", "inv_freq"], ["a"], ignored=["inv_freq"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_element_is_found_in_every_dtype(dtype: torch.dtype, bad: float) -> None:
    values = torch.zeros(3, 5, dtype=dtype)
    values[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"tensor 'w'.*at \[1, 2\], 1 of 15 elements not finite"):
        finite_or_raise("w", values, "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_bad_element_is_found_at_every_position_whatever_the_vector_width(dtype: torch.dtype) -> None:
    for count in (1, 7, 16, 33, 130):
        for at in range(count):
            for bad in (float("nan"), float("-inf")):
                values = torch.linspace(-3, 3, count).to(dtype)
                values[at] = bad
                with pytest.raises(CheckpointError, match=rf"at \[{at}\], 1 of {count} "):
                    finite_or_raise("w", values, "f")
                with pytest.raises(CheckpointError, match=rf"at \[{at}, 0\], 1 of {count} "):
                    finite_or_raise("w", values.repeat(2, 1).t()[:, :1], "f")  # not contiguous


def test_of_all_256_codes_of_e4m3_only_0x7f_and_0xff_are_not_finite() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite_or_raise("w", codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn), "f")
    with pytest.raises(CheckpointError, match=r"at \[127\], 2 of 256"):
        finite_or_raise("w", codes.view(torch.float8_e4m3fn), "f")


def test_the_first_bad_element_is_told_and_all_are_counted_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensors, "_CHUNK_ELEMENTS", 4)
    values = torch.zeros(2, 6)
    values[0, 5] = values[1, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"at \[0, 5\], 2 of 12"):
        finite_or_raise("w", values, "f")


@pytest.mark.parametrize("values", [torch.tensor(1.0), torch.zeros(0, 3), torch.full((2,), 255, dtype=torch.uint8)])
def test_scalars_empty_tensors_and_integers_pass(values: torch.Tensor) -> None:
    assert finite_or_raise("w", values, "f") is values


def test_the_largest_finite_numbers_pass() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=torch.float64).to(dtype)
        finite_or_raise("w", largest, "f")


@given(st.sets(st.sampled_from("abcdefgh")), st.sets(st.sampled_from("abcdefgh")))
def test_names_pass_exactly_if_the_sets_are_equal(expected: set[str], found: set[str]) -> None:
    if expected == found:
        compare_names(expected, found, where="model")
    else:
        assert "missing" in (message := refusal(sorted(expected), sorted(found))) or "extra" in message
