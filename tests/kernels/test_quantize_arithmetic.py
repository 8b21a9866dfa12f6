"""The arithmetic of kernels/nvfp4_quantize.py in numpy: that no division is needed to decide as a division would.

The kernel's claims, one test each: two quotients per block are rounded as IEEE divisions; a weight times the
two-number reciprocal lies on the same side of every border of E2M1 as the IEEE quotient, and on it in the same cases.
Powers of two do not matter while nothing underflows, so digits (24 bits) are enough: 8 of block scales, 128 and 1024 of
global scales in bf16 and fp16.
"""

import numpy as np
import pytest
import torch

F32, F64 = np.float32, np.float64
BORDERS = F32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
SIXTH = F32(0.16666667163372039794921875)


def fma(a, b, c):
    """Fused: an inexact sum in fp64 gets an odd last bit, so that the rounding to fp32 is the only one."""
    product, c = F64(a) * F64(b), F64(c) + F64(0) * F64(a)  # the product has 48 bits: exact
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & (bits & 1 == 0), bits + towards, bits).view(F64).astype(F32)


def divide(dividend, divisor, reciprocal):
    q = dividend * reciprocal
    return fma(fma(-q, divisor, dividend), reciprocal, q)


def two_number_reciprocal(step):
    h = F32(1) / step
    error = fma(-step, h, F32(1))
    return h, h * fma(error, error, error)


def quotient(w, reciprocal):
    h, low = reciprocal
    return fma(w, h, fma(w, low, F32(0)))


def disagreements(w, step):
    got, exact = quotient(w, two_number_reciprocal(step)), w / step
    return sum(int(np.sum(np.sign(got - border) != np.sign(exact - border))) for border in BORDERS)


def neighbours(x, ulps):
    """x and the numbers around it, in a last dimension."""
    return (x[..., None].view(np.int32) + np.arange(-ulps, ulps + 1, dtype=np.int32)).view(F32)


def digits(bits):
    """All numbers of [1, 2) with this many significant bits."""
    return F32(1) + np.arange(2 ** (bits - 1), dtype=F32) * F32(2.0 ** (1 - bits))


def test_fused_multiply_add_rounds_once():
    a, b = F32(1 + 2**-12), F32(1 - 2**-12)
    assert fma(a, b, F32(-1)) == F32(-(2**-24))  # a * b rounds to 1
    assert fma(F32(1 + 2**-23), F32(1 + 2**-23), F32(2**-30)) == F32(1 + 2**-22)


def test_a_sixth_is_rounded_as_by_a_division():
    for chunk in np.split(np.arange(2**23, dtype=np.int32) | 0x3F800000, 16):
        amax = chunk.view(F32)
        assert np.array_equal(divide(amax, F32(6), SIXTH), amax / F32(6))


@pytest.mark.parametrize("bits", [8, 11, 24])
def test_block_over_global_is_rounded_as_by_a_division(bits):
    if bits == 24:
        random = np.random.default_rng(0).integers(0, 2**23, 2**18, dtype=np.int32)
        global_scale = np.concatenate([random, np.arange(64), 2**23 - np.arange(1, 64)]).astype(np.int32)
        global_scale = (global_scale | 0x3F800000).view(F32)
    else:
        global_scale = digits(bits)
    for block in digits(4):
        assert np.array_equal(divide(block, global_scale, F32(1) / global_scale), block / global_scale)


def test_rounding_to_e4m3_is_torch_s():
    e4m3 = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    middles = (e4m3[1:] + e4m3[:-1]) / 2
    x = np.concatenate([neighbours(np.concatenate([e4m3[1:], middles]), 3).ravel(), F32([0, 1e-45, 1e-30])])
    x = np.minimum(np.concatenate([x, np.geomspace(1e-5, 448, 2**20, dtype=F32)]), F32(448))
    power = np.maximum((x.view(np.int32) & 0x7F800000).view(F32), F32(2**-6))
    rounded = fma(power, F32(-1.5 * 2**20), fma(power, F32(1.5 * 2**20), x))
    byte = (rounded * F32(2.0**-120)).view(np.int32) >> 20
    assert np.array_equal(byte, torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy())


def test_the_steps_that_the_proof_leaves_open():
    near = np.concatenate([np.arange(centre - 64, centre + 65) for centre in (2**23, 3 * 2**22, 2**24)])
    step = near.astype(F64).astype(F32)[:, None, None]
    w = neighbours(step[..., 0] * BORDERS, 64)
    assert disagreements(w, np.broadcast_to(step, w.shape)) == 0


def test_every_bf16_weight_under_every_step_of_a_bf16_matrix():
    step = (digits(4)[:, None] / digits(8)).ravel()  # 1024, in (0.5, 2)
    w = (digits(8) * 2.0 ** np.arange(-4, 5)[:, None]).astype(F32).ravel()  # quotients from 1/32 to 64
    for sign in (1, -1):
        assert disagreements(sign * w[None, :], step[:, None] + np.zeros_like(w)) == 0


def test_every_fp16_weight_next_to_a_border_under_every_step_of_an_fp16_matrix():
    step = (digits(4)[:, None] / digits(11)).ravel()
    border = (step[:, None] * BORDERS).ravel()
    tick = F32(2.0) ** (np.floor(np.log2(border)) - 10).astype(F32)
    w = (np.floor(border / tick)[:, None] + np.arange(-1, 3, dtype=F32)) * tick[:, None]
    assert disagreements(w, np.repeat(step, len(BORDERS))[:, None] + np.zeros_like(w)) == 0


def test_fp32_weights_next_to_a_border_under_random_steps():
    step = np.random.default_rng(1).uniform(1, 2, 2**15).astype(F32)[:, None, None]
    w = neighbours(step[..., 0] * BORDERS, 4)
    assert disagreements(w, np.broadcast_to(step, w.shape)) == 0


def test_zeros_of_either_sign_lose_it_and_the_smallest_numbers_keep_theirs():
    step = (F32(1) - np.arange(1, 9) * F32(2**-5)).astype(F32)
    reciprocal = two_number_reciprocal(step)
    for zero in (F32(0), F32(-0.0)):
        assert not np.signbit(quotient(np.full_like(step, zero), reciprocal)).any()
    assert (quotient(np.full_like(step, -(2.0**-149)), reciprocal) < 0).all()
