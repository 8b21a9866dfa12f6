"""The model card of a served checkpoint: what is quantized and how, what is not in it, and how to serve it.

Numbers are counted in the state that was served and not taken from the recipe, so that they hold for checkpoints read
from elsewhere too. What is left out, adapter or trained norms, is said, with the flags by which the engine takes an
adapter beside the checkpoint.

What this module does not do: write the card (card.py), or state a quality, which is measured (verify/).
"""

from collections.abc import Mapping

from torch import nn

from qerl_compile.adapter_files import adapters_of, trained_norms_of
from qerl_compile.exporters.card import Card, provenance, shown_base
from qerl_compile.exporters.served_state import ServedState

USAGE: Mapping[str, str] = {
    "vllm": "vllm serve THIS_DIRECTORY",
    "sglang": "python -m sglang.launch_server --model-path THIS_DIRECTORY",
    "tensorrt-llm": "trtllm-serve THIS_DIRECTORY",
    "transformers": 'python -c "import qerl_compile; from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('THIS_DIRECTORY')\"",
}

WITH_ADAPTER: Mapping[str, str] = {
    "vllm": "--enable-lora --lora-modules NAME=ADAPTER_DIRECTORY",
    "sglang": "--lora-paths NAME=ADAPTER_DIRECTORY",
}


def served_card(
    model: nn.Module,
    state: ServedState,
    *,
    label: str,
    shown_format: str,
    method: str,
    target: str,
    total_bytes: int,
    base_name: str | None,
    norms_in_base: bool,
) -> Card:
    """Describe an export.

    Args:
        model: what is exported.
        state: what of it is served.
        label: the scheme, such as NVFP4A16.
        shown_format: the format in words.
        method: its quant_method, a hub tag.
        target: the engine, with or without a version.
        total_bytes: bytes of all tensors.
        base_name: hub id or path of the base; None: as the model recorded.
        norms_in_base: whether trained norms are in the file.
    """
    base, recipe_yaml = provenance(model, base_name)
    weights = sum(rows * columns for rows, columns in (each.shape for each in state.packed.values()))
    packed_bytes = sum(p.codes_NK2.numel() + p.block_decode_scale_NG.numel() + 4 for p in state.packed.values())
    activations = "in 4 bits, with calibrated input scales" if state.input_scales else "in 16 bits"
    cache = "in FP8, with calibrated scales" if state.kv_scales else "in 16 bits"
    adapters, norms = adapters_of(model), trained_norms_of(model)
    engine = target.partition("==")[0]
    beside = f" and served with `{WITH_ADAPTER[engine]}`" if engine in WITH_ADAPTER else ""
    adapter = (
        f"not included: LoRA factors of {len(adapters)} modules are exported separately (target `peft`){beside}"
        if adapters
        else "none"
    )
    trained = "included, trained" if norms_in_base else "not included: they are part of the adapter"
    return Card(
        title=f"{shown_base(base) or type(model).__name__}, {label}",
        summary="Linear weights in NVFP4 (4-bit E2M1, one E4M3 scale per 16 columns, one FP32 scale per matrix); "
        f"activations {activations}.",
        facts={
            "Format": shown_format,
            "Quantized linears": f"{len(state.packed)} ({weights:,} weights at {8 * packed_bytes / weights:.2f} bits)",
            "Dense": "the rest, in bfloat16: embeddings, norms, biases, and the linears under `ignore` in config.json",
            "KV cache": cache,
            "Size": f"{total_bytes:,} bytes of tensors",
            "Adapter": adapter,
            **({"Norms": f"{len(norms)} were trained beside the adapter; {trained}"} if norms else {}),
        },
        usage=USAGE[engine],
        base_name=base,
        relation="quantized",
        library="Model Optimizer" if method == "modelopt" else "transformers",
        tags=["nvfp4", method],
        recipe_yaml=recipe_yaml,
    )
