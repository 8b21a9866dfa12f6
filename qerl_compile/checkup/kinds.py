"""Every fault that `inspect` knows: how bad, what it does to which reader, and the one thing to do.

`fatal`: at least one reader of this format computes wrong numbers, computes with memory that nobody filled, or refuses.
`warning`: every reader computes what the file says, at some cost or risk.

The effects are those of design/formats.md, sections 1.2 to 2.4 and 5: vLLM 0.33 and transformers 5.17 were run, SGLang
0.5.23 and TensorRT-LLM were read.
"""

from typing import Literal, NamedTuple

Severity = Literal["fatal", "warning"]


class Kind(NamedTuple):
    """One row of the table."""

    severity: Severity
    effect: str
    do: str


EXPORT_AGAIN = "Export the checkpoint again."
_GARBAGE = "every reader computes garbage without an error"

KINDS: dict[str, Kind] = {
    # what config.json says
    "config-missing": Kind(
        "fatal",
        "engines build a dense model and find no weights for it",
        "Export it again, so that config.json describes the tensors.",
    ),
    "config-invalid": Kind(
        "fatal", "compressed-tensors, and with it vLLM, SGLang and transformers, refuses the config", EXPORT_AGAIN
    ),
    "scheme": Kind(
        "fatal",
        "engines choose another scheme: vLLM raises, transformers decodes wrong weights",
        'NVFP4 is num_bits 4, type "float", strategy "tensor_group", group_size 16, symmetric.',
    ),
    "status-missing": Kind(
        "fatal",
        "transformers leaves the weights uninitialised without a word (NaN logits); vLLM does not mind",
        'Set "quantization_status": "compressed".',
    ),
    "ignored-but-packed": Kind(
        "fatal", "engines build a dense layer and find no weight for it", "Remove the entry from the list."
    ),
    "dense-not-ignored": Kind(
        "fatal",
        "transformers leaves a packed layer uninitialised in its place (NaN); vLLM fails for all but the output head",
        "List it, as in ignore: [lm_head].",
    ),
    "head-not-excluded": Kind("warning", "engines that quantize output heads look for packed tensors", "List it."),
    "partners-split": Kind(
        "fatal",
        "vLLM raises ValueError: an engine lays these linears into one matrix, which is packed or dense as a whole",
        "Pack all of them, or leave all dense.",
    ),
    "pattern-not-run": Kind(
        "warning", "a regular expression that could run for minutes; what it selects was not looked at", "List names."
    ),
    "algorithm": Kind(
        "fatal",
        "vLLM accepts NVFP4 and W4A16_NVFP4 only, among ModelOpt's 4-bit formats",
        "Export it as NVFP4 or W4A16_NVFP4.",
    ),
    "configs-disagree": Kind(
        "fatal",
        "vLLM believes config.json, TensorRT-LLM hf_quant_config.json",
        "Write both from one description.",
    ),
    "second-config-missing": Kind(
        "warning",
        "TensorRT-LLM finds no group_size in the flat form of config.json",
        "Write hf_quant_config.json beside it.",
    ),
    # what headers show
    "tensor-missing": Kind("fatal", "readers leave the parameter uninitialised, or refuse", EXPORT_AGAIN),
    "tensor-unexpected": Kind("fatal", "vLLM has no parameter for it and stops", EXPORT_AGAIN),
    "shape": Kind("fatal", "readers refuse, or read past the weights", EXPORT_AGAIN),
    "codes-dtype": Kind("fatal", "engines cast the numbers, which are no codes then", "Save the codes as uint8."),
    "block-scale-integers": Kind(
        "fatal",
        f"engines cast the byte to a number instead of taking its bits as E4M3: {_GARBAGE}",
        "Save weight_scale as float8_e4m3fn (tensor.view(torch.float8_e4m3fn)).",
    ),
    "block-scale-wide": Kind(
        "warning",
        "vLLM and transformers cast them back without loss; TensorRT-LLM stops at any dtype but float8_e4m3fn",
        "Save weight_scale as float8_e4m3fn.",
    ),
    "scalar-form": Kind("warning", "accepted by all readers that were tried", "Save it as float32."),
    "input-scale-missing": Kind(
        "fatal",
        "vLLM computes with an uninitialised scale, transformers gets NaN",
        "Calibrate it and export it again, or export it as weight-only.",
    ),
    "input-scale-unexpected": Kind(
        "fatal",
        "vLLM has no parameter for it and stops; transformers ignores it",
        "Remove the tensor, or describe input_activations in the config.",
    ),
    "kv-scale-missing": Kind("warning", "engines cache keys and values with scale 1", "Calibrate the cache again."),
    "kv-scale-unexpected": Kind(
        "warning", "the config speaks of no cache in 8 bits", "Describe it in the config, or remove the tensors."
    ),
    # what the numbers show
    "block-scale-nan": Kind(
        "fatal",
        "NaN outputs: silently in vLLM's compressed-tensors path, RuntimeError in its ModelOpt path",
        "Quantize this layer again, or leave it dense; ModelOpt writes NaN for a matrix of zeros.",
    ),
    "block-scale-negative": Kind(
        "fatal", "Marlin re-encodes block scales without a sign: the weights change", "Quantize this layer again."
    ),
    "scalar-not-positive": Kind(
        "fatal", "the layer's weights are zero, infinite or NaN; TensorRT-LLM refuses", "Quantize this layer again."
    ),
    "scale-reciprocal": Kind(
        "fatal",
        _GARBAGE,
        "Write its reciprocal: compressed-tensors stores 2688/amax, ModelOpt and torchao store amax/2688.",
    ),
    "scale-implausible": Kind("fatal", _GARBAGE, "Quantize this layer again."),
    "input-scale-implausible": Kind(
        "warning", "inputs would saturate or vanish where activations are in 4 bits", "Calibrate it again."
    ),
    "fused-scales-differ": Kind(
        "fatal",
        "vLLM warns and SGLang does not: both use one scale for all, so the others' weights are wrong (0.57 relative "
        "rms instead of 0.095); TensorRT-LLM refuses; transformers is correct",
        "Quantize these linears with one amax.",
    ),
    "fused-input-scales-differ": Kind(
        "fatal", "vLLM and SGLang use one of them for all; TensorRT-LLM refuses", "Calibrate their common input once."
    ),
    "not-finite": Kind("fatal", "NaN outputs", "Do not use this checkpoint; export or train it again."),
    "marlin-flush": Kind(
        "warning",
        "Marlin (vLLM and SGLang before Blackwell) takes block scales below 2^-6 for zero, with their weights",
        "Quantize with larger block scales; a few such blocks are harmless.",
    ),
    # what the base shows
    "nibbles-swapped": Kind(
        "fatal", _GARBAGE, "Swap the halves of every byte: the even column belongs into the low nibble."
    ),
    "differs-from-base": Kind(
        "fatal", "these are not the base's weights", "Check that the base is the right one, then quantize again."
    ),
    "far-from-base": Kind(
        "warning",
        "less than a plain rounding keeps (about 20 dB); scaled channels, 2:4 sparsity or training explain it too",
        "Compare perplexities.",
    ),
}
