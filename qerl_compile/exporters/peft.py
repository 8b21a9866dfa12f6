"""Export the adapter of a transformed model as a PEFT directory that can be published.

The two files of `adapter_files`, the tokenizer, and a card that says which base the adapter saw: it was trained against
weights rounded to NVFP4, so on the bf16 base it gives the same function only up to that rounding. Adding B·A into 4-bit
weights would round the adapter itself away (huggingface/peft#2321), so nothing is merged.

Norms that were trained are whole tensors beside the adapter (`modules_to_save`). PEFT reads them and vLLM does not
(vllm-project/vllm issue 9280), so `norms_in_base` leaves them out, for a base exported with the same switch.
"""

from os import PathLike
from typing import Any

from torch import nn

from qerl_compile.adapter_files import adapter_tensors, adapters_of, trained_norms_of, write_adapter_files
from qerl_compile.exporters.card import Card, provenance, shown_base, write_card
from qerl_compile.staged_write import refuse_existing, staged_directory


def export_peft(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    tokenizer: Any = None,
    base_name: str | None = None,
    norms_in_base: bool = False,
) -> None:
    """Write adapter, tokenizer and card.

    Args:
        model: its adapted modules have Parameters `lora_A`, `lora_B` and attributes `lora_rank`, `lora_alpha`; norms
            that it trains have a Parameter `trained_weight`.
        out_dir: must not exist.
        tokenizer: anything with `save_pretrained`, or None.
        base_name: hub id or path of the base model; default: what `model.qerl` recorded.
        norms_in_base: leave trained norms out, because the base that the adapter is loaded on has them.

    Raises:
        ExportError: no adapter, NaN or Inf in it, or `out_dir` exists.
    """
    refuse_existing(out_dir)
    base, recipe_yaml = provenance(model, base_name)
    name = shown_base(base) or type(model).__name__
    tensors, adapters = adapter_tensors(model, norms=not norms_in_base), adapters_of(model)
    with staged_directory(out_dir) as stage:
        write_adapter_files(model, stage, tensors, base_name=base)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        shown_ranks = ", ".join(str(rank) for rank in sorted({each.rank for each in adapters.values()}))
        card = Card(
            title=f"LoRA adapter for {name}",
            summary="A LoRA adapter written by qerl-compile; it goes on top of the base model and is not merged.",
            facts={
                "Adapted modules": str(len(adapters)),
                "Rank": shown_ranks,
                "Parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
                "Base that the adapter saw": _seen_base(model),
                **_norms(model, norms_in_base=norms_in_base),
            },
            usage=_usage(model, name, norms_in_base=norms_in_base),
            base_name=base,
            relation="adapter",
            library="peft",
            tags=["lora"],
            recipe_yaml=recipe_yaml,
        )
        write_card(stage, card)


def _seen_base(model: nn.Module) -> str:
    packed = sum("weight_packed" in module._parameters for module in model.modules())
    return f"{packed} linears rounded to NVFP4, the rest unchanged" if packed else "the base model itself"


def _norms(model: nn.Module, *, norms_in_base: bool) -> dict[str, str]:
    count = len(trained_norms_of(model))
    if not count:
        return {}
    where = "in the base that was exported with the trained norms; on another base this adapter is another function"
    return {"Trained norms": f"{count}, {where if norms_in_base else 'here, as whole tensors (`modules_to_save`)'}"}


def _usage(model: nn.Module, name: str, *, norms_in_base: bool) -> str:
    if not trained_norms_of(model):
        return f"vllm serve {name} --enable-lora --lora-modules adapter=THIS_DIRECTORY"
    if norms_in_base:
        return "vllm serve BASE_WITH_TRAINED_NORMS --enable-lora --lora-modules adapter=THIS_DIRECTORY"
    return "python -c \"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('THIS_DIRECTORY')\""
