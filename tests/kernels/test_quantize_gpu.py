"""The quantizer on a GPU: the bytes of formats/nvfp4.py on the CPU, for the weights that could tell them apart."""

# ruff: noqa: T201

import pytest
import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import nvfp4_quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BORDERS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def word(w):
    return w.view(torch.int16 if w.dtype.itemsize == 2 else torch.int32)


def wrong(w, name):
    """Wrong codes, wrong block scales and whether the global scale is wrong, against the CPU; printed."""
    expected, got = nvfp4.quantize(w), nvfp4_quantize.quantize(w.cuda())
    codes = int((got[0].cpu() != expected.codes_NK2).sum())
    blocks = int((got[1].view(torch.uint8).cpu() != expected.block_decode_scale_NG.view(torch.uint8)).sum())
    scale = int(got[2].cpu() != expected.global_scale)
    print(f"{name}: {codes} codes, {blocks} block scales, {scale} global scales wrong of {w.numel()} weights")
    return codes + blocks + scale


def random_weights(shape, dtype, magnitude):
    spread = torch.exp(2 * torch.randn(shape[0], 1))
    return (torch.randn(shape) * spread * magnitude).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_weights_of_every_magnitude_and_shape(dtype):
    torch.manual_seed(0)
    total = 0
    for shape in ((1, 16), (3, 48), (129, 16), (300, 1040), (1000, 2304)):
        for magnitude in (1.0, 0.02, 1e-5, 1e-20, 1e-30, 1e-38, 1e3, 1e30):
            w = random_weights(shape, dtype, magnitude)
            w[0, ::3] = -0.0
            if shape[0] > 4:
                w[1] = 0
                w[2] = torch.linspace(-6, 6, shape[1]).to(dtype)
                w[3] *= 1e-4  # block scales that are subnormal or round to zero
                w[4] = (w[4].float() * 1e-38).to(dtype)
                word(w)[5, 1::2] = 1  # the smallest number, negative: the quotient may underflow, which costs the sign
                w[5, 1::2] *= -1
            total += wrong(w, f"{dtype} {shape} {magnitude:g}")
    assert total == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_of_16_bits_under_many_steps(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    total = 0
    # beyond 2^15 * 6 everything is divided, below as well as for tiny weights of bf16
    for largest in (0.0421, 0.7, 1.0, 1.9, 6.0, 2.0**11, 2.0**18, 1e-25, 1e-30, 1e30):
        blocks = []
        for part in torch.linspace(1, 1 / 16, 16):
            top = (part * largest).to(dtype)
            if not bool(top.isfinite()) or top == 0:
                continue
            w = every[every.abs() <= top]
            w = torch.nn.functional.pad(w, (0, -len(w) % 15)).view(-1, 15)
            blocks.append(torch.cat([top.expand(len(w), 1), w], 1))
        if blocks:
            total += wrong(torch.cat(blocks), f"every {dtype} below {largest:g}")
    assert total == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_on_the_borders_between_codes_and_next_to_them(dtype):
    torch.manual_seed(1)
    total = 0
    for magnitude in (0.05, 1.0, 5.9, 100.0, 1e-20):
        largest = (magnitude * (torch.rand(2**14, 1) * 0.9 + 0.1)).to(dtype)
        alone = nvfp4.quantize(torch.nn.functional.pad(largest, (0, 15)))
        step = alone.block_decode_scale_NG.float() / alone.global_scale
        borders = torch.cat([BORDERS, -BORDERS, BORDERS[:1]])
        for ulps in range(-3, 4):
            w = torch.cat([largest, (step * borders).to(dtype)], 1)
            word(w)[:, 1:] += ulps
            w = torch.where((w.abs() <= largest) & w.isfinite(), w, largest)
            total += wrong(w, f"{dtype} {magnitude:g}, borders {ulps:+d} ulp")
    assert total == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    w = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    w[5, 7] = value
    with pytest.raises(nvfp4.FormatError, match="row 5, column 7"):
        nvfp4_quantize.quantize(w)


def test_the_largest_layer_agrees_with_torch_on_the_gpu():
    w = (torch.randn(27648, 5120, device="cuda") * 0.02).bfloat16()
    expected, got = nvfp4.quantize(w), nvfp4_quantize.quantize(w)
    assert torch.equal(got[0], expected.codes_NK2)
    assert torch.equal(got[1].view(torch.uint8), expected.block_decode_scale_NG.view(torch.uint8))
