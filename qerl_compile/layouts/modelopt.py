"""NVIDIA ModelOpt's unified Hugging Face checkpoint: NVFP4, W4A16_NVFP4, and NVFP4_AWQ where its scales were folded.

    M.weight                U8       [N, K/2]     the name of the dense tensor, of another shape
    M.weight_scale          F8_E4M3  [N, K/16]
    M.weight_scale_2        F32      []           amax / 2688: a multiplier
    M.input_scale           F32      []           amax / 2688 of the input; NVFP4 only, and absent if it is dynamic
    A.k_proj.k_scale, A.v_proj.v_scale   F32 []   amax / 448 of keys and values; they belong to the attention module A

Where the description lies: in config.json under quantization_config (flat, `quant_algo` beside `ignore`), or nested
under `quantization` with `exclude_modules`, there or in hf_quant_config.json alone. config.json is read first, as vLLM
does.

NVFP4_AWQ multiplies each input channel by `pre_quant_scale` [K]. ModelOpt folds that into the norm before the linear
where it can, and then nothing is left of it. Where a tensor of that name remains, we refuse: it cannot be folded into
E2M1 codes exactly, and an adapter beside the linear would have to know whether it reads x or the scaled x.

Scales of a cache in another format than FP8 (ModelOpt has an NVFP4 cache) are passed over, because exports would take
them for FP8 scales.

MIXED_PRECISION is read if every layer in `quantized_layers` is NVFP4. W4A8 and SVD variants decode by other rules.
"""

from collections.abc import Mapping
from typing import Any

from qerl_compile.checkpoint_config import MAX_CONFIG_BYTES, read_bounded
from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.layouts.described import check_excluded, check_fields, check_input_scales, groups_of
from qerl_compile.layouts.packed_linear import SIXTEEN_BIT_INPUTS, Layout, PackedLinear, require
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import listed, refuse_checkpoint, shown

BESIDE = "hf_quant_config.json"
ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ")
BY_LAYER = "MIXED_PRECISION"
LEAVES = {"weight": "the codes", "weight_scale": "the block scales", "weight_scale_2": "the multiplier"}
FOUR_BITS = {"num_bits": (4,), "type": ("float", None), "group_size": (16, None)}


def speaks(given: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is ModelOpt's; early ones have no `quant_method`."""
    method = given.get("quant_method")
    if method is None:
        return "quant_algo" in given or isinstance(given.get("quantization"), Mapping)
    return isinstance(method, str) and method.startswith("modelopt")


def config_beside(checkpoint: CheckpointDirectory) -> tuple[Mapping[str, Any], str] | None:
    """Return what hf_quant_config.json says and where that is; None if there is no such file.

    Raises:
        CheckpointError: not JSON, or not a mapping.
    """
    file = checkpoint.root / BESIDE
    if not file.exists():
        return None
    value = parse_json(read_bounded(file, MAX_CONFIG_BYTES), where=str(file))
    if not isinstance(value, Mapping):
        refuse_checkpoint(str(file), "a JSON object", shown(value), do="Export the checkpoint again.")
    return value, str(file)


def read(checkpoint: CheckpointDirectory, given: Mapping[str, Any], where: str) -> Layout:
    """Describe a directory whose config says modelopt.

    Args:
        checkpoint: the judged directory.
        given: the flat description, or the one that has it under `quantization`.
        where: file (and key) of that, for errors.

    Raises:
        CheckpointError: another algorithm, a contradiction, a missing tensor, AWQ scales that were not folded.
    """
    nested = given.get("quantization")
    if isinstance(nested, Mapping):
        given, where = nested, f"{where}.quantization"
    algorithms = _algorithms(given, where)
    groups = groups_of(given, where)
    for name, group in groups.items():
        check_fields(group.get("weights"), FOUR_BITS, f"{where}.config_groups.{name}.weights")
    check_fields(given, {"group_size": (16, None)}, where)
    # vLLM reroutes NVFP4 to weight-only if none of the groups has input_activations.
    inputs = not groups or any(group.get("input_activations") for group in groups.values())
    quantized_inputs = inputs and any(algorithm != "W4A16_NVFP4" for algorithm in algorithms)
    _refuse_unfolded(checkpoint)
    linears = _linears(checkpoint, where)
    scaled = [path for path, linear in linears.items() if linear.input_scale]
    if len(set(algorithms)) == 1:
        check_input_scales(
            list(linears), scaled, "input_scale", f"{where}.quant_algo", quantized=quantized_inputs, required=False
        )
    key = "exclude_modules" if "exclude_modules" in given else "ignore"
    check_excluded(given.get(key), linears, f"{where}.{key}", "weight_scale_2", wildcards=True)
    kv_scales, notes = _kv_scales(checkpoint), (SIXTEEN_BIT_INPUTS,) if quantized_inputs else ()
    unread: frozenset[str] = frozenset()
    if kv_scales and not _fp8_cache(given):
        unread, kv_scales = frozenset(kv_scales), {}
        notes += ("Its scales of keys and values are not FP8's and are left out.",)
    return Layout(f"ModelOpt {given.get('quant_algo')}", linears, kv_scales, unread, notes)


def _algorithms(given: Mapping[str, Any], where: str) -> list[Any]:
    algorithm = given.get("quant_algo")
    if algorithm != BY_LAYER:
        found = {"quant_algo": algorithm}
    else:
        layers = given.get("quantized_layers")
        if not isinstance(layers, Mapping) or not layers:
            refuse_checkpoint(
                f"{where}.quantized_layers", "what each layer is", shown(layers), do="Export the checkpoint again."
            )
        found = {
            f"quantized_layers[{shown(path)}].quant_algo": layer.get("quant_algo")
            if isinstance(layer, Mapping)
            else layer
            for path, layer in layers.items()
        }
    for key, value in found.items():
        if value not in ALGORITHMS:
            refuse_checkpoint(
                f"{where}.{key}",
                f"{' or '.join(ALGORITHMS)} for all that is quantized",
                shown(value),
                do="Start from the bf16 checkpoint of this model.",
            )
    return list(found.values())


def _linears(checkpoint: CheckpointDirectory, where: str) -> dict[str, PackedLinear]:
    tensors = checkpoint.tensors
    byte_weights = {name.removesuffix(".weight") for name, entry in tensors.items() if _is_codes(name, entry.dtype)}
    scaled = {name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")}
    linears: dict[str, PackedLinear] = {}
    for path in sorted(byte_weights | scaled):
        require(path, {f"{path}.{leaf}": what for leaf, what in LEAVES.items()}, tensors, checkpoint.root)
        has_input = f"{path}.input_scale" in tensors
        codes, block_scale, global_scale = (f"{path}.{leaf}" for leaf in LEAVES)
        input_scale = f"{path}.input_scale" if has_input else None
        linears[path] = PackedLinear(codes, block_scale, global_scale, "multiplier", input_scale)
    if not linears:
        refuse_checkpoint(
            f"{where}.quant_algo",
            "packed tensors, since it names NVFP4",
            "no tensor called *.weight_scale_2",
            do="Remove the quantization config if the weights are dense, or export the checkpoint again.",
        )
    return linears


def _is_codes(name: str, dtype: str) -> bool:
    return name.endswith(".weight") and dtype == "U8"


def _kv_scales(checkpoint: CheckpointDirectory) -> dict[str, tuple[str, str]]:
    """`A.k_proj.k_scale` describes what attention A caches, so that is where it goes."""
    kv_scales: dict[str, tuple[str, str]] = {}
    for name in checkpoint.tensors:
        for leaf in ("k_scale", "v_scale"):
            owner = name.removesuffix(f".{leaf[0]}_proj.{leaf}")
            if owner != name:
                kv_scales[name] = (owner, leaf)
    return kv_scales


def _fp8_cache(given: Mapping[str, Any]) -> bool:
    """Whether the config says nothing else of the cache than FP8."""
    algorithm, scheme = given.get("kv_cache_quant_algo"), given.get("kv_cache_scheme")
    return algorithm in (None, "FP8") and (not isinstance(scheme, Mapping) or scheme.get("num_bits") == 8)


def _refuse_unfolded(checkpoint: CheckpointDirectory) -> None:
    left = [name for name in checkpoint.tensors if name.endswith(".pre_quant_scale")]
    if left:
        refuse_checkpoint(
            str(checkpoint.tensors[left[0]].file),
            "input channel scales of AWQ that were folded into the norm before",
            f"{len(left)} that were not: {listed(left)}",
            do="Quantize with NVFP4 instead of NVFP4_AWQ, or start from the bf16 checkpoint of this model.",
        )
