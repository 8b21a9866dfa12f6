"""Export a transformed model as compressed-tensors `nvfp4-pack-quantized`, weights only (NVFP4A16).

vLLM, SGLang and transformers load the result. The packed tensors have the names, dtypes and layout of that format
already, so exporting them is writing them; the rest is the Hugging Face state_dict. What has to be right besides:

- `ignore` lists every linear that stays dense. Without it transformers leaves them uninitialised, silently.
- Linears that an engine fuses (q/k/v, gate/up) have one global scale. With unequal ones vLLM and SGLang compute
  with the largest of them, which is wrong for the others. They must also be quantized together or not at all.
- `quantization_status: compressed`, or transformers loads random weights. The schema is compressed-tensors' own.
- A tied head is omitted; the embedding is its weight.
- The dense rest is bfloat16, rounded if it was float32 or float16: transformers decodes NVFP4 to bfloat16 whatever the
  config says, and then fails to multiply it with activations of another dtype.

LoRA factors are not written: an adapter is a file of its own (exporters/peft.py) which engines load on top, because
merging it into 4-bit weights rounds it away. Noise is not written either; norms are exported clean. Norms that were
trained are part of the adapter, so the base's are written; `norms_in_base` writes the trained ones instead, rounded to
bfloat16, because vLLM refuses an adapter that brings norms (exporters/peft.py has the same switch).

All checks come before the first byte, and the directory appears whole or not at all (staged_write.py).
"""

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM, adapters_of, trained_norms_of
from qerl_compile.errors import ExportError, FormatError
from qerl_compile.exporters.card import Card, provenance, shown_base, write_card
from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.staged_write import refuse_existing, staged_directory

FORMAT = "nvfp4-pack-quantized"
DENSE_DTYPE = torch.bfloat16
PACKED_LEAVES = ("weight_packed", "weight_scale", "weight_global_scale")
FUSED_BY_ENGINES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Names of siblings that vLLM and SGLang load into one matrix with one global scale."""


def export_compressed_tensors(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    tokenizer: Any = None,
    base_name: str | None = None,
    shard_size_bytes: float = 5e9,
    norms_in_base: bool = False,
) -> None:
    """Write config, safetensors shards, tokenizer and card.

    Args:
        model: a `PreTrainedModel` whose packed linears have Parameters `weight_packed` uint8 [N, K/2] and
            `weight_scale` float8_e4m3fn [N, K/16], and a buffer `weight_global_scale` float32 [1], a divisor.
        out_dir: must not exist.
        tokenizer: anything with `save_pretrained`, or None.
        base_name: hub id or path of the base model; default: what `model.qerl` recorded.
        shard_size_bytes: a shard holds at most this many bytes, or one tensor.
        norms_in_base: write trained norms in the place of the base's, if there are any.

    Raises:
        ExportError: nothing is packed, fused partners disagree, NaN or Inf, or `out_dir` exists.
    """
    refuse_existing(out_dir)
    packed = packed_linears(model)
    _check_fused(model, packed)
    tensors = exported_tensors(model, packed, norms_in_base=norms_in_base)
    with staged_directory(out_dir) as stage:
        _write_config(model, packed, stage)
        _write_shards(tensors, stage, int(shard_size_bytes))
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_card(stage, _card(model, packed, tensors, base_name, norms_in_base=norms_in_base))


def packed_linears(model: nn.Module) -> dict[str, PackedNVFP4]:
    """Return what is packed, by module path.

    Raises:
        ExportError: nothing is, or a packed weight breaks the format.
    """
    packed: dict[str, PackedNVFP4] = {}
    for path, module in model.named_modules():
        codes, block = module._parameters.get("weight_packed"), module._parameters.get("weight_scale")
        divisor = module._buffers.get("weight_global_scale")
        if codes is None or block is None or divisor is None:
            continue
        try:
            packed[path] = PackedNVFP4(codes.detach(), block.detach(), divisor, "divisor")
        except FormatError as fault:
            raise ExportError(
                where=f"{path}: {fault.where}",
                expected=fault.expected,
                got=fault.got,
                do="Load the model again; its packed weights were overwritten.",
            ) from None
    if not packed:
        raise ExportError(
            where=type(model).__name__,
            expected="at least one linear packed to NVFP4",
            got="none",
            do="Transform it with a recipe that has quantize rules, or use save_pretrained.",
        )
    return packed


def exported_tensors(
    model: nn.Module, packed: Mapping[str, PackedNVFP4], *, norms_in_base: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of the export, by name, in model order.

    Adapters are left out, a tied tensor appears once, and what is not packed is in bfloat16. Trained norms are left out
    like adapters, or take the place of the base's.

    Raises:
        ExportError: NaN or Inf in one of them.
    """
    adapters = {f"{path}.{factor}" for path in adapters_of(model) for factor in ("lora_A", "lora_B")}
    norms = trained_norms_of(model)
    adapters |= {f"{path}.{TRAINED_NORM}" for path in norms}
    served: dict[str, Tensor] = {f"{path}.weight": norms[path] for path in norms} if norms_in_base else {}
    own = {f"{path}.{leaf}" for path in packed for leaf in PACKED_LEAVES}  # checked with the format's invariants
    tied = _is_tied(model)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in adapters or (tied and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        tensor = served[name].detach() if name in served else tensor.detach()
        if tensor.is_floating_point() and name not in own:
            tensor = tensor.to(DENSE_DTYPE)
        tensors[name] = tensor
        if name not in own and not tensor.isfinite().all():
            do = "Load the model again; this tensor has been overwritten or its checkpoint is damaged."
            raise ExportError(where=name, expected="finite numbers", got="NaN or Inf", do=do)
    return tensors


def _is_tied(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    return config is not None and bool(config.get_text_config().tie_word_embeddings)


def _check_fused(model: nn.Module, packed: Mapping[str, PackedNVFP4]) -> None:
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        for names in FUSED_BY_ENGINES:
            members = [f"{path}.{name}".removeprefix(".") for name in names if name in children]
            inside = [member for member in members if member in packed]
            if inside and len(inside) < len(members):
                raise ExportError(
                    where=path,
                    expected=f"all of {', '.join(members)} packed or none, since engines fuse them",
                    got=f"only {', '.join(inside)}",
                    do="Make the recipe's quantize rules select them together.",
                )
            divisors = {member: packed[member].global_scale.item() for member in inside}
            if len(set(divisors.values())) > 1:
                raise ExportError(
                    where=path,
                    expected="one global scale for linears that engines fuse",
                    got=", ".join(f"{member} {value:g}" for member, value in divisors.items()),
                    do="Quantize them as a group: load the dense checkpoint with a recipe.",
                )


def _write_config(model: nn.Module, packed: Mapping[str, PackedNVFP4], stage: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor

    source: Any = model
    config = copy.deepcopy(source.config)
    config.architectures = [type(model).__name__]
    config.dtype = DENSE_DTYPE
    config.save_pretrained(stage)
    ModelCompressor(quantization_config=quantization_config(model, packed)).update_config(str(stage))
    if source.can_generate():
        # Not save_pretrained, which refuses settings that published models do have, such as a temperature for greedy.
        source.generation_config.to_json_file(stage / "generation_config.json")


def quantization_config(model: nn.Module, packed: Mapping[str, PackedNVFP4]) -> Any:
    """Return compressed-tensors' description of the model: NVFP4A16 on all linears but those that stay dense."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    scheme.format = FORMAT  # pyright: ignore[reportAttributeAccessIssue]  # the enum's value; pydantic validates it
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in packed]
    return QuantizationConfig(
        config_groups={"group_0": scheme},
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=dense,
    )


def _write_shards(tensors: Mapping[str, Tensor], stage: Path, shard_size_bytes: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.numel() * tensor.itemsize,  # a slice of a fused group is not its storage
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, stage / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _card(
    model: nn.Module,
    packed: Mapping[str, PackedNVFP4],
    tensors: Mapping[str, Tensor],
    base_name: str | None,
    *,
    norms_in_base: bool,
) -> Card:
    base, recipe_yaml = provenance(model, base_name)
    total_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    weights = sum(rows * columns for rows, columns in (each.shape for each in packed.values()))
    packed_bytes = sum(
        tensors[f"{path}.{leaf}"].numel() * tensors[f"{path}.{leaf}"].itemsize
        for path in packed
        for leaf in PACKED_LEAVES
    )
    adapters = adapters_of(model)
    adapter = (
        f"not included: LoRA factors of {len(adapters)} modules are exported separately (target `peft`) "
        "and served with `--enable-lora --lora-modules NAME=ADAPTER_DIRECTORY`"
        if adapters
        else "none"
    )
    norms = trained_norms_of(model)
    trained = "included, trained" if norms_in_base else "not included: they are part of the adapter"
    return Card(
        title=f"{shown_base(base) or type(model).__name__}, NVFP4A16",
        summary="Linear weights in NVFP4 (4-bit E2M1, one E4M3 scale per 16 columns, one FP32 scale per matrix); "
        "activations stay in 16 bits.",
        facts={
            "Format": f"compressed-tensors `{FORMAT}`",
            "Quantized linears": f"{len(packed)} ({weights:,} weights at {8 * packed_bytes / weights:.2f} bits)",
            "Dense": "the rest, in bfloat16: embeddings, norms, biases, and the linears under `ignore` in config.json",
            "Size": f"{total_bytes:,} bytes of tensors",
            "Adapter": adapter,
            **({"Norms": f"{len(norms)} were trained beside the adapter; {trained}"} if norms else {}),
        },
        usage="vllm serve THIS_DIRECTORY",
        base_name=base,
        relation="quantized",
        library="transformers",
        tags=["nvfp4", "compressed-tensors"],
        recipe_yaml=recipe_yaml,
    )
