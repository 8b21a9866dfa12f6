"""The compressed-tensors layout `nvfp4-pack-quantized`: NVFP4A16, or NVFP4 with 4-bit activations.

vLLM, SGLang and transformers load it. Per packed linear:

    weight_packed        U8       [N, K/2]    the model's own
    weight_scale         F8_E4M3  [N, K/16]   the model's own
    weight_global_scale  F32      [1]         a divisor, 2688 / amax
    input_global_scale   F32      [1]         a divisor, 2688 / amax of the input; with 4-bit activations only

and with an FP8 cache `k_scale`, `v_scale` BF16 [1] on the attention module, multipliers amax / 448. The rest is the
Hugging Face state_dict in bfloat16. What has to be right besides:

- `ignore` lists every linear that stays dense. Without it transformers leaves them uninitialised, silently.
- `quantization_status: compressed`, or transformers loads random weights.
- `input_global_scale` only where the config has input activations: vLLM takes a surplus tensor for an error, and a
  missing one leaves its parameter uninitialised.
- A tied head is omitted; the embedding is its weight.

The schema is compressed-tensors' own code; we only fill it in. The target "transformers" writes the same tensors under
quant_method "qerl-nvfp4", which our quantizer opens as a trainable model; compressed-tensors' own would open them as a
dense one.

What this module does not do: choose what is written (served_state.py), or write it (serving.py).
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qerl_compile.exporters.served_state import ServedState
from qerl_compile.exporters.serving import Layout, dense_entries, write_checkpoint
from qerl_compile.exporters.shards import Entry
from qerl_compile.layouts import OWN_METHOD, OWN_VERSION
from qerl_compile.layouts.compressed_tensors import FORMAT
from qerl_compile.passes.quantize import CACHE_SCALES


def export_compressed_tensors(
    model: nn.Module, out_dir: str | PathLike[str], *, target: str = "vllm", **options: Any
) -> None:
    """Write config, safetensors shards, tokenizer and card; see `serving.write_checkpoint` for arguments and errors."""
    layout = QERL if target.partition("==")[0] == "transformers" else COMPRESSED_TENSORS
    write_checkpoint(model, out_dir, layout, target=target, **options)


def quantization_config(state: ServedState) -> Any:
    """Return compressed-tensors' description of the model: one scheme on all linears but those that stay dense."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    scheme = preset_name_to_scheme(_label(state), ["Linear"])
    scheme.format = FORMAT  # pyright: ignore[reportAttributeAccessIssue]  # the enum's value; pydantic validates it
    fp8: Any = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return QuantizationConfig(
        config_groups={"group_0": scheme},
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=QuantizationArgs(**fp8) if state.kv_scales else None,
        ignore=list(state.dense_linears),
    )


def _entries(state: ServedState) -> dict[str, Entry]:
    entries = dense_entries(state)
    for path, packed in state.packed.items():
        entries[f"{path}.weight_packed"] = Entry.of(packed.codes_NK2)
        entries[f"{path}.weight_scale"] = Entry.of(packed.block_decode_scale_NG)
        entries[f"{path}.weight_global_scale"] = Entry.of(state.global_scales[path].toward("divisor"))
    for path, scalar in state.input_scales.items():
        entries[f"{path}.input_global_scale"] = Entry.of(scalar.toward("divisor"))
    for path, scales in state.kv_scales.items():
        for leaf, value in zip(CACHE_SCALES, scales, strict=True):
            entries[f"{path}.{leaf}"] = Entry.of(value, torch.bfloat16)
    return entries


def _describe(state: ServedState, stage: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor(quantization_config=quantization_config(state)).update_config(str(stage))


def _describe_as_ours(state: ServedState, stage: Path) -> None:
    _describe(state, stage)
    file = stage / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] |= {"quant_method": OWN_METHOD, "format_version": OWN_VERSION}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _label(state: ServedState) -> str:
    return "NVFP4" if state.input_scales else "NVFP4A16"


COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    shown=f"compressed-tensors `{FORMAT}`",
    direction="divisor",
    label=_label,
    entries=_entries,
    describe=_describe,
)
QERL = Layout(
    name=OWN_METHOD,
    shown=f"`{OWN_METHOD}`: the tensors of compressed-tensors `{FORMAT}`",
    direction="divisor",
    label=_label,
    entries=_entries,
    describe=_describe_as_ours,
    for_engines=False,
)
