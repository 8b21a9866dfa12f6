"""What holds for NVFP4 of any weight: found by hypothesis, not by example."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qerl_compile.formats import nvfp4
from qerl_compile.formats.nvfp4 import BLOCK, dequantize, exact_products, quantize, unpack

SMALLEST_NORMAL_E4M3 = 2.0**-6


@st.composite
def weights(draw, dtypes=(torch.bfloat16, torch.float16, torch.float32)) -> torch.Tensor:
    """Rows and blocks of very different size, some zero; magnitudes that leave the global scale finite in fp16."""
    n_rows, n_blocks = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1.0, 4.0, 12.0]))
    blocks = torch.randn(n_rows, n_blocks, BLOCK, generator=generator)
    blocks *= torch.exp2(-spread * torch.rand(n_rows, n_blocks, 1, generator=generator))
    blocks *= torch.rand(n_rows, n_blocks, 1, generator=generator) > draw(st.sampled_from([0.0, 0.3]))
    blocks[0, 0, 0] = draw(st.sampled_from([1.0, -3.0, 100.0]))
    return blocks.flatten(1).to(draw(st.sampled_from(dtypes)))


def step_of(packed: nvfp4.PackedNVFP4) -> torch.Tensor:
    """Distance that one unit of E2M1 stands for, per column: fp32 [N, K]."""
    step_NG = packed.block_decode_scale_NG.float() * packed.decode_scale
    return step_NG.repeat_interleave(BLOCK, dim=1)


@given(weights())
def test_the_error_is_at_most_half_a_gap_of_the_code_table(w_NK):
    packed = quantize(w_NK)
    step = step_of(packed)
    in_steps = w_NK.float().abs() / step
    # Gaps of the table are 1/2 up to 2, 1 up to 4, 2 up to 6. Above 6 the block scale was rounded down by at most 1/16
    # (normal E4M3) or by half a subnormal, and the number is clamped: at most 9 - 6 = 3 steps.
    half_gap = torch.where(in_steps <= 2, 0.25, torch.where(in_steps <= 4, 0.5, torch.where(in_steps <= 6.5, 1.0, 3.1)))
    error = (dequantize(packed, torch.float32) - w_NK.float()).abs()
    assert (error <= half_gap * step * (1 + 1e-5)).all()


@given(weights())
def test_a_block_with_a_normal_scale_is_within_a_sixth_of_its_largest_weight(w_NK):
    packed = quantize(w_NK)
    block_amax_NG = w_NK.float().view(w_NK.shape[0], -1, BLOCK).abs().amax(-1)
    error = (dequantize(packed, torch.float32) - w_NK.float()).abs().view(w_NK.shape[0], -1, BLOCK).amax(-1)
    normal = packed.block_decode_scale_NG.float() >= SMALLEST_NORMAL_E4M3
    nonzero = block_amax_NG > 0
    # Half of the widest gap is one step, and a step is amax/6 up to the rounding of E4M3 (1/16) and bf16 (2^-8).
    assert (error <= block_amax_NG / 6 * 1.075)[normal & nonzero].all()


@given(weights())
def test_order_within_a_block_is_kept(w_NK):
    decoded = dequantize(quantize(w_NK), torch.float32).view(w_NK.shape[0], -1, BLOCK)
    order = w_NK.float().view_as(decoded).argsort(dim=-1)
    assert (decoded.gather(-1, order).diff(dim=-1) >= 0).all()


@given(weights())
def test_signs_are_kept(w_NK):
    decoded = dequantize(quantize(w_NK), torch.float32)
    assert (decoded * w_NK.float() >= 0).all()
    assert torch.equal(torch.signbit(decoded), w_NK < 0)


@given(weights(dtypes=(torch.float32,)))
def test_quantizing_decoded_weights_again_changes_no_byte_of_a_normal_block(w_NK):
    once = quantize(w_NK)
    again = quantize(dequantize(once, torch.float32))
    normal_NG = once.block_decode_scale_NG.float() >= SMALLEST_NORMAL_E4M3
    torch.testing.assert_close(again.global_scale, once.global_scale, rtol=1e-6, atol=0)
    assert torch.equal(
        again.block_decode_scale_NG.view(torch.uint8)[normal_NG],
        once.block_decode_scale_NG.view(torch.uint8)[normal_NG],
    )
    normal_NK = normal_NG.repeat_interleave(BLOCK, dim=1)
    # -0 decodes to -0.0, which is an exact zero the second time: compare without the sign of zero.
    before, after = (unpack(packed.codes_NK2).where(unpack(packed.codes_NK2) != 8, 0) for packed in (once, again))
    assert torch.equal(after[normal_NK], before[normal_NK])


@given(weights(), st.integers(-20, 20))
def test_a_power_of_two_moves_only_the_global_scale(w_NK, exponent):
    w_NK = w_NK.float()
    plain, scaled = quantize(w_NK), quantize(w_NK * 2.0**exponent)
    assert torch.equal(scaled.codes_NK2, plain.codes_NK2)
    assert torch.equal(scaled.block_decode_scale_NG.view(torch.uint8), plain.block_decode_scale_NG.view(torch.uint8))
    assert torch.equal(scaled.global_scale, plain.global_scale * 2.0**-exponent)


@given(weights())
def test_negating_a_weight_flips_only_signs(w_NK):
    plain, negated = quantize(w_NK), quantize(-w_NK)
    flipped = unpack(plain.codes_NK2) ^ (8 * (w_NK != 0)).to(torch.uint8)
    assert torch.equal(unpack(negated.codes_NK2), flipped)
    assert torch.equal(negated.block_decode_scale_NG.view(torch.uint8), plain.block_decode_scale_NG.view(torch.uint8))


class LargestTemporary(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operator returns, and all dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_bytes = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.largest_bytes = max(self.largest_bytes, result.numel() * result.itemsize)
            self.dtypes.add(result.dtype)
        return result


def _packed_parts(packed):
    return packed.codes_NK2, packed.block_decode_scale_NG


def test_no_temporary_is_larger_than_a_chunk_and_no_index_wider_than_32_bits():
    w_NK = torch.randn(1024, 2048).bfloat16()  # eight chunks
    chunk_bytes = 4 * nvfp4.CPU_CHUNK_ELEMENTS
    exact_products(*_packed_parts(quantize(w_NK[:1])), torch.bfloat16)  # the 256-entry table is built once a process
    with LargestTemporary() as quantizing:
        packed = quantize(w_NK)
    assert quantizing.largest_bytes == max(chunk_bytes, packed.codes_NK2.numel())
    with LargestTemporary() as decoding:
        products_NK = exact_products(packed.codes_NK2, packed.block_decode_scale_NG, torch.bfloat16)
    assert decoding.largest_bytes == products_NK.numel() * products_NK.itemsize
    assert torch.int64 not in quantizing.dtypes | decoding.dtypes


@pytest.mark.parametrize("chunk_elements", [1, 100, 4096, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_do_not_depend_on_how_rows_are_chunked(monkeypatch, chunk_elements, dtype):
    w_NK = torch.randn(37, 96, generator=torch.Generator().manual_seed(4)).to(dtype)
    whole = quantize(w_NK)
    whole_decoded = dequantize(whole, dtype)
    monkeypatch.setattr(nvfp4, "CPU_CHUNK_ELEMENTS", chunk_elements)
    chunked = quantize(w_NK)
    assert torch.equal(chunked.codes_NK2, whole.codes_NK2)
    assert torch.equal(chunked.block_decode_scale_NG.view(torch.uint8), whole.block_decode_scale_NG.view(torch.uint8))
    assert torch.equal(chunked.global_scale, whole.global_scale)
    assert torch.equal(dequantize(whole, dtype), whole_decoded)
