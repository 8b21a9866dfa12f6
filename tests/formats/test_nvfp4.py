"""NVFP4 bytes of small weights worked out by hand, its special cases, and every refusal."""

import dataclasses

import pytest
import torch

from qerl_compile.errors import FormatError
from qerl_compile.formats import nvfp4
from qerl_compile.formats.nvfp4 import PackedNVFP4, check_weight, dequantize, exact_products, quantize, quantize_group

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
F8 = torch.float8_e4m3fn


def bytes_of(packed: PackedNVFP4) -> tuple[list, list, float]:
    blocks = packed.block_decode_scale_NG.view(torch.uint8)
    return packed.codes_NK2.tolist(), blocks.tolist(), packed.global_scale.item()


# Largest magnitude 6, so that 2688/6 = 448 is the global scale and 1.0 the step of the first block.
FIRST_BLOCK = [6, 5, 4, 3.5, 3, 2.5, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0, -0.25]
# Largest magnitude 0.75 = 6/8: the step is 1/8 and the block scale 448/8 = 56 (byte 0x66).
SECOND_BLOCK = [-0.75] + [-0.0] * 13 + [0.01, -0.01]


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_blocks_worked_out_by_hand(dtype):
    w_NK = torch.tensor([FIRST_BLOCK, SECOND_BLOCK, [0.0] * 16], dtype=dtype)
    codes, block_bytes, global_scale = bytes_of(quantize(w_NK))
    assert codes[0] == [0x67, 0x66, 0x45, 0x44, 0x23, 0x22, 0x01, 0x80]  # 5 -> 4, 3.5 -> 4, 2.5 -> 2, -0.25 -> -0
    assert codes[1] == [0x0F, 0, 0, 0, 0, 0, 0, 0x80]  # -0.0 -> 0, but -0.01 -> -0
    assert codes[2] == [0] * 8
    assert block_bytes == [[0x7E], [0x66], [0x20]]  # 448, 56, and 0.125 for the block of zeros
    assert global_scale == 448.0


def test_the_global_scale_is_rounded_twice_in_bf16_and_once_per_operation_in_fp32():
    # 2688/0.55 is 4887.3; in bf16, 0.55 is 0.55078125, 1/0.55078125 rounds to 1.8125, and 1.8125 * 2688 = 4872 to 4864.
    w_NK = torch.full((1, 16), 0.55)
    assert quantize(w_NK.bfloat16()).global_scale.item() == 4864.0
    assert quantize(w_NK).global_scale.item() == pytest.approx(2688 / 0.55, rel=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_matrix_has_global_scale_one_and_decodes_to_zero(dtype):
    packed = quantize(torch.zeros(3, 32, dtype=dtype))
    assert bytes_of(packed) == ([[0] * 16] * 3, [[0x20, 0x20]] * 3, 1.0)
    assert torch.equal(dequantize(packed, dtype), torch.zeros(3, 32, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_block_decodes_to_zero(dtype):
    w_NK = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    w_NK[1, 16:32] = 0
    packed = quantize(w_NK)
    assert packed.block_decode_scale_NG.view(torch.uint8)[1, 1] == 0x20
    assert dequantize(packed, dtype)[1, 16:32].count_nonzero() == 0


def test_a_block_too_small_for_any_e4m3_scale_becomes_zero_with_scale_an_eighth():
    w_NK = torch.zeros(1, 32)
    w_NK[0, 0], w_NK[0, 16] = 1.0, -1e-7  # 2688 * 1e-7 / 6 = 4.5e-5 is below half of the smallest E4M3, 2^-10
    packed = quantize(w_NK)
    assert packed.block_decode_scale_NG.view(torch.uint8).tolist() == [[0x7E, 0x20]]
    assert packed.codes_NK2[0, 8] == 0x08  # the sign survives


def test_a_block_can_have_a_subnormal_scale():
    w_NK = torch.zeros(1, 32)
    w_NK[0, 0], w_NK[0, 16] = 1.0, 2.0**-17
    packed = quantize(w_NK)
    # 2688 * 2^-17 / 6 = 0.00342 = 1.75 * 2^-9, between subnormals 1 and 2: rounds to 2, byte 0x02.
    assert packed.block_decode_scale_NG.view(torch.uint8).tolist() == [[0x7E, 0x02]]
    assert dequantize(packed, torch.float32)[0, 16].item() == pytest.approx(6 * 2 * 2**-9 / 2688)


@pytest.mark.parametrize(
    ("value", "dtype", "global_scale"),
    [
        (1e-45, torch.float32, 1.0),
        (1e-36, torch.bfloat16, 1.0),
        (6e-8, torch.float16, 1.0),
        (3e38, torch.float32, 8.96e-36),
    ],
)
def test_tiny_and_huge_weights_have_a_finite_global_scale(value, dtype, global_scale):
    w_NK = torch.full((1, 16), value, dtype=dtype)
    packed = quantize(w_NK)
    assert packed.global_scale.item() == pytest.approx(global_scale)
    decoded = dequantize(packed, torch.float32)
    assert decoded.isfinite().all()
    if global_scale != 1.0:
        torch.testing.assert_close(decoded, w_NK.float(), rtol=1e-6, atol=0)


def test_one_outlier_leaves_its_own_block_exact_and_keeps_the_others():
    w_NK = torch.full((1, 64), 0.02)
    w_NK[0, 5] = 40.0
    decoded = dequantize(quantize(w_NK), torch.float32)
    assert decoded[0, 5].item() == pytest.approx(40.0, rel=1e-6)
    assert decoded[0, :16].count_nonzero() == 1
    torch.testing.assert_close(decoded[0, 16:], w_NK[0, 16:], rtol=0.07, atol=0)


def test_dequantize_rounds_once_to_the_asked_dtype():
    packed = quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))
    exact = exact_products(packed.codes_NK2, packed.block_decode_scale_NG, torch.float32)
    for dtype in DTYPES:
        assert torch.equal(dequantize(packed, dtype), (exact * packed.decode_scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_products_are_exact_for_every_code_and_every_scale(dtype):
    block_bytes = torch.arange(0x7F, dtype=torch.uint8)  # all non-negative E4M3 numbers
    block_decode_scale_NG = block_bytes.view(F8)[:, None]
    codes_NK2 = nvfp4.pack(torch.arange(16, dtype=torch.uint8).repeat(0x7F, 1))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    products = exact_products(codes_NK2, block_decode_scale_NG, dtype)
    assert products.dtype == dtype
    assert torch.equal(products.double(), values * block_decode_scale_NG.double())


def test_decode_scale_multiplies_in_both_directions():
    codes, block = torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1).to(F8)
    divisor = PackedNVFP4(codes, block, torch.tensor([448.0]), "divisor")
    multiplier = PackedNVFP4(codes, block, torch.tensor([0.25]), "multiplier")
    assert divisor.decode_scale.shape == multiplier.decode_scale.shape == ()
    assert divisor.decode_scale.item() == torch.tensor(1 / 448.0).item()
    assert multiplier.decode_scale.item() == 0.25


def test_a_group_shares_the_largest_amax_and_equals_quantizing_with_it():
    generator = torch.Generator().manual_seed(2)
    weights = {f"{p}_proj": torch.randn(n, 64, generator=generator) * n for p, n in [("q", 32), ("k", 8), ("v", 8)]}
    group = quantize_group(weights)
    amax = torch.stack([w.abs().amax() for w in weights.values()]).amax()
    assert list(group) == list(weights)
    assert len({packed.global_scale.item() for packed in group.values()}) == 1
    for name, w_NK in weights.items():
        assert bytes_of(group[name]) == bytes_of(quantize(w_NK, amax=amax))
    assert bytes_of(group["k_proj"]) != bytes_of(quantize(weights["k_proj"]))


def test_an_empty_group_is_empty():
    assert quantize_group({}) == {}


def test_quantize_neither_modifies_its_input_nor_tracks_gradients():
    w_NK = torch.nn.Parameter(torch.randn(2, 32))
    before = w_NK.detach().clone()
    packed = quantize(w_NK)
    assert torch.equal(w_NK, before)
    assert not packed.global_scale.requires_grad
    assert not dequantize(packed, torch.float32).requires_grad


def test_a_strided_weight_quantizes_like_its_contiguous_copy():
    w_NK = torch.randn(32, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert bytes_of(quantize(w_NK.t().contiguous().t())) == bytes_of(quantize(w_NK))
    assert bytes_of(quantize(w_NK[::2, 16:])) == bytes_of(quantize(w_NK[::2, 16:].clone()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_refused_by_name_and_place(bad, dtype):
    w_NK = torch.ones(4, 32, dtype=dtype)
    w_NK[2, 17] = bad
    with pytest.raises(FormatError, match=r"layers\.0\.q_proj.*1 NaN or Inf.*row 2, column 17.*Repair"):
        quantize(w_NK, name="layers.0.q_proj")
    with pytest.raises(FormatError, match=r"layers\.0\.q_proj.*row 2, column 17"):
        check_weight(w_NK, "layers.0.q_proj")
    with pytest.raises(FormatError, match=r"k_proj.*row 2, column 17"):
        quantize_group({"q_proj": torch.ones(4, 32, dtype=dtype), "k_proj": w_NK})


@pytest.mark.parametrize(
    ("w_NK", "message"),
    [
        (torch.ones(4, 24), r"w1: expected K \(input features\) a multiple of 16; got K = 24\."),
        (torch.ones(16), r"w1: expected a non-empty matrix \[N, K\]; got shape \[16\]\."),
        (torch.ones(2, 4, 16), r"w1: expected a non-empty matrix .* got shape \[2, 4, 16\]"),
        (torch.ones(0, 16), r"w1: expected a non-empty matrix .* got shape \[0, 16\]"),
        (torch.ones(4, 16, dtype=torch.int8), r"w1: expected a bfloat16, float16 or float32 weight; got torch\.int8"),
        (torch.ones(4, 16, dtype=torch.float64), r"w1: expected .* got torch\.float64"),
        (torch.ones(4, 16).to(F8), r"w1: expected .* got torch\.float8_e4m3fn"),
    ],
)
def test_a_weight_of_the_wrong_form_is_refused(w_NK, message):
    with pytest.raises(FormatError, match=message):
        quantize(w_NK, name="w1")
    with pytest.raises(FormatError, match=message):
        check_weight(w_NK, "w1")


@pytest.mark.parametrize("amax", [0.5, float("nan")])
def test_an_amax_below_the_weights_own_is_refused(amax):
    with pytest.raises(FormatError, match=r"w1: expected amax at least as large as the weight's own 2; got"):
        quantize(torch.full((1, 16), 2.0), amax=torch.tensor(amax), name="w1")


def test_a_good_weight_passes_the_check_unchanged():
    w_NK = torch.randn(2, 32)
    before = w_NK.clone()
    check_weight(w_NK)
    assert torch.equal(w_NK, before)


def test_a_group_of_mixed_dtypes_is_refused():
    with pytest.raises(FormatError, match=r"q, k: expected one dtype .* got torch\.float32, torch\.bfloat16"):
        quantize_group({"q": torch.ones(1, 16), "k": torch.ones(1, 16, dtype=torch.bfloat16)})


GOOD = PackedNVFP4(torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 2).to(F8), torch.ones(1), "divisor")
NEGATIVE_ZERO = torch.tensor([[0x80, 0x38]] * 4, dtype=torch.uint8).view(F8)
NAN_SCALE = torch.tensor([[0x38, 0x7F]] * 4, dtype=torch.uint8).view(F8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes_NK2": torch.zeros(4, 16, dtype=torch.int8)}, r"codes_NK2: expected uint8 .* got int8 \[4, 16\]"),
        ({"codes_NK2": torch.zeros(64, dtype=torch.uint8)}, r"codes_NK2: expected uint8 .* got uint8 \[64\]"),
        ({"codes_NK2": torch.zeros(4, 12, dtype=torch.uint8)}, r"codes_NK2: .* multiple of 16; got uint8 \[4, 12\]"),
        ({"codes_NK2": torch.zeros(0, 16, dtype=torch.uint8)}, r"codes_NK2: .* N >= 1.* got uint8 \[0, 16\]"),
        ({"block_decode_scale_NG": torch.ones(4, 2)}, r"float8_e4m3fn \[N, K/16\] = \[4, 2\]; got float32 \[4, 2\]"),
        ({"block_decode_scale_NG": torch.ones(2, 4).to(F8)}, r"= \[4, 2\]; got float8_e4m3fn \[2, 4\]"),
        ({"block_decode_scale_NG": NEGATIVE_ZERO}, r"block_decode_scale_NG: expected no NaN, no sign.* got byte 0x80"),
        ({"block_decode_scale_NG": NAN_SCALE}, r"block_decode_scale_NG: expected no NaN, no sign.* got byte 0x7F"),
        ({"global_scale": torch.ones(())}, r"global_scale: expected float32 \[1\]; got float32 \[\]"),
        ({"global_scale": torch.ones(1).bfloat16()}, r"global_scale: expected float32 \[1\]; got bfloat16"),
        ({"global_scale": torch.zeros(1)}, r"global_scale: expected a finite and positive number; got 0\.0"),
        ({"global_scale": torch.tensor([-1.0])}, r"finite and positive number; got -1\.0"),
        ({"global_scale": torch.tensor([float("nan")])}, r"finite and positive number; got nan"),
        ({"global_scale": torch.tensor([float("inf")])}, r"finite and positive number; got inf"),
        ({"direction": "times"}, r'direction: expected "divisor" or "multiplier"; got \'times\''),
        ({"global_scale": torch.ones(1, device="meta")}, r"expected all three tensors on one device; got cpu, meta"),
    ],
)
def test_a_packed_weight_that_breaks_its_invariants_is_refused(changed, message):
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(GOOD, **changed)


def test_a_packed_weight_on_meta_is_checked_for_form_only():
    parts = (GOOD.codes_NK2, GOOD.block_decode_scale_NG, GOOD.global_scale)
    assert PackedNVFP4(*(part.to("meta") for part in parts), "divisor").shape == (4, 32)
