"""Checkpoints as llm-compressor, ModelOpt and torchao write them, made of a dense directory.

compressed-tensors and ModelOpt by the arithmetic that design/formats.md measured, in a few lines of torch and nothing
of qerl_compile; torchao by the library itself. CI has neither llm-compressor nor ModelOpt; oracle_writers.py runs them
and shows that these writers make the same names, dtypes, shapes and bytes, but for the calibrated scales, which are
made up here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
STEPS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints of E2M1's values 0, .5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code."""
INPUT_AMAX, K_AMAX, V_AMAX = 3.7, 5.0, 2.9


def write_compressed_tensors(dense: Path, out: Path, *, inputs: bool = False, cache: bool = False) -> Path:
    """llm-compressor's NVFP4A16, with `inputs` its NVFP4, with `cache` FP8 scales of keys and values."""

    def pack(path: str, w_NK: Tensor, amax: Tensor) -> Tensors:
        divisor = (amax.reciprocal() * 2688.0).float()
        wanted = (w_NK.unflatten(1, (-1, 16)).abs().amax(-1) / 6).float() * divisor
        block = wanted.clamp(max=448).to(torch.float8_e4m3fn)
        block = torch.where(block.float() == 0, 0.125, block.float()).to(torch.float8_e4m3fn)
        tensors = {
            "weight_packed": _codes(w_NK.float(), block.float() / divisor),
            "weight_scale": block,
            "weight_global_scale": divisor.reshape(1),
        }
        if inputs:
            tensors["input_global_scale"] = torch.tensor([2688 / INPUT_AMAX])
        return {f"{path}.{leaf}": tensor for leaf, tensor in tensors.items()}

    def cached(attention: str) -> Tensors:
        values = {"k_scale": K_AMAX, "v_scale": V_AMAX}
        return {f"{attention}.{leaf}": torch.tensor([a / 448], dtype=torch.bfloat16) for leaf, a in values.items()}

    four_bits = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    config = {
        "config_groups": {
            "group_0": {
                "format": "nvfp4-pack-quantized",
                "input_activations": {**four_bits, "dynamic": "local"} if inputs else None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**four_bits, "dynamic": False, "observer": "memoryless_minmax"},
            }
        },
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"} if cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
    }
    _write(dense, out, pack, cached if cache else None)
    return edit_config(out, quantization_config=config)


def write_modelopt(
    dense: Path, out: Path, *, inputs: bool = False, cache: bool = False, described: str = "flat"
) -> Path:
    """ModelOpt's W4A16_NVFP4, with `inputs` its NVFP4.

    `described`: "flat" is 0.47's, in both files; "nested" in config.json; "beside", in hf_quant_config.json alone.
    """

    def pack(path: str, w_NK: Tensor, amax: Tensor) -> Tensors:
        multiplier = amax.float() / 2688
        wanted = w_NK.float().unflatten(1, (-1, 16)).abs().amax(-1) / (6 * multiplier)
        wanted[wanted == 0] = 1.0
        block = wanted.clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
        tensors = {
            "weight": _codes(w_NK.float(), block.float() * multiplier),
            "weight_scale": block,
            "weight_scale_2": multiplier.reshape(()),
        }
        if inputs:
            tensors["input_scale"] = torch.tensor(INPUT_AMAX / 2688)
        return {f"{path}.{leaf}": tensor for leaf, tensor in tensors.items()}

    def cached(attention: str) -> Tensors:
        return {
            f"{attention}.k_proj.k_scale": torch.tensor(K_AMAX / 448),
            f"{attention}.v_proj.v_scale": torch.tensor(V_AMAX / 448),
        }

    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    algorithm, exclude = "NVFP4" if inputs else "W4A16_NVFP4", ["lm_head", "model.embed_tokens"]
    group = {"weights": four_bits, "targets": ["Linear"]} | ({"input_activations": four_bits} if inputs else {})
    producer = {"name": "modelopt", "version": "0.47.0"}
    flat = {"config_groups": {"group_0": group}, "ignore": exclude, "quant_algo": algorithm, "producer": producer}
    flat |= {"quant_method": "modelopt"}
    if cache:
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    facts = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8" if cache else None, "group_size": 16}
    nested = {"producer": producer, "quantization": {**facts, "exclude_modules": exclude}}
    _write(dense, out, pack, cached if cache else None)
    if described != "nested":
        (out / "hf_quant_config.json").write_text(json.dumps(nested))
    if described != "beside":
        edit_config(out, quantization_config=flat if described == "flat" else {**nested, "quant_method": "modelopt"})
    return out


def write_torchao(dense: Path, out: Path) -> Path:
    """transformers with torchao's own NVFP4WeightOnlyConfig."""
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(NVFP4WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(out)
    return out


def edit_config(directory: Path, **changes: Any) -> Path:
    """Change keys of config.json; return the directory."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


def edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of a one-file checkpoint; return the directory."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def _write(
    dense: Path, out: Path, pack: Callable[[str, Tensor, Tensor], Tensors], cached: Callable[[str], Tensors] | None
) -> None:
    tensors = load_file(dense / "model.safetensors")
    parents = dict.fromkeys(name.rsplit(".", 2)[0] for name in tensors if name.endswith("_proj.weight"))
    for parent in parents:
        for names in TOGETHER:
            weights = {f"{parent}.{name}": tensors.pop(f"{parent}.{name}.weight", None) for name in names}
            present = {path: weight for path, weight in weights.items() if weight is not None}
            if present:
                amax = torch.stack([weight.abs().amax() for weight in present.values()]).amax()
            for path, weight in present.items():
                tensors |= pack(path, weight, amax)
        if cached is not None and parent.endswith("self_attn"):
            tensors |= cached(parent)
    out.mkdir()
    for file in dense.glob("*.json"):
        (out / file.name).write_text(file.read_text())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _codes(w_NK: Tensor, step_NG: Tensor) -> Tensor:
    scaled = w_NK / step_NG.repeat_interleave(16, 1)
    size = scaled.abs()
    # Ties: .25, 1.25, 2.5 and 5 lie under an odd code and go down; .75, 1.75 and 3.5 go up.
    index = sum((size >= step if place % 2 else size > step).to(torch.uint8) for place, step in enumerate(STEPS))
    codes = index | (torch.signbit(scaled).to(torch.uint8) << 3)
    return codes[:, 0::2] | codes[:, 1::2] << 4
