"""NVIDIA ModelOpt's unified Hugging Face checkpoint: W4A16_NVFP4, or NVFP4 with 4-bit activations.

TensorRT-LLM wants this layout; vLLM and SGLang take it too. Codes and block scales are the same bytes as in
compressed-tensors, under other names, and the scalars are its reciprocals:

    weight          U8       [N, K/2]    the dense tensor's name, another shape
    weight_scale    F8_E4M3  [N, K/16]
    weight_scale_2  F32      []          a multiplier, amax / 2688
    input_scale     F32      []          a multiplier, amax of the input / 2688; with 4-bit activations only
    k_proj.k_scale, v_proj.v_scale   F32 []   multipliers amax / 448; with an FP8 cache only

They describe themselves twice. `hf_quant_config.json` (nested) is what TensorRT-LLM takes for the truth, and
`quantization_config` in config.json (flat) is what vLLM reads first; the flat one has no group size at the top, so both
are written. vLLM demands that the nested one has group_size, kv_cache_quant_algo and exclude_modules.

`producer.name` says modelopt because readers take it for the name of the method (vLLM tests it, others copy it into
quant_method), with the version whose layout this is; who wrote the file stands in the card.

Where the two formats' readers differ: ModelOpt's reject what compressed-tensors' compute with. ModelOpt itself writes
an all-zero matrix as scalar 0 with NaN block scales, and vLLM then stops. Ours has scalar 1 and block scales 0.125 in
both, since the codes are zero and any finite scale decodes to zero.

vLLM also skips a linear whose path *contains* a name of the exclude list, so a dense `mlp.gate` would switch a packed
`mlp.gate_proj` off; schemas.py refuses such an export.

What this module does not do: AWQ's pre_quant_scale (vLLM rejects NVFP4_AWQ), NVFP4 caches, mixed precision.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from qerl_compile.errors import ExportError
from qerl_compile.exporters.served_state import ServedState
from qerl_compile.exporters.serving import Layout, dense_entries, write_checkpoint
from qerl_compile.exporters.shards import Entry
from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.layouts.modelopt import BESIDE

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def export_modelopt(
    model: nn.Module, out_dir: str | PathLike[str], *, target: str = "tensorrt-llm", **options: Any
) -> None:
    """Write both configs, safetensors shards, tokenizer and card; see `serving.write_checkpoint`."""
    write_checkpoint(model, out_dir, MODELOPT, target=target, **options)


def _entries(state: ServedState) -> dict[str, Entry]:
    entries = dense_entries(state)
    for path, packed in state.packed.items():
        entries[f"{path}.weight"] = Entry.of(packed.codes_NK2)
        entries[f"{path}.weight_scale"] = Entry.of(packed.block_decode_scale_NG)
        entries[f"{path}.weight_scale_2"] = Entry.of(state.global_scales[path].toward("multiplier"), shape=())
    for path, scalar in state.input_scales.items():
        entries[f"{path}.input_scale"] = Entry.of(scalar.toward("multiplier"), shape=())
    linears = {*state.packed, *state.dense_linears}
    for path, (k_scale, v_scale) in state.kv_scales.items():
        for owner, leaf, value in (("k_proj", "k_scale", k_scale), ("v_proj", "v_scale", v_scale)):
            if f"{path}.{owner}" not in linears:
                raise ExportError(
                    where=path,
                    expected=f"a linear named {owner}, on which this format keeps the cache's scale",
                    got="none",
                    do="Export with the cache in 16 bits, or in the compressed-tensors format.",
                )
            entries[f"{path}.{owner}.{leaf}"] = Entry.of(value, shape=())
    return entries


def _describe(state: ServedState, stage: Path) -> None:
    algorithm, excluded = _label(state), sorted({*state.dense_linears, *state.embeddings})
    four_bits = {"dynamic": False, "group_size": BLOCK, "num_bits": 4, "type": "float"}
    group = {**({"input_activations": four_bits} if state.input_scales else {}), "weights": four_bits}
    flat = {
        "config_groups": {"group_0": {**group, "targets": ["Linear"]}},
        "ignore": excluded,
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if state.kv_scales else {}),
        "producer": PRODUCER,
        "quant_algo": algorithm,
        "quant_method": "modelopt",
    }
    nested = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if state.kv_scales else None,
        "group_size": BLOCK,
        "exclude_modules": excluded,
    }
    file = stage / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    _write(file, {**config, "quantization_config": flat})
    _write(stage / BESIDE, {"producer": PRODUCER, "quantization": nested})


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _label(state: ServedState) -> str:
    return "NVFP4" if state.input_scales else "W4A16_NVFP4"


MODELOPT = Layout(
    name="modelopt",
    shown="NVIDIA ModelOpt unified checkpoint",
    direction="multiplier",
    label=_label,
    entries=_entries,
    describe=_describe,
)
