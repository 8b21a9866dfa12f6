"""Valid directories in several formats, made by our exporters once for all tests, and copies with one thing wrong."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qerl_compile
from tests.models import tiny_model

EXPORTS: Mapping[str, dict[str, Any]] = {
    "compressed": {"target": "vllm"},
    "compressed-w4a4": {"target": "vllm", "activations": "4", "kv_cache": "8"},
    "modelopt": {"target": "tensorrt-llm"},
    "modelopt-w4a4": {"target": "tensorrt-llm", "activations": "4", "kv_cache": "8"},
    "qerl": {"target": "transformers"},
}
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
DOWN = "model.layers.1.mlp.down_proj"


@functools.cache
def _held() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="checkup-")  # removed when the process ends


def root() -> Path:
    return Path(_held().name)


@functools.cache
def dense() -> Path:
    out = root() / "dense"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(out)
    return out


@functools.cache
def valid(kind: str) -> Path:
    """An export of the tiny Llama: untied head, which stays dense."""
    out = root() / kind
    qerl_compile.export(_calibrated(), out, **EXPORTS[kind])
    return out


@functools.cache
def _calibrated() -> Any:
    model = qerl_compile.transform(tiny_model("llama", dtype=torch.bfloat16), "nvfp4-lora", inner="eager")
    for path in model.qerl.plan.quantize:  # one value for all, as members of a fused group must have
        model.get_submodule(path).register_buffer("input_global_scale", torch.tensor([2688 / 8.0]))
    for layer in model.model.layers:
        layer.self_attn.register_buffer("k_scale", torch.tensor([0.01]))
        layer.self_attn.register_buffer("v_scale", torch.tensor([0.02]))
    return model


def damaged(
    kind: str,
    out: Path,
    tensors: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    section: Callable[[dict[str, Any]], None] = lambda section: None,
    config: Callable[[dict[str, Any]], None] = lambda config: None,
) -> Path:
    """A copy of a valid export, changed in place by the functions given."""
    shutil.copytree(valid(kind), out)
    held = load_file(out / "model.safetensors")
    tensors(held)
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((out / "config.json").read_text())
    section(written["quantization_config"])
    config(written)
    (out / "config.json").write_text(json.dumps(written))
    return out
