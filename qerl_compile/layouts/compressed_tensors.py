"""compressed-tensors `nvfp4-pack-quantized`: llm-compressor's NVFP4A16 and NVFP4, and what we export ourselves.

    M.weight_packed         U8       [N, K/2]
    M.weight_scale          F8_E4M3  [N, K/16]
    M.weight_global_scale   F32      [1]          2688 / amax: a divisor
    M.input_global_scale    F32      [1]          2688 / amax of the input; NVFP4 (W4A4) only
    A.k_scale, A.v_scale    BF16     [1]          amax / 448 of keys and values, on the attention module A: multipliers

A packed module is one that has `weight_packed`; the config must then describe exactly this format. A group of another
format, such as FP8 layers in the same file, is refused: its weights would need a decoder of their own. So are
`transform_config`'s rotations, which change what a linear's input has to be.

A directory without any `quantization_config` may hold packed tensors too: the names are unmistakable, and files that
are put together by hand come like that.

What this module does not do: run the `re:` patterns of `ignore`. They are a stranger's and Python's `re` can be made to
run for minutes; plain names are compared.
"""

from collections.abc import Mapping
from typing import Any

from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.layouts.described import check_excluded, check_fields, check_input_scales, groups_of
from qerl_compile.layouts.packed_linear import SIXTEEN_BIT_INPUTS, Layout, PackedLinear, require
from qerl_compile.wording import refuse_checkpoint, shown

FORMAT = "nvfp4-pack-quantized"
LEAVES = {"weight_packed": "the codes", "weight_scale": "the block scales", "weight_global_scale": "the divisor"}
INPUT = "input_global_scale"
FOUR_BITS = {"num_bits": (4,), "type": ("float",), "strategy": ("tensor_group",), "group_size": (16,)}
WEIGHTS = {**FOUR_BITS, "symmetric": (True, None), "dynamic": (False, None)}


def read(checkpoint: CheckpointDirectory, given: Mapping[str, Any], where: str) -> Layout:
    """Describe a directory whose config says compressed-tensors, or our own method, which has the same tensors.

    Args:
        checkpoint: the judged directory.
        given: its quantization_config.
        where: file and key of that, for errors.

    Raises:
        CheckpointError: another format, a contradiction, or a missing tensor.
    """
    groups = groups_of(given, where)
    formats = {"format": given.get("format")}
    formats |= {
        f"config_groups.{name}.format": group["format"] for name, group in groups.items() if group.get("format")
    }
    # compressed-tensors calls a file with several formats `mixed-precision` at the top; the groups say which.
    for key, number_format in reversed(formats.items()):
        if number_format != FORMAT:
            refuse_checkpoint(
                f"{where}.{key}",
                f"{FORMAT!r} for all that is quantized",
                f"{shown(number_format)} (quant_method {shown(given.get('quant_method'))})",
                do="Start from the bf16 checkpoint of this model.",
            )
    _refuse_rotations(given.get("transform_config"), where)
    inputs = [_inputs_quantized(group, f"{where}.config_groups.{name}") for name, group in groups.items()]
    layout = _from_tensors(checkpoint, quantized_inputs=any(inputs))
    if not layout.linears:
        refuse_checkpoint(
            f"{where}.format",
            f"packed tensors, since it says {FORMAT}",
            "no tensor called *.weight_packed",
            do="Remove quantization_config if the weights are dense, or export the checkpoint again.",
        )
    scaled = [path for path, linear in layout.linears.items() if linear.input_scale]
    if len(set(inputs)) < 2:  # with both kinds of groups, each module goes by what it has
        key = f"{where}.config_groups"
        check_input_scales(list(layout.linears), scaled, INPUT, key, quantized=any(inputs), required=True)
    check_excluded(given.get("ignore"), layout.linears, f"{where}.ignore", "weight_packed", wildcards=False)
    return layout


def undescribed(checkpoint: CheckpointDirectory) -> Layout:
    """Describe a directory without a quantization config: dense, or packed under these unmistakable names.

    Raises:
        CheckpointError: a packed module lacks a tensor.
    """
    return _from_tensors(checkpoint, quantized_inputs=False)


def _from_tensors(checkpoint: CheckpointDirectory, *, quantized_inputs: bool) -> Layout:
    tensors = checkpoint.tensors
    linears: dict[str, PackedLinear] = {}
    for path in sorted(name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")):
        require(path, {f"{path}.{leaf}": what for leaf, what in LEAVES.items()}, tensors, checkpoint.root)
        has_input = f"{path}.{INPUT}" in tensors
        codes, block_scale, global_scale = (f"{path}.{leaf}" for leaf in LEAVES)
        input_scale = f"{path}.{INPUT}" if has_input else None
        linears[path] = PackedLinear(codes, block_scale, global_scale, "divisor", input_scale)
    kv_scales: dict[str, tuple[str, str]] = {}
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf in ("k_scale", "v_scale") and linears:
            kv_scales[name] = (path, leaf)
    label = f"compressed-tensors {'NVFP4' if quantized_inputs else 'NVFP4A16'}" if linears else "dense"
    return Layout(label, linears, kv_scales, notes=(SIXTEEN_BIT_INPUTS,) if quantized_inputs else ())


def _inputs_quantized(group: Mapping[str, Any], where: str) -> bool:
    check_fields(group.get("weights"), WEIGHTS, f"{where}.weights")
    inputs = group.get("input_activations")
    if inputs is None:
        return False
    check_fields(inputs, FOUR_BITS, f"{where}.input_activations")
    return True


def _refuse_rotations(transforms: Any, where: str) -> None:
    if transforms:
        refuse_checkpoint(
            f"{where}.transform_config",
            "weights that are not rotated",
            shown(transforms),
            do="Quantize without transforms; their inverse would have to be computed in every layer.",
        )
