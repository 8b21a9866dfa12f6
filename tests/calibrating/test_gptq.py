"""GPTQ against the textbook: columns eliminated one by one from the inverse Hessian, in float64."""

import pytest
import torch

from qerl_compile.calibrating.gptq import gptq_group
from qerl_compile.formats.e2m1 import VALUES
from qerl_compile.formats.nvfp4 import BLOCK, dequantize, quantize_group, unpack
from qerl_compile.formats.scale_search import search_group
from qerl_compile.passes.sparsify import mask_2_4


def inputs(columns, tokens=400, seed=0):
    """Correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.rand(columns, generator=generator).exp2()


def weight(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def output_error(packed, w_NK, x_MK):
    return float(((dequantize(packed, torch.float32) - w_NK).double() @ x_MK.double().T).square().sum())


def textbook(w_NK, step_NK, hessian, kept=None):
    """Optimal brain quantization in the order of the Hessian's diagonal, by elimination (the paper's eq. 2 and 3)."""
    w, step, hessian = w_NK.double().clone(), step_NK.double(), hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    values = torch.tensor(VALUES, dtype=torch.float64)
    decoded = torch.empty_like(w)
    for j in (hessian.diagonal()).argsort(descending=True, stable=True).tolist():
        nearest = (w[:, j, None] / step[:, j, None] - values).abs().argmin(-1)
        decoded[:, j] = values[nearest] * step[:, j]
        if kept is not None:
            decoded[:, j] *= kept[:, j]
        error = (w[:, j] - decoded[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return decoded


@pytest.mark.parametrize("columns", [48, 192])
def test_codes_are_those_of_the_textbook(columns):
    x_MK, w_NK = inputs(columns), weight(12, columns)
    scaled = quantize_group({"w": w_NK})
    hessian = x_MK.T @ x_MK
    packed = gptq_group({"w": w_NK}, scaled, hessian)["w"]
    step = (scaled["w"].block_decode_scale_NG.float() * scaled["w"].decode_scale).repeat_interleave(BLOCK, 1)
    expected = textbook(w_NK, step, hessian)
    # One tie broken otherwise in float32 changes the rest of its row.
    rows_alike = (dequantize(packed, torch.float32) - expected.float()).abs().amax(-1) < 1e-4
    assert rows_alike.float().mean() > 0.8


@pytest.mark.parametrize("scales", ["amax", "mse", "four_over_six"])
def test_outputs_are_nearer_than_with_nearest_rounding(scales):
    x_MK, w_NK = inputs(96), weight(64, 96)
    nearest = search_group({"w": w_NK}, scales)
    packed = gptq_group({"w": w_NK}, nearest, x_MK.T @ x_MK)["w"]
    assert output_error(packed, w_NK, x_MK) < 0.7 * output_error(nearest["w"], w_NK, x_MK)


def test_scales_stay_and_members_of_a_group_are_rounded_as_if_alone():
    x_MK = inputs(64)
    weights = {"a": weight(5, 64), "b": weight(9, 64, seed=2)}
    scaled = quantize_group(weights)
    together = gptq_group(weights, scaled, x_MK.T @ x_MK)
    for name, packed in together.items():
        alone = gptq_group({name: weights[name]}, {name: scaled[name]}, x_MK.T @ x_MK)[name]
        assert torch.equal(packed.codes_NK2, alone.codes_NK2)
        assert packed.block_decode_scale_NG is scaled[name].block_decode_scale_NG
        assert packed.global_scale is scaled[name].global_scale


def test_with_uncorrelated_inputs_it_is_nearest_rounding():
    w_NK = weight(8, 64)
    scaled = quantize_group({"w": w_NK})
    packed = gptq_group({"w": w_NK}, scaled, torch.diag(torch.arange(1.0, 65.0)))["w"]
    assert torch.equal(dequantize(packed, torch.float32), dequantize(scaled["w"], torch.float32))


def test_inputs_that_are_always_zero_round_to_nearest_and_disturb_none():
    x_MK, w_NK = inputs(64), weight(8, 64)
    x_MK[:, 10] = 0
    scaled = quantize_group({"w": w_NK})
    packed = gptq_group({"w": w_NK}, scaled, x_MK.T @ x_MK)["w"]
    assert torch.equal(unpack(packed.codes_NK2)[:, 10], unpack(scaled["w"].codes_NK2)[:, 10])


def test_a_hessian_of_a_single_token_is_damped_until_it_can_be_factored():
    x_MK, w_NK = inputs(64)[:1], weight(8, 64)
    packed = gptq_group({"w": w_NK}, quantize_group({"w": w_NK}), x_MK.T @ x_MK)["w"]
    assert dequantize(packed, torch.float32).isfinite().all()


def test_masked_weights_become_zero_and_the_others_make_up_for_them():
    x_MK, w_NK = inputs(96), weight(16, 96)
    kept = mask_2_4(w_NK)
    masked = quantize_group({"w": w_NK * kept})
    packed = gptq_group({"w": w_NK}, masked, x_MK.T @ x_MK, {"w": kept})["w"]
    codes = unpack(packed.codes_NK2)
    assert not codes[~kept].any()
    assert output_error(packed, w_NK, x_MK) < 0.9 * output_error(masked["w"], w_NK, x_MK)
