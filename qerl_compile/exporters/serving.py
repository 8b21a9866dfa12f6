"""Write a checkpoint for a serving engine: the steps that all layouts share.

    read        what is served, judged before a byte is written      served_state.py, fused_partners.py
    lay out     names, dtypes, shapes of the file's tensors          compressed_tensors.py, modelopt.py
    write       config, shards, tokenizer, generation config         shards.py
    check       against the table of what the engine accepts         schemas.py
    card        README.md                                            served_card.py
    publish     by one rename, whole or not at all                   staged_write.py

LoRA factors are not written: an adapter is a file of its own (peft.py) which engines load on top, because merging it
into 4-bit weights rounds it away. Norms that were trained are part of the adapter, so the base's are written;
`norms_in_base` writes the trained ones instead, rounded to bfloat16, because vLLM refuses an adapter that brings norms.

Activations stay in 16 bits unless asked for: that is the function that was trained, and on Hopper it is what engines
compute anyway. The same goes for the cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from qerl_compile.errors import ExportError
from qerl_compile.exporters.card import write_card
from qerl_compile.exporters.fused_partners import check_partners
from qerl_compile.exporters.model_config import write_model_config
from qerl_compile.exporters.schemas import check_schema, split_target
from qerl_compile.exporters.served_card import served_card
from qerl_compile.exporters.served_experts import refuse_nameless_stacks
from qerl_compile.exporters.served_state import DENSE_DTYPE, ServedState, served_state
from qerl_compile.exporters.shards import Entry, in_model_order, write_shards
from qerl_compile.passes.quantize import Direction
from qerl_compile.staged_write import refuse_existing, staged_directory


@dataclass(frozen=True)
class Layout:
    """How a format writes what is served.

    Attributes:
        name: its quant_method.
        shown: its name in the card.
        direction: of the scalars it stores.
        label: what it calls the scheme, such as NVFP4A16.
        entries: the file's tensors.
        describe: writes quantization_config into the config.json of a directory, and files of its own.
        for_engines: whether programs read it that know a model by the names of its published checkpoints.
    """

    name: str
    shown: str
    direction: Direction
    label: Callable[[ServedState], str]
    entries: Callable[[ServedState], dict[str, Entry]]
    describe: Callable[[ServedState, Path], None]
    for_engines: bool = True


def write_checkpoint(
    model: nn.Module,
    out_dir: str | PathLike[str],
    layout: Layout,
    *,
    target: str,
    tokenizer: Any = None,
    base_name: str | None = None,
    shard_size_bytes: float = 5e9,
    norms_in_base: bool = False,
    activations: str = "16",
    kv_cache: str = "16",
) -> None:
    """Write config, safetensors shards, tokenizer and card.

    Args:
        model: a `PreTrainedModel` with packed linears (the state is described in passes/quantize.py).
        out_dir: must not exist.
        layout: the format.
        target: the engine, with a version if it is to be that one: "vllm", "vllm==0.33".
        tokenizer: anything with `save_pretrained`, or None.
        base_name: hub id or path of the base model; default: what `model.qerl` recorded.
        shard_size_bytes: a shard holds at most this many bytes, or one tensor. It is also what is held in memory.
        norms_in_base: write trained norms in the place of the base's, if there are any.
        activations: "16" or "4" bits; 4 needs calibrated input scales.
        kv_cache: "16" or "8" bits; 8 needs calibrated scales of keys and values.

    Raises:
        ExportError: nothing is packed, fused partners disagree, NaN or Inf, scales that are missing, experts
            without names, an engine that does not accept the result, a shard size that is no number of bytes, or
            `out_dir` exists.
    """
    refuse_existing(out_dir)
    split_target(target)
    if not 1 <= shard_size_bytes < math.inf:
        do = "Give a number, such as 5e9; each shard holds one tensor at least."
        raise ExportError(
            where="shard_size_bytes", expected="a finite number of at least 1", got=repr(shard_size_bytes), do=do
        )
    if layout.for_engines:
        refuse_nameless_stacks(model)
    state = served_state(model, norms_in_base=norms_in_base, activations=activations, kv_cache=kv_cache)
    check_partners(model, state.packed, state.numbers(layout.direction))
    entries = in_model_order(model, layout.entries(state))
    with staged_directory(out_dir) as stage:
        write_model_config(model, stage, DENSE_DTYPE)
        layout.describe(state, stage)
        write_shards(entries, stage, int(shard_size_bytes))
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        _refuse_problems(stage, target)
        total_bytes = sum(entry.size_bytes for entry in entries.values())
        card = served_card(
            model,
            state,
            label=layout.label(state),
            shown_format=layout.shown,
            method=layout.name,
            target=target,
            total_bytes=total_bytes,
            base_name=base_name,
            norms_in_base=norms_in_base,
        )
        write_card(stage, card)


def dense_entries(state: ServedState) -> dict[str, Entry]:
    """What both layouts write alike: all that is not packed, floating point in bfloat16."""
    return {
        name: Entry.of(tensor, DENSE_DTYPE if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.dense.items()
    }


def _refuse_problems(stage: Path, target: str) -> None:
    problems = check_schema(stage, target)
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ExportError(where=first.where, expected=first.expected, got=f"{first.got}{more}", do=first.do)
