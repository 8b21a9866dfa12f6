"""The NVFP4 layouts of other writers, read as they are.

    layout = layout_of(checkpoint)      from config.json, hf_quant_config.json and headers; no tensor is read

    compressed_tensors.py   llm-compressor's NVFP4A16 and NVFP4, and our own exports
    modelopt.py             NVIDIA ModelOpt's W4A16_NVFP4, NVFP4, and NVFP4_AWQ where its scales were folded
    torchao.py              torchao's NVFP4Tensor, whose block scales are swizzled
    packed_linear.py        what they answer with
    described.py            how a config is held against NVFP4 and against the tensors

All of them store `w = e2m1(code) * e4m3(block scale) * decode scale`, under other names, with the scalar as a
divisor or as a multiplier, and block scales in rows or in the order of tensor cores. What is said about each layout was
measured with the library that writes it.

The writer is taken from what the directory says about itself, and its tensors must agree with that. Guessing from
tensor names would accept a file whose config promises something else, and it is the config that engines follow.

A checkpoint made for 4-bit activations (W4A4) is computed here with activations in 16 bits. That is more precise than
what it was made for, and it is not what the engine will compute, so the reader of such a checkpoint is told once.
"""

from collections.abc import Mapping
from typing import Any

from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.layouts import compressed_tensors, modelopt, torchao
from qerl_compile.layouts.packed_linear import Form, Layout, PackedLinear, positive_scalar
from qerl_compile.wording import refuse_checkpoint, shown

__all__ = ["Form", "Layout", "PackedLinear", "layout_of", "positive_scalar"]

OWN_METHOD = "qerl-nvfp4"
"""quant_method of directories that our own transformers quantizer opens; the tensors are compressed-tensors'."""

OWN_VERSION = 1


def layout_of(checkpoint: CheckpointDirectory) -> Layout:
    """Say which modules of a checkpoint are packed and by which tensors; a dense checkpoint has none.

    Raises:
        CheckpointError: a quantization that is not NVFP4, a config that is malformed or contradicts the tensors, or a
            packed module of which a tensor is missing.
    """
    where = f"{checkpoint.root / 'config.json'}: quantization_config"
    given = checkpoint.config.get("quantization_config")
    if given is None:
        beside = modelopt.config_beside(checkpoint)
        return compressed_tensors.undescribed(checkpoint) if beside is None else modelopt.read(checkpoint, *beside)
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if isinstance(given, Mapping):
        if method in ("compressed-tensors", OWN_METHOD):
            _check_own_version(given, where)
            return compressed_tensors.read(checkpoint, given, where)
        if modelopt.speaks(given):
            return modelopt.read(checkpoint, given, where)
        if method == "torchao":
            return torchao.read(checkpoint, given, where)
    number_format = given.get("format") if isinstance(given, Mapping) else None
    refuse_checkpoint(
        where,
        "no quantization, or NVFP4 as compressed-tensors, ModelOpt or torchao write it",
        f"quant_method {shown(method)}" + (f", format {shown(number_format)}" if number_format else ""),
        do="Start from the bf16 checkpoint of this model.",
    )


def _check_own_version(given: Mapping[str, Any], where: str) -> None:
    version = given.get("format_version", OWN_VERSION)
    if given.get("quant_method") == OWN_METHOD and version != OWN_VERSION:
        refuse_checkpoint(
            f"{where}.format_version", str(OWN_VERSION), shown(version), do="Upgrade qerl-compile, or export again."
        )
