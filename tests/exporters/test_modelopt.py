"""The ModelOpt export: the same weights as the compressed-tensors one, under NVIDIA's names, and decoded by others."""

import json

import numpy as np
import pytest
import torch
from oracle_llmcompressor import TINY
from oracle_llmcompressor import tiny_model as oracle_model
from safetensors.torch import load_file

from qerl_compile.errors import ExportError
from qerl_compile.exporters import export
from qerl_compile.exporters.compressed_tensors import export_compressed_tensors
from qerl_compile.exporters.modelopt import export_modelopt
from qerl_compile.exporters.schemas import check_schema
from qerl_compile.formats.nvfp4 import PackedNVFP4

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def tensors_of(directory):
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def packed_paths(model):
    return [path for path, module in model.named_modules() if "weight_packed" in module._parameters]


def decoded(codes, block_scales, multiplier):
    """NVFP4 by its definition, in numpy: nothing of ours."""
    codes = codes.numpy()
    values = E2M1[np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)]
    return values * np.repeat(block_scales.float().numpy(), 16, axis=1) * np.float32(multiplier)


def calibrate(model, *, kv=False, multiplier=False):
    """Give every packed linear an input scale that its partners share, and every attention those of its cache."""
    for index, path in enumerate(packed_paths(model)):
        parent, _, name = path.rpartition(".")
        amax = 3.0 + 0.37 * ({"q": 1, "k": 1, "v": 1, "g": 2, "u": 2}.get(name[0], 10 + index) + len(parent))
        module = model.get_submodule(path)
        if multiplier:
            module.register_buffer("input_scale", torch.tensor([amax / 2688]))
        else:
            module.register_buffer("input_global_scale", torch.tensor([2688 / amax]))
    for path, module in list(model.named_modules()) if kv else ():
        if path.endswith("self_attn"):
            module.register_buffer("k_scale", torch.tensor([0.0123]))
            module.register_buffer("v_scale", torch.tensor([0.0456]))


def as_multipliers(model, value=None):
    """Turn the packed state into what a model read from ModelOpt has."""
    for path in packed_paths(model):
        module = model.get_submodule(path)
        scalar = module.weight_global_scale.reciprocal() if value is None else torch.tensor([value])
        del module._buffers["weight_global_scale"]
        module.register_buffer("weight_scale_2", scalar)


@pytest.fixture(params=sorted(TINY))
def both(request, state, tmp_path):
    """One model of each family, in both formats."""
    model = oracle_model(request.param)
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "ct")
    export_modelopt(model, tmp_path / "modelopt")
    return model, tmp_path / "ct", tmp_path / "modelopt"


def test_both_formats_hold_the_same_bytes_and_decode_to_the_same_numbers(both):
    model, ct, modelopt = (both[0], *(tensors_of(directory) for directory in both[1:]))
    for path in packed_paths(model):
        codes, scales, multiplier = (
            modelopt.pop(f"{path}.{leaf}") for leaf in ("weight", "weight_scale", "weight_scale_2")
        )
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        their_codes, their_scales, divisor = (ct.pop(f"{path}.{leaf}") for leaf in names)
        assert (codes.dtype, scales.dtype, multiplier.dtype) == (torch.uint8, torch.float8_e4m3fn, torch.float32)
        assert multiplier.shape == ()
        assert divisor.shape == (1,)
        assert torch.equal(codes, their_codes)
        assert torch.equal(scales.view(torch.uint8), their_scales.view(torch.uint8))
        w_NK = decoded(codes, scales, multiplier.numpy())
        assert np.array_equal(w_NK, decoded(their_codes, their_scales, np.float32(1) / divisor.numpy()[0]))
    assert modelopt.keys() == ct.keys()
    assert all(torch.equal(modelopt[name], tensor) for name, tensor in ct.items())


def test_the_converter_of_compressed_tensors_turns_one_export_into_the_other(both):
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter

    excluded = json.loads((both[2] / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    converter = ModelOptNvfp4Converter(ignore=excluded, targets=[r"re:.*_proj$"])
    converted, ours = converter.validate(tensors_of(both[2])), tensors_of(both[1])
    assert converted.keys() == ours.keys()
    for name, tensor in ours.items():
        if name.endswith("global_scale"):
            torch.testing.assert_close(converted[name].reshape(1), tensor, rtol=2e-7, atol=0)  # inverted twice
        else:
            assert torch.equal(converted[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_matrix_of_zeros_is_written_so_that_readers_which_refuse_nan_and_zero_take_it(state, tmp_path):
    model = oracle_model("odd")
    state.pack(model)
    export_modelopt(model, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    path = "model.layers.0.self_attn.o_proj"
    assert not tensors[f"{path}.weight"].any()
    assert tensors[f"{path}.weight_scale_2"] == 1
    assert (tensors[f"{path}.weight_scale"].view(torch.uint8) == 0x20).all()
    assert not any(
        (tensor.view(torch.uint8) & 0x7F == 0x7F).any()
        for name, tensor in tensors.items()
        if name.endswith("weight_scale")
    )
    assert all(tensor > 0 for name, tensor in tensors.items() if name.endswith("weight_scale_2"))


def test_both_configs_say_what_modelopt_writes(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    calibrate(model)
    export(model, tmp_path / "a4", target="tensorrt-llm", activations="4")
    export(model, tmp_path / "a16", target="tensorrt-llm")
    # verbatim from nvidia-modelopt 0.47 (design/formats.md, section 2.3)
    inner = {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"}
    flat = {
        "config_groups": {"group_0": {"input_activations": inner, "targets": ["Linear"], "weights": inner}},
        "ignore": ["lm_head", "model.embed_tokens"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_algo": "NVFP4",
        "quant_method": "modelopt",
    }
    nested = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.embed_tokens"],
        },
    }
    config = json.loads((tmp_path / "a4/config.json").read_text())
    assert config["quantization_config"] == flat
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "a4/hf_quant_config.json").read_text()) == nested
    del flat["config_groups"]["group_0"]["input_activations"]
    flat["quant_algo"] = nested["quantization"]["quant_algo"] = "W4A16_NVFP4"
    assert json.loads((tmp_path / "a16/config.json").read_text())["quantization_config"] == flat
    assert json.loads((tmp_path / "a16/hf_quant_config.json").read_text()) == nested


@pytest.mark.parametrize("multiplier", [False, True])
def test_four_bit_activations_bring_the_input_scales_in_each_formats_direction(multiplier, state, tmp_path):
    model = state.tiny_model("qwen2")
    state.pack(model)
    calibrate(model, multiplier=multiplier)
    export(model, tmp_path / "ct", target="vllm", activations="4")
    export(model, tmp_path / "modelopt", target="vllm", format="modelopt", activations="4")
    ct, modelopt = tensors_of(tmp_path / "ct"), tensors_of(tmp_path / "modelopt")
    for path in packed_paths(model):
        own = model.get_submodule(path)._buffers["input_scale" if multiplier else "input_global_scale"]
        divisor, scale = ct[f"{path}.input_global_scale"], modelopt[f"{path}.input_scale"]
        assert torch.equal(divisor, own.reciprocal() if multiplier else own)
        assert torch.equal(scale, (own if multiplier else own.reciprocal())[0])
    group = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    # as llm-compressor 0.14 writes it (design/formats.md, section 1.3), but for keys that are null there
    theirs = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group"}
    theirs |= {"dynamic": "local", "scale_dtype": "torch.float8_e4m3fn", "observer": "static_minmax"}
    assert group["input_activations"] == theirs


def test_sixteen_bit_activations_are_the_default_and_leave_the_input_scales_out(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    calibrate(model, kv=True)
    export(model, tmp_path / "ct", target="vllm")
    export(model, tmp_path / "modelopt", target="tensorrt-llm")
    for directory in (tmp_path / "ct", tmp_path / "modelopt"):
        assert not [name for name in tensors_of(directory) if "input" in name.rpartition(".")[2] or "k_scale" in name]


def test_transformers_decodes_the_w4a4_export_to_our_weights(state, input_ids_BT, tmp_path):
    from transformers import AutoModelForCausalLM

    model = state.tiny_model("qwen2")
    dense = state.pack(model)
    calibrate(model)
    export(model, tmp_path / "out", target="vllm", activations="4")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info.values())
    with torch.no_grad():
        assert loaded.eval()(input_ids=input_ids_BT).logits.isfinite().all()  # the first call decodes the weights
    for path in packed_paths(model):
        assert torch.equal(loaded.get_submodule(path).weight, dense.get_submodule(path).weight)


@pytest.mark.parametrize("tied", [False, True])
def test_scales_of_an_fp8_cache_go_where_each_format_looks_for_them(tied, state, tmp_path):
    model = state.tiny_model("llama", tied=tied)
    state.pack(model)
    calibrate(model, kv=True)
    export(model, tmp_path / "ct", target="sglang", kv_cache="8")
    export(model, tmp_path / "modelopt", target="tensorrt-llm", kv_cache="8", activations="4")
    ct, modelopt = tensors_of(tmp_path / "ct"), tensors_of(tmp_path / "modelopt")
    for layer in (0, 1):
        path = f"model.layers.{layer}.self_attn"
        assert torch.equal(ct[f"{path}.k_scale"], torch.tensor([0.0123], dtype=torch.bfloat16))
        assert torch.equal(ct[f"{path}.v_scale"], torch.tensor([0.0456], dtype=torch.bfloat16))
        assert torch.equal(modelopt[f"{path}.k_proj.k_scale"], torch.tensor(0.0123))
        assert torch.equal(modelopt[f"{path}.v_proj.v_scale"], torch.tensor(0.0456))
    scheme = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert {key: scheme[key] for key in wanted} == wanted
    flat = json.loads((tmp_path / "modelopt/config.json").read_text())["quantization_config"]
    assert flat["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    nested = json.loads((tmp_path / "modelopt/hf_quant_config.json").read_text())
    assert nested["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_a_scalar_goes_back_to_the_format_it_came_from_bit_for_bit(state, tmp_path):
    value = torch.tensor([0.00035333834239281714])
    assert not torch.equal(value.reciprocal().reciprocal(), value)  # or a double reciprocal would pass
    model = state.tiny_model("llama")
    state.pack(model)
    as_multipliers(model, value.item())
    export(model, tmp_path / "ct", target="vllm")
    export(model, tmp_path / "modelopt", target="vllm", format="modelopt")
    ct, modelopt = tensors_of(tmp_path / "ct"), tensors_of(tmp_path / "modelopt")
    for path in packed_paths(model):
        assert torch.equal(modelopt[f"{path}.weight_scale_2"], value[0])
        assert torch.equal(ct[f"{path}.weight_global_scale"], value.reciprocal())
        assert f"{path}.weight_scale_2" not in ct


def test_a_model_from_either_dialect_gives_the_same_logits_in_transformers(state, input_ids_BT, tmp_path):
    from transformers import AutoModelForCausalLM

    model = state.tiny_model("qwen2", tied=True)
    state.pack(model)
    export(model, tmp_path / "before", target="vllm")
    as_multipliers(model)
    export(model, tmp_path / "after", target="vllm")
    logits = []
    for directory in (tmp_path / "before", tmp_path / "after"):
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        with torch.no_grad():
            logits.append(loaded(input_ids=input_ids_BT).logits)
    assert torch.equal(*logits)


def test_the_target_transformers_writes_the_same_tensors_under_our_method(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    export(model, tmp_path / "ct", target="vllm")
    export(model, tmp_path / "ours", target="transformers")
    assert (tmp_path / "ct/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()
    ct, ours = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in ("ct", "ours")
    )
    assert ours == {**ct, "quant_method": "qerl-nvfp4", "format_version": 1}


def uncalibrate(model):
    del model.model.layers[1].mlp.down_proj.input_global_scale


def quarrel(model):
    model.model.layers[0].self_attn.k_proj.input_global_scale.mul_(2)


def no_v_scale(model):
    del model.model.layers[1].self_attn.v_scale


def no_attention_scale(model):
    del model.model.layers[1].self_attn.k_scale, model.model.layers[1].self_attn.v_scale


def tiny_multiplier(model):
    as_multipliers(model, 1e-42)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            uncalibrate,
            r"layers\.1\.mlp\.down_proj: expected a calibrated input scale .* got none on 1 of 14.* Calibrate it",
        ),
        (quarrel, r"layers\.0\.self_attn: expected one input scale for linears that engines fuse; got .*k_proj"),
        (no_v_scale, r"layers\.1\.self_attn\.v_scale: expected a positive float32 .* got 0\.0"),
        (no_attention_scale, r"layers\.1\.self_attn: expected calibrated k_scale and v_scale .* got none on 1 of 2"),
        (tiny_multiplier, r"layers\.0\.self_attn\.q_proj: global scale: expected a positive float32 whose reciprocal"),
    ],
)
@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm"])
def test_scales_that_are_missing_or_disagree_are_refused_before_anything_is_written(
    damage, message, target, state, tmp_path
):
    model = state.tiny_model("llama")
    state.pack(model)
    calibrate(model, kv=True)
    with torch.no_grad():
        damage(model)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "out", target=target, activations="4", kv_cache="8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "vllm", "format": "gguf"}, r"format: expected 'compressed-tensors' or 'modelopt'; got 'gguf'"),
        ({"target": "tensorrt-llm", "format": "modelopt"}, r"'tensorrt-llm': expected its options .*; got format"),
        ({"target": "peft", "activations": "4"}, r"'peft': expected its options \(none\); got activations"),
        ({"target": "vllm", "activations": "8"}, r"activations: expected '16' or '4'; got '8'"),
        ({"target": "vllm==0.1"}, r"'vllm==0\.1': expected a version of vllm .*: 0\.33\.0; got '0\.1'"),
        ({"target": "vllm", "activations": "4"}, r"q_proj: expected a calibrated input scale .* got none on 14 of 14"),
        ({"target": "vllm", "kv_cache": "8"}, r"expected calibrated k_scale and v_scale .* got none on 2 of 2"),
    ],
)
def test_options_that_a_target_does_not_have_are_refused(options, message, state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_linear_and_its_card_are_described(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    down = model.model.layers[1].mlp.down_proj
    shape = down.weight.shape
    del down.weight_packed, down.weight_scale, down.weight_global_scale, down.weight
    down.weight = torch.nn.Parameter(torch.randn(shape))
    export_modelopt(model, tmp_path / "out", target="vllm==0.33")
    names = ["lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"]
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"] == names
    assert tensors_of(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    text = (tmp_path / "out/README.md").read_text()
    assert "LlamaForCausalLM, W4A16_NVFP4" in text
    assert "| Format | NVIDIA ModelOpt unified checkpoint |" in text
    assert check_schema(tmp_path / "out", "sglang") == []


def test_stacked_experts_without_names_are_refused_since_engines_know_them_one_by_one(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    model.model.layers[0].mlp.mixture = torch.nn.Module()
    model.model.layers[0].mlp.mixture.stack = torch.nn.Parameter(torch.ones(2, 64, 32))
    message = r"mixture\.stack: expected experts .* got experts stacked into one tensor \[2, 64, 32\]"
    for target in ("vllm", "tensorrt-llm"):
        with pytest.raises(ExportError, match=message):
            export(model, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


def test_a_packed_weight_may_be_read_from_the_file_again(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    export_modelopt(model, tmp_path / "out", shard_size_bytes=20_000)
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    tensors = tensors_of(tmp_path / "out")
    for path in packed_paths(model):
        codes, scales = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
        packed = PackedNVFP4(codes, scales, tensors[f"{path}.weight_scale_2"].reshape(1), "multiplier")
        assert packed.shape == tuple(model.get_submodule(path).weight.shape)
