"""What the report says of healthy and of strange directories, and that its statistics are the plain definition."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qerl_compile
from qerl_compile.checkup import inspect_checkpoint
from qerl_compile.checkup.against import sqnr_db
from qerl_compile.checkup.findings import Fault
from qerl_compile.checkup.numbers import numbers_of
from qerl_compile.errors import CheckpointError
from qerl_compile.formats.nvfp4 import dequantize, quantize
from tests.checkup.making import DOWN, damaged, dense, valid
from tests.models import FAMILIES, tiny_model

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(bits: int) -> float:
    """Sign-less E4M3 by its definition."""
    exponent, mantissa = int(bits) >> 3, int(bits) & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_the_statistics_are_those_of_their_definitions():
    torch.manual_seed(0)
    w_NK = torch.randn(7, 48) * torch.logspace(-7, 0, 7)[:, None]
    w_NK[0] = 0
    packed = quantize(w_NK)
    bits = packed.block_decode_scale_NG.view(torch.uint8)
    got = numbers_of(packed.codes_NK2, bits, packed.decode_scale.item())
    codes = np.stack([packed.codes_NK2.numpy() & 15, packed.codes_NK2.numpy() >> 4], -1).reshape(7, 48)
    scales = np.vectorize(e4m3)(bits.numpy())
    share = np.bincount(codes.ravel(), minlength=16) / codes.size
    assert got.amax == pytest.approx(dequantize(packed, torch.float32).abs().max().item())
    assert got.block_max == scales.max()
    assert got.block_min == scales.min()
    assert got.zero_blocks == np.mean((codes.reshape(7, 3, 16) & 7 == 0).all(-1))
    assert got.zero_blocks >= 1 / 7
    assert got.subnormal == np.mean((bits.numpy() > 0) & (bits.numpy() < 8))
    assert got.subnormal > 0
    assert got.saturated == pytest.approx(share[[7, 15]].sum())
    assert got.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in share if p))
    assert got.zero_scales == 0


def test_marlin_flushes_nothing_where_it_can_lift_the_scales_first():
    codes = torch.full((1, 16), 0x77, dtype=torch.uint8)
    together = numbers_of(codes, torch.tensor([[4, 5]], dtype=torch.uint8), 1.0)
    far_apart = numbers_of(codes, torch.tensor([[4, 0x7E]], dtype=torch.uint8), 1.0)
    assert (together.subnormal, together.flushed) == (1.0, 0.0)
    assert (far_apart.subnormal, far_apart.flushed) == (0.5, 0.5)


def test_signal_to_noise_is_that_of_the_decoded_weight():
    torch.manual_seed(1)
    w_NK = torch.randn(24, 64)
    packed = quantize(w_NK)
    error = dequantize(packed, torch.float32) - w_NK
    want = 10 * math.log10(w_NK.square().sum().item() / error.square().sum().item())
    bits = packed.block_decode_scale_NG.view(torch.uint8)
    assert sqnr_db(w_NK, packed.codes_NK2, bits, packed.decode_scale.item()) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_healthy_with_biases_norms_and_tied_heads(family, tmp_path):
    model = qerl_compile.transform(tiny_model(family, dtype=torch.bfloat16), "nvfp4-lora", inner="eager")
    qerl_compile.export(model, tmp_path / "out", target="vllm")
    report = inspect_checkpoint(tmp_path / "out")
    assert report.faults == ()
    assert len(report.packed) == 14
    assert report.format == "compressed-tensors NVFP4A16"
    assert 4.5 < report.bits_per_weight < 4.53  # 4.5, and the scalar of small matrices


def test_formats_are_told_apart():
    formats = {kind: inspect_checkpoint(valid(kind)).format for kind in ("compressed-w4a4", "modelopt", "qerl")}
    assert formats == {
        "compressed-w4a4": "compressed-tensors NVFP4",
        "modelopt": "ModelOpt W4A16_NVFP4",
        "qerl": "qerl-nvfp4 NVFP4A16",
    }
    plain = inspect_checkpoint(dense())
    assert (plain.format, plain.packed, plain.faults) == ("dense", (), ())


def test_a_checkpoint_of_torchao_is_read_with_its_swizzled_scales(tmp_path):
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = TorchAoConfig(NVFP4WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    report = inspect_checkpoint(tmp_path / "out", against=tmp_path / "base")
    assert report.faults == ()
    assert report.format == "torchao NVFP4Tensor"
    assert len(report.packed) == 14
    assert all(19 < layer.sqnr_db < 22 for layer in report.packed)  # in the wrong order of blocks it would be below 15


def test_a_scalar_that_is_wrong_either_way_up_is_implausible(tmp_path):
    def enlarge(tensors):
        tensors[f"{DOWN}.weight_global_scale"] = torch.tensor([1e-30])

    report = inspect_checkpoint(damaged("compressed", tmp_path / "bad", enlarge))
    assert [fault.code for fault in report.faults] == ["scale-implausible"]


def test_modelopt_without_its_second_config_is_a_warning(tmp_path):
    bad = damaged("modelopt", tmp_path / "bad")
    (bad / "hf_quant_config.json").unlink()
    report = inspect_checkpoint(bad)
    assert [(fault.code, fault.severity) for fault in report.faults] == [("second-config-missing", "warning")]


def test_modelopt_with_its_second_config_alone_is_recognised(tmp_path):
    bad = damaged("modelopt", tmp_path / "bad", config=lambda config: config.pop("quantization_config"))
    report = inspect_checkpoint(bad)
    assert report.faults == ()
    assert report.format == "ModelOpt W4A16_NVFP4"


def test_an_unknown_model_is_inspected_without_its_skeleton(tmp_path):
    report = inspect_checkpoint(damaged("compressed", tmp_path / "odd", config=lambda c: c.update(model_type="odd")))
    assert report.faults == ()
    assert len(report.packed) == 14
    assert any("not that of a causal LM" in note for note in report.notes)


def test_a_config_that_promises_a_million_layers_builds_none(tmp_path):
    bad = damaged("compressed", tmp_path / "deep", config=lambda c: c.update(num_hidden_layers=10**6))
    assert any("promises 1000000 layers" in note for note in inspect_checkpoint(bad).notes)


def test_other_quantizations_are_named_and_left_alone(tmp_path):
    out = tmp_path / "gptq"
    shutil.copytree(dense(), out)
    config = json.loads((out / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (out / "config.json").write_text(json.dumps(config))
    report = inspect_checkpoint(out)
    assert (report.format, report.faults) == ("gptq, no NVFP4", ())


def test_a_damaged_file_raises_as_it_does_everywhere(tmp_path):
    bad = damaged("compressed", tmp_path / "bad")
    file = bad / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect_checkpoint(bad)


def test_sharded_files_are_one_checkpoint(tmp_path):
    out = tmp_path / "sharded"
    shutil.copytree(valid("compressed"), out)
    held = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(held)  # modules are torn apart: codes in one shard, scales in the other
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, own in parts.items():
        save_file({name: held[name] for name in own}, out / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, own in parts.items() for name in own}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = inspect_checkpoint(out, against=dense())
    assert (report.faults, report.shard_count, len(report.packed)) == ((), 2, 14)


def test_an_unknown_code_is_no_fault():
    with pytest.raises(KeyError):
        _ = Fault("typo", "", "").severity
