"""Scale search: literal cases, brute force over all 126 scales, and what holds for any weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import FormatError
from qerl_compile.formats.e2m1 import VALUES
from qerl_compile.formats.nvfp4 import BLOCK, dequantize, quantize_group, unpack
from qerl_compile.formats.scale_search import search_group
from tests.formats.test_nvfp4_properties import weights

METHODS = ("mse", "four_over_six")


def block_errors(w_NK, packed, importance_K=None):
    """Weighted squared error of every block in float64, by the decode formula and nothing else: [N, G]."""
    step = packed.block_decode_scale_NG.double() / packed.global_scale.double()
    values = torch.tensor(VALUES, dtype=torch.float64)[unpack(packed.codes_NK2).int()]
    error = (values * step.repeat_interleave(BLOCK, dim=1) - w_NK.double()).square()
    if importance_K is not None:
        error = error * importance_K.double()
    return error.view(w_NK.shape[0], -1, BLOCK).sum(-1)


def least_errors(w_NK, global_scale, importance_K=None):
    """The smallest error of every block over all positive E4M3 scales, each weight going to its nearest value."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    points = torch.tensor(sorted(set(VALUES)), dtype=torch.float64)
    grid = scales[:, None] / global_scale.double() * points  # [126, 15]
    blocks = w_NK.double().view(w_NK.shape[0], -1, 1, BLOCK, 1)
    nearest = (blocks - grid[:, None, :]).abs().amin(-1).square()  # [N, G, 126, B]
    if importance_K is not None:
        nearest = nearest * importance_K.double().view(-1, 1, BLOCK)
    return nearest.sum(-1).amin(-1)


def test_a_block_whose_largest_weights_are_better_on_four():
    # On 6, the step is 1 and 5 lies in the widest gap; with 6 on 4 the step is 1.5: 6 = 4 steps, 4.5 = 3, 3 = 2.
    w_NK = torch.tensor([[6.0] + [4.5] * 15 + [6.0] + [4.0] * 15, [48.0] + [0.0] * 31])
    packed = search_group({"w": w_NK}, "four_over_six")["w"]
    assert packed.global_scale.item() == 1536 / 48
    assert packed.block_decode_scale_NG.float()[0].tolist() == [48.0, 32.0]
    assert unpack(packed.codes_NK2)[0, :2].tolist() == [6, 5]  # 4 and 3
    assert unpack(packed.codes_NK2)[0, 16:18].tolist() == [7, 6]  # 6 and 4


def test_the_largest_weight_of_the_matrix_may_land_on_four_in_four_over_six():
    w_NK = torch.tensor([[6.0] + [4.5] * 15])
    packed = search_group({"w": w_NK}, "four_over_six")["w"]
    assert packed.block_decode_scale_NG.float().item() == 384.0
    assert torch.equal(dequantize(packed, torch.float32), w_NK)


def test_the_largest_weight_may_be_clipped_for_the_good_of_the_others():
    w_NK = torch.tensor([[1.1] + [1.0] * 15, [6.0] * 16])
    packed = search_group({"w": w_NK}, "mse")["w"]
    assert (dequantize(packed, torch.float32)[0, 1:] - 1).abs().max() < 0.01
    plain = quantize_group({"w": w_NK})["w"]
    assert block_errors(w_NK, packed)[0, 0] < block_errors(w_NK, plain)[0, 0] / 5


@given(weights(), st.booleans())
def test_mse_finds_the_best_of_all_scales(w_NK, weighted):
    generator = torch.Generator().manual_seed(w_NK.shape[1])
    importance = torch.rand(w_NK.shape[1], generator=generator).square() + 1e-3 if weighted else None
    packed = search_group({"w": w_NK}, "mse", importance=None if importance is None else {"w": importance})["w"]
    assert torch.equal(packed.global_scale, quantize_group({"w": w_NK})["w"].global_scale)
    found, least = block_errors(w_NK, packed, importance), least_errors(w_NK, packed.global_scale, importance)
    slack = 1e-5 * w_NK.double().view(*found.shape, BLOCK).square().sum(-1)  # fp32 cannot tell nearer scales apart
    assert (found <= least + slack * (1 if importance is None else importance.max())).all()


@given(weights())
def test_no_block_is_worse_than_with_the_scale_of_its_largest_weight(w_NK):
    found, plain = search_group({"w": w_NK}, "mse")["w"], quantize_group({"w": w_NK})["w"]
    slack = 1e-6 * w_NK.double().view(w_NK.shape[0], -1, BLOCK).square().sum(-1)
    assert (block_errors(w_NK, found) <= block_errors(w_NK, plain) + slack).all()


@given(weights())
def test_four_over_six_keeps_the_better_of_its_two(w_NK):
    packed = search_group({"w": w_NK}, "four_over_six")["w"]
    step = packed.block_decode_scale_NG.float() / packed.global_scale
    amax = w_NK.float().view(*step.shape, BLOCK).abs().amax(-1)
    lands_on = amax / step
    normal = packed.block_decode_scale_NG.float() >= 2**-6
    near = ((lands_on - 6).abs() < 0.5) | ((lands_on - 4).abs() < 0.4)
    assert near[normal & (amax > 0)].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-8, 1e37])
def test_zeros_and_extreme_sizes_decode_to_finite_numbers(method, dtype, size):
    w_NK = (torch.linspace(-1, 1, 64).view(2, 32) * size).to(dtype)
    w_NK[1, 16:] = 0
    packed = search_group({"w": w_NK}, method)["w"]
    decoded = dequantize(packed, torch.float32)
    assert decoded.isfinite().all()
    assert torch.equal(decoded[1, 16:], torch.zeros(16))
    if size > 1e-30:
        assert (decoded - w_NK.float()).abs().max() <= size / 6


def test_a_zero_matrix_has_the_bytes_of_plain_quantization():
    w_NK = torch.zeros(3, 32, dtype=torch.bfloat16)
    found, plain = search_group({"w": w_NK}, "mse")["w"], quantize_group({"w": w_NK})["w"]
    assert torch.equal(found.block_decode_scale_NG.view(torch.uint8), plain.block_decode_scale_NG.view(torch.uint8))
    assert torch.equal(found.global_scale, plain.global_scale)
    assert not found.codes_NK2.any()


def test_weights_that_are_exact_already_keep_their_bytes():
    step = torch.tensor([0.5, 2.0, 448.0]).repeat_interleave(BLOCK)
    w_NK = torch.tensor(VALUES).repeat(1, 3) * step
    found, plain = search_group({"w": w_NK}, "mse")["w"], quantize_group({"w": w_NK})["w"]
    assert torch.equal(found.codes_NK2, plain.codes_NK2)
    assert torch.equal(found.block_decode_scale_NG.view(torch.uint8), plain.block_decode_scale_NG.view(torch.uint8))


@pytest.mark.parametrize("method", METHODS)
def test_members_of_a_group_share_one_matrix_scale(method):
    small, large = torch.full((2, 16), 0.5), torch.full((3, 16), 4.0)
    packed = search_group({"small": small, "large": large}, method)
    assert list(packed) == ["small", "large"]
    assert torch.equal(packed["small"].global_scale, packed["large"].global_scale)


def test_amax_is_plain_quantization():
    w_NK = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(search_group({"w": w_NK}, "amax")["w"].codes_NK2, quantize_group({"w": w_NK})["w"].codes_NK2)
    assert search_group({}, "mse") == {}


def test_an_important_column_is_rounded_better():
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(200, 16, generator=generator)
    importance = torch.ones(16)
    importance[3] = 1000
    found = search_group({"w": w_NK}, "mse", importance={"w": importance})["w"]
    plain = search_group({"w": w_NK}, "mse")["w"]
    errors = [(dequantize(packed, torch.float32) - w_NK)[:, 3].square().sum() for packed in (found, plain)]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize(
    "bad", [torch.ones(15), torch.zeros(16), torch.full((16,), float("inf"))], ids=["short", "zero", "inf"]
)
def test_a_useless_importance_is_refused(bad):
    with pytest.raises(FormatError, match="importance of w"):
        search_group({"w": torch.ones(2, 16)}, "mse", importance={"w": bad})


def test_chunks_of_rows_do_not_change_a_byte(monkeypatch):
    w_NK = torch.randn(37, 64, generator=torch.Generator().manual_seed(1))
    whole = search_group({"w": w_NK}, "mse")["w"]
    monkeypatch.setattr("qerl_compile.formats.nvfp4.CPU_CHUNK_ELEMENTS", 5 * 64)
    cut = search_group({"w": w_NK}, "mse")["w"]
    assert torch.equal(whole.codes_NK2, cut.codes_NK2)
    assert torch.equal(whole.block_decode_scale_NG.view(torch.uint8), cut.block_decode_scale_NG.view(torch.uint8))
