"""Checkpoints that load elsewhere and compute garbage, or contradict themselves: each is refused, with a remedy."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qerl_compile import loading
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import CheckpointError
from qerl_compile.layouts import layout_of
from tests.layouts.writers import Tensors, edit_config, edit_tensors

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
A16, W4A4, MODELOPT, MODELOPT_W4A4 = "NVFP4A16", "NVFP4", "ModelOpt W4A16_NVFP4", "ModelOpt NVFP4"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as fault, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*activations in 4 bits")
        loading.load(directory, inner="eager", device="cpu")
    return str(fault.value)


def block_byte(byte: int, leaf: str = "weight_scale") -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.{leaf}"].view(torch.uint8)[3, 1] = byte

    return change


def value(leaf: str, number: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{UP}.{leaf}"].fill_(number)


def inverted(leaf: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{UP}.{leaf}"].reciprocal_()


def all_zero_as_modelopt_writes_it(tensors: Tensors) -> None:
    tensors[f"{UP}.weight"].zero_()
    tensors[f"{UP}.weight_scale"].view(torch.uint8).fill_(0xFF)
    tensors[f"{UP}.weight_scale_2"].zero_()


VALUES = [
    (A16, "NaN block scale", block_byte(0x7F), (f"{UP}.weight_scale", "NaN in 1 of 720", "leave it dense")),
    (A16, "negative NaN", block_byte(0xFF), (f"{UP}.weight_scale", "NaN in 1 of 720")),
    (MODELOPT, "negative block scale", block_byte(0xB8), (f"{UP}.weight_scale", "a sign in 1 of 720")),
    (MODELOPT, "all zero", all_zero_as_modelopt_writes_it, ("NaN in 720 of 720", "ModelOpt writes NaN")),
    ("torchao", "NaN in a tile", block_byte(0x7F, "_weight_scale"), (f"{UP}._weight_scale", "NaN in 1 of")),
    (A16, "zero divisor", value("weight_global_scale", 0), (f"{UP}.weight_global_scale", "0.0", "positive")),
    (A16, "negative divisor", value("weight_global_scale", -4), (f"{UP}.weight_global_scale", "-4.0")),
    (A16, "NaN divisor", value("weight_global_scale", float("nan")), (f"{UP}.weight_global_scale", "nan")),
    (
        A16,
        "tiny divisor",
        value("weight_global_scale", 1e-45),
        (f"{UP}.weight_global_scale", "decodes to as much as inf"),
    ),
    (MODELOPT, "infinite multiplier", value("weight_scale_2", float("inf")), (f"{UP}.weight_scale_2", "inf")),
    (A16, "multiplier as divisor", inverted("weight_global_scale"), (f"{UP}.weight_global_scale", "its reciprocal")),
    (MODELOPT, "divisor as multiplier", inverted("weight_scale_2"), (f"{UP}.weight_scale_2", "its reciprocal")),
    ("torchao", "divisor as multiplier", inverted("_weight_per_tensor_scale"), ("its reciprocal",)),
    (W4A4, "input scale of zero", value("input_global_scale", 0), (f"{UP}.input_global_scale", "0.0")),
    (W4A4, "NaN in a norm", lambda t: t["model.norm.weight"].fill_(float("nan")), ("model.norm.weight", "nan")),
]


@pytest.mark.parametrize("layout, damage, change, words", VALUES, ids=[f"{case[0]}, {case[1]}" for case in VALUES])
def test_values_that_decode_to_garbage_are_refused(layout, damage, change, words, copied):
    directory = rewrite(copied(layout), change)
    said = refusal(directory)
    for word in (*words, str(directory / "model.safetensors")):
        assert word in said


def as_uint8(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].view(torch.uint8)


def as_float32(tensors: Tensors) -> None:
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].float()


def fp8_layer(tensors: Tensors) -> None:
    for leaf in ("weight_scale", "weight_scale_2"):
        tensors.pop(f"{UP}.{leaf}")
    tensors[f"{UP}.weight"] = torch.ones(144, 80).to(torch.float8_e4m3fn)


def awq(tensors: Tensors) -> None:
    tensors[f"{UP}.pre_quant_scale"] = torch.ones(80, dtype=torch.bfloat16)


def packed_norm(tensors: Tensors) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
        tensors[f"model.norm.{leaf}"] = tensors[f"{UP}.{leaf}"].clone()


def packed_embedding(tensors: Tensors) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
        tensors[f"model.embed_tokens.{leaf}"] = tensors[f"{UP}.{leaf}"].clone()


def dropped(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


HEADERS = [
    (A16, "block scales as uint8", as_uint8, (f"{UP}.weight_scale", "F8_E4M3", "U8", "Convert it")),
    (A16, "block scales as float32", as_float32, (f"{UP}.weight_scale", "F8_E4M3", "F32")),
    (A16, "no divisor", dropped(f"{UP}.weight_global_scale"), (UP, "no weight_global_scale (the divisor)")),
    (A16, "no block scales", dropped(f"{UP}.weight_scale"), (UP, "no weight_scale (the block scales)")),
    (MODELOPT, "no multiplier", dropped(f"{UP}.weight_scale_2"), (UP, "no weight_scale_2 (the multiplier)")),
    (MODELOPT, "no codes", dropped(f"{UP}.weight"), (UP, "no weight (the codes)")),
    ("torchao", "no multiplier", dropped(f"{UP}._weight_per_tensor_scale"), ("no _weight_per_tensor_scale",)),
    (W4A4, "one without an input scale", dropped(f"{UP}.input_global_scale"), ("input_global_scale of every", UP)),
    (MODELOPT_W4A4, "one without an input scale", dropped(f"{UP}.input_scale"), ("input_scale of every", UP)),
    (A16, "an input scale too many", added(f"{UP}.input_global_scale", torch.ones(1)), (UP, "16 bits")),
    (MODELOPT, "an input scale too many", added(f"{UP}.input_scale", torch.ones(())), (UP, "16 bits")),
    (W4A4, "a cache scale of nobody", added("model.nobody.k_scale", torch.ones(1)), ("model.nobody.k_scale",)),
    (MODELOPT, "an FP8 layer", fp8_layer, (f"{UP}.weight", "BF16 or F16", "F8_E4M3", "one packed format")),
    (MODELOPT, "AWQ that was not folded", awq, (f"{UP}.pre_quant_scale", "NVFP4 instead of NVFP4_AWQ")),
    (A16, "a packed norm", packed_norm, ("model.norm.weight_packed", "'model.norm' to be one", "Qwen2RMSNorm")),
    (A16, "a packed embedding", packed_embedding, ("model.embed_tokens", "Embedding")),
    (A16, "two scalars in one", added(f"{UP}.weight_global_scale", torch.ones(2)), ("[1] or []", "[2]")),
]


@pytest.mark.parametrize("layout, damage, change, words", HEADERS, ids=[f"{case[0]}, {case[1]}" for case in HEADERS])
def test_headers_that_do_not_fit_are_refused_before_a_weight_is_read(
    layout, damage, change, words, copied, monkeypatch
):
    directory = rewrite(copied(layout), change)
    monkeypatch.setattr(loading, "_stream", lambda *_: pytest.fail("weights were read"))
    said = refusal(directory)
    for word in words:
        assert word in said


def with_group(**changes: Any) -> Callable[[dict], dict]:
    def change(config: dict) -> dict:
        group = next(iter(config["config_groups"].values()))
        return {**config, "config_groups": {"group_0": {**group, **changes}}}

    return change


def with_weights(**changes: Any) -> Callable[[dict], dict]:
    def change(config: dict) -> dict:
        group = next(iter(config["config_groups"].values()))
        return with_group(weights={**group["weights"], **changes})(config)

    return change


def replaced(**changes: Any) -> Callable[[dict], dict]:
    return lambda config: {**config, **changes}


def with_fp8_group(config: dict) -> dict:
    other = {"targets": ["re:.*down_proj"], "format": "float-quantized", "weights": {"num_bits": 8, "type": "float"}}
    return {**config, "format": "mixed-precision", "config_groups": {**config["config_groups"], "group_1": other}}


MIXED = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {Q: {"quant_algo": "NVFP4"}, UP: {"quant_algo": "FP8"}}}
CONFIGS = [
    (A16, "strategy group", with_weights(strategy="group"), ("group_0.weights.strategy", "'tensor_group'", "'group'")),
    (A16, "eight bits", with_weights(num_bits=8), ("group_0.weights.num_bits", "got 8")),
    (A16, "blocks of 32", with_weights(group_size=32), ("group_size", "expected 16", "got 32")),
    (A16, "an FP8 group", with_fp8_group, ("group_1.format", "'float-quantized'", "bf16 checkpoint")),
    (A16, "rotations", replaced(transform_config={"config_groups": {"R1": {}}}), ("transform_config", "rotated")),
    (A16, "a packed layer ignored", replaced(ignore=["lm_head", Q]), ("ignore", f"{Q}.weight_packed", "Remove")),
    (A16, "a group that is none", replaced(config_groups=["NVFP4"]), ("config_groups", "mapping")),
    (A16, "a list that is none", replaced(ignore={"lm_head": 1}), ("ignore", "list of module names")),
    (A16, "eight-bit inputs", with_group(input_activations={"num_bits": 8}), ("input_activations.num_bits", "got 8")),
    (
        W4A4,
        "scales but no inputs",
        with_group(input_activations=None),
        ("config_groups", "input_global_scale", "16 bits"),
    ),
    (A16, "a version to come", replaced(quant_method="qerl-nvfp4", format_version=2), ("format_version", "got 2")),
    (MODELOPT, "FP8", replaced(quant_algo="FP8"), ("quant_algo", "'FP8'", "bf16 checkpoint")),
    (MODELOPT, "W4A8", replaced(quant_algo="W4A8_NVFP4_FP8"), ("quant_algo", "'W4A8_NVFP4_FP8'")),
    (MODELOPT, "SVD", replaced(quant_algo="NVFP4_SVD"), ("quant_algo", "'NVFP4_SVD'")),
    (MODELOPT, "one FP8 layer", replaced(**MIXED), (f"quantized_layers['{UP}'].quant_algo", "'FP8'")),
    (MODELOPT, "no layers", replaced(quant_algo="MIXED_PRECISION"), ("quantized_layers", "None")),
    (MODELOPT, "blocks of 32", with_weights(group_size=32), ("group_size", "expected 16", "got 32")),
    (
        MODELOPT,
        "a wildcard over packed layers",
        replaced(ignore=["*.mlp.*"]),
        ("ignore", "'*.mlp.*'", "weight_scale_2"),
    ),
    (MODELOPT, "more wildcards than anyone has", replaced(ignore=["a*"] * 1001), ("ignore", "1001")),
    ("torchao", "another method", replaced(quant_method="gptq"), ("quant_method 'gptq'", "bf16 checkpoint")),
]


@pytest.mark.parametrize("layout, fault, change, words", CONFIGS, ids=[f"{case[0]}, {case[1]}" for case in CONFIGS])
def test_configs_that_contradict_the_format_or_the_tensors_are_refused(layout, fault, change, words, copied):
    directory = copied(layout)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config=change(config))
    with pytest.raises(CheckpointError) as refused:
        layout_of(open_checkpoint(directory))
    for word in (*words, "config.json"):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "layout, words", [(A16, "*.weight_packed"), (MODELOPT, "*.weight_scale_2"), ("torchao", "none")]
)
def test_a_config_that_promises_packed_tensors_where_all_is_dense_is_refused(layout, words, copied, dense):
    directory = copied(layout)
    save_file(load_file(dense / "model.safetensors"), directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="config") as refused:
        layout_of(open_checkpoint(directory))
    assert words in str(refused.value)


def test_a_torchao_tensor_of_another_kind_is_refused(copied):
    directory = copied("torchao")

    def other(metadata: dict[str, str]) -> None:
        metadata[f"{UP}.weight"] = metadata[f"{UP}.weight"].replace("NVFP4Tensor", "Int4Tensor")

    rewrite(directory, lambda tensors: None, other)
    said = refusal(directory)
    assert "'Int4Tensor'" in said
    assert f"{UP}.weight" in said


def test_a_packed_head_whose_weight_is_tied_is_refused(copied):
    directory = copied(A16)

    def pack_the_head(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.weight_packed"] = torch.zeros(128, 40, dtype=torch.uint8)
        tensors["lm_head.weight_scale"] = torch.ones(128, 5).to(torch.float8_e4m3fn)
        tensors["lm_head.weight_global_scale"] = torch.ones(1)

    edit_tensors(directory, pack_the_head)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, tie_word_embeddings=True, quantization_config={**config, "ignore": []})
    said = refusal(directory)
    assert "lm_head.weight_packed" in said
    assert "tie_word_embeddings" in said


def test_a_packed_linear_that_no_layer_calls_is_refused_rather_than_left_without_a_kernel(copied, monkeypatch):
    """No model here has one, so the plan is made as if q_proj were not called."""
    make_plan = loading.make_plan
    monkeypatch.setattr(
        loading, "make_plan", lambda *given, packed, **options: make_plan(*given, packed=packed - {Q}, **options)
    )
    said = refusal(copied(A16))
    assert f"1 that none calls: '{Q}'" in said
    assert "Leave these modules dense" in said


def test_a_list_of_dense_modules_may_forget_some(copied):
    directory = copied(A16)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config={**config, "ignore": []})
    assert len(layout_of(open_checkpoint(directory)).linears) == 7


def rewrite(
    directory: Path, change: Callable[[Tensors], object], describe: Callable[[dict[str, str]], object] | None = None
) -> Path:
    """Change tensors and keep the metadata, which describe torchao's tensors."""
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as reader:
        metadata = dict(reader.metadata())
    tensors = load_file(file)
    change(tensors)
    if describe is not None:
        describe(metadata)
    save_file(tensors, file, metadata=metadata)
    return directory
