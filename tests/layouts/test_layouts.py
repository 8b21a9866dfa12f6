"""Checkpoints of four writers: decoded as numpy decodes them, trained on, and kept as they were, to the bit."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qerl_compile.formats.nvfp4 import dequantize
from qerl_compile.layouts.torchao import swizzled_shape, unswizzle
from qerl_compile.loading import load
from qerl_compile.passes.quantize import packed_of
from tests.layouts import writers
from tests.layouts.independent import decoded, raw_tensors

NAMES = ("NVFP4A16", "NVFP4", "ModelOpt W4A16_NVFP4", "ModelOpt NVFP4", "torchao")
FOUR_BIT_INPUTS = ("NVFP4", "ModelOpt NVFP4")
LAYER = "model.layers.0"
LINEARS = {f"{LAYER}.self_attn.{p}_proj" for p in "qkvo"} | {f"{LAYER}.mlp.{p}_proj" for p in ("gate", "up", "down")}
TOKENS_BT = torch.arange(18).reshape(2, 9)


def opened(directory: Path, recipe=None, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*activations in 4 bits")
        return load(directory, recipe, inner="eager", device="cpu", **options)


def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS_BT, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_an_independent_decoder_and_near_the_dense_ones(name, written, dense):
    model, weights, originals = opened(written(name)), decoded(written(name)), load_file(dense / "model.safetensors")
    assert set(weights) == set(model.qerl.plan.quantize) == LINEARS
    for path, expected in weights.items():
        np.testing.assert_array_equal(dequantized(model, path), expected)
        original = originals[f"{path}.weight"].float().numpy()
        assert 0.05 < np.linalg.norm(original - expected) / np.linalg.norm(original) < 0.12


@pytest.mark.parametrize("name", ["NVFP4", "ModelOpt NVFP4", "torchao"])
def test_logits_are_those_of_the_decoded_weights_and_an_adapter_is_trained_on_them(name, written, dense):
    model = opened(written(name), {"lora": [{"match": ".*_proj", "rank": 4, "alpha": 8.0}]}, dtype=torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for path, weight in decoded(written(name)).items():
        oracle.get_submodule(path).weight.data = torch.from_numpy(weight)
    before = logits(model)
    torch.testing.assert_close(before, logits(oracle), rtol=1e-5, atol=1e-5)

    frozen = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" not in key}
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    before.logsumexp(-1).mean().backward()
    assert len(trained) == 2 * len(LINEARS)
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    assert all(parameter.grad.abs().sum() > 0 for key, parameter in trained.items() if key.endswith("lora_B"))
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(as_bytes(after[key]), as_bytes(tensor)) for key, tensor in frozen.items())
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "torchao"])
def test_every_tensor_of_the_file_is_kept_bit_for_bit(name, written):
    state, file = opened(written(name)).state_dict(), load_file(written(name) / "model.safetensors")
    for key, stored in file.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and f"{path}.weight_scale_2" in file:
            key = f"{path}.weight_packed"
        elif leaf in ("k_scale", "v_scale"):  # ModelOpt has them on the projections; BF16 becomes float32
            key, stored = f"{LAYER}.self_attn.{leaf}", stored.float()
        kept = state.pop(key)
        assert kept.dtype == stored.dtype
        assert torch.equal(as_bytes(kept.reshape(stored.shape)), as_bytes(stored)), key
    assert not state


def test_torchaos_codes_and_scalar_are_kept_and_its_block_scales_are_put_in_rows(written):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    model = opened(written("torchao"))
    file = load_file(written("torchao") / "model.safetensors")
    for path in LINEARS:
        packed = packed_of(model.get_submodule(path))
        assert packed is not None
        assert packed.direction == "multiplier"
        qdata, stored, multiplier = (file[f"{path}._weight_{part}"] for part in ("qdata", "scale", "per_tensor_scale"))
        assert torch.equal(packed.codes_NK2, qdata)
        assert torch.equal(packed.global_scale, multiplier.reshape(1))
        theirs = NVFP4Tensor(qdata, stored, 16, torch.float32, multiplier, is_swizzled_scales=True)
        # They multiply scale and multiplier first, we the code and the scale: up to two roundings in float32.
        torch.testing.assert_close(
            dequantize(packed, torch.float32), theirs.dequantize(torch.float32), rtol=3e-7, atol=0
        )


def test_torchaos_scales_differ_inside_q_k_v_so_they_are_multiplied_one_by_one(written):
    assert opened(written("torchao")).qerl.plan.groups == ()
    assert len(opened(written("ModelOpt NVFP4")).qerl.plan.groups) == 2


@pytest.mark.parametrize("rows, blocks", [(1, 1), (33, 4), (128, 5), (300, 9)])
def test_unswizzling_undoes_torchaos_swizzle(rows, blocks):
    from torchao.prototype.mx_formats.utils import to_blocked

    plain = torch.randint(0, 127, (rows, blocks), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    stored = to_blocked(plain).reshape(swizzled_shape(rows, blocks))
    assert torch.equal(unswizzle(stored, rows, blocks), plain)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_made_for_four_bit_activations_says_that_they_stay_in_sixteen(name, written):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(written(name), inner="eager", device="cpu")
    said = [str(each.message) for each in caught if "activations in 4 bits" in str(each.message)]
    assert len(said) == (name in FOUR_BIT_INPUTS)
    assert all(str(written(name)) in each for each in said)


@pytest.mark.parametrize("name, leaf", [("NVFP4", "input_global_scale"), ("ModelOpt NVFP4", "input_scale")])
def test_calibrated_scales_are_kept_on_the_linear_and_on_the_attention(name, leaf, written):
    layer = opened(written(name)).get_submodule(LAYER)
    amax = 2688 / layer.mlp.up_proj.get_buffer(leaf) if name == "NVFP4" else 2688 * layer.mlp.up_proj.get_buffer(leaf)
    torch.testing.assert_close(amax, torch.tensor([writers.INPUT_AMAX]))
    for side, amax in (("k_scale", writers.K_AMAX), ("v_scale", writers.V_AMAX)):
        kept = layer.self_attn.get_buffer(side)
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept, torch.tensor([amax / 448]), rtol=2**-8, atol=0)


@pytest.mark.parametrize("described", ["nested", "beside"])
def test_modelopts_other_places_of_its_description_say_the_same(described, written, dense, tmp_path):
    out = writers.write_modelopt(dense, tmp_path / "out", inputs=True, cache=True, described=described)
    assert as_dict(opened(out)) == as_dict(opened(written("ModelOpt NVFP4")))


def test_scalars_may_have_no_dimension_and_sixteen_bits(copied, written):
    directory = copied("NVFP4A16")

    def respell(tensors):  # these divisors were rounded to bf16 by their writer
        for key in [key for key in tensors if key.endswith("global_scale")]:
            tensors[key] = tensors[key].to(torch.bfloat16).reshape(())

    assert as_dict(opened(writers.edit_tensors(directory, respell))) == as_dict(opened(written("NVFP4A16")))


def test_our_own_method_is_read_like_compressed_tensors(copied, written):
    directory = copied("NVFP4A16")
    config = quantization_config(directory)
    writers.edit_config(directory, quantization_config={**config, "quant_method": "qerl-nvfp4", "format_version": 1})
    assert as_dict(opened(directory)) == as_dict(opened(written("NVFP4A16")))


def test_unequal_scalars_inside_a_group_decode_each_with_its_own(copied):
    directory = copied("ModelOpt W4A16_NVFP4")
    writers.edit_tensors(directory, lambda tensors: tensors[f"{LAYER}.mlp.up_proj.weight_scale_2"].mul_(2))
    model, weights = opened(directory, dtype=torch.float32), decoded(directory)
    assert model.qerl.plan.groups == ((*(f"{LAYER}.self_attn.{p}_proj" for p in "qkv"),),)
    for leaf in ("gate_proj", "up_proj"):
        np.testing.assert_array_equal(dequantized(model, f"{LAYER}.mlp.{leaf}"), weights[f"{LAYER}.mlp.{leaf}"])


def test_awq_without_scales_of_its_own_is_nvfp4(copied, written):
    directory = copied("ModelOpt NVFP4")
    writers.edit_config(directory, quantization_config={**quantization_config(directory), "quant_algo": "NVFP4_AWQ"})
    assert as_dict(opened(directory)) == as_dict(opened(written("ModelOpt NVFP4")))


def test_mixed_precision_is_read_if_every_layer_is_nvfp4(copied, written):
    directory = copied("ModelOpt W4A16_NVFP4")
    layers = {path: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for path in sorted(LINEARS)}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    writers.edit_config(directory, quantization_config=config)
    assert as_dict(opened(directory)) == as_dict(opened(written("ModelOpt W4A16_NVFP4")))


def test_scales_of_a_cache_that_is_not_fp8_are_left_out_and_that_is_said(copied):
    directory = copied("ModelOpt NVFP4")
    scheme = {"dynamic": False, "num_bits": 4, "type": "float"}
    config = {**quantization_config(directory), "kv_cache_scheme": scheme}
    writers.edit_config(directory, quantization_config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(directory, inner="eager", device="cpu")
    assert sum("not FP8's and are left out" in str(each.message) for each in caught) == 1
    assert not [key for key in model.state_dict() if key.endswith(("k_scale", "v_scale"))]


def test_the_writers_of_this_test_name_tensors_as_the_format_says(written):
    tensors, _ = raw_tensors(written("ModelOpt NVFP4") / "model.safetensors")
    down = {key.rpartition(".")[2]: (str(t.dtype), t.shape) for key, t in tensors.items() if "down_proj" in key}
    assert down == {
        "weight": ("uint8", (80, 72)),
        "weight_scale": ("uint8", (80, 9)),
        "weight_scale_2": ("float32", ()),
        "input_scale": ("float32", ()),
    }


def dequantized(model, path: str) -> np.ndarray:
    packed = packed_of(model.get_submodule(path))
    assert packed is not None
    return dequantize(packed, torch.float32).numpy()


def quantization_config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def as_dict(model) -> dict[str, bytes]:
    return {key: as_bytes(tensor).numpy().tobytes() for key, tensor in model.state_dict().items()}
