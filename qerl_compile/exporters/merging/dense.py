"""Write a merged model as a dense bf16 Hugging Face directory, one shard in memory at a time.

What each tensor is (modes.py): a merged linear is summed in float32 and rounded to bf16 once; a linear without an
adapter is the master's, or the decoded one; a trained norm is the trained one; the rest is the model's own. Sums are
made on the model's device, shard by shard, and the packed model itself is left as it is: what coexists with it is one
shard.

The directory has nothing of ours in it but its card: transformers, vLLM and every quantizer take it as a bf16 model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import adapters_of, trained_norms_of
from qerl_compile.exporters.card import Card, provenance, shown_base, write_card
from qerl_compile.exporters.merging.dense_names import dense_shapes
from qerl_compile.exporters.merging.held import Held
from qerl_compile.exporters.merging.master import Master
from qerl_compile.exporters.merging.modes import delta
from qerl_compile.exporters.model_config import write_model_config
from qerl_compile.exporters.shards import Entry, write_shards
from qerl_compile.formats.nvfp4 import dequantize

DTYPE = torch.bfloat16
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True, eq=False)
class _Computed(Entry):
    """A tensor that is computed when its shard is written; `source` is its shape on the meta device."""

    compute: Callable[[], Tensor]

    def tensor(self) -> Tensor:
        return self.compute().cpu().contiguous()


class DenseMerge:
    """The tensors of a dense merge, computed when asked for.

    Args:
        model: a transformed model with an adapter.
        master: its bf16 weights, for the mode bf16-master; None merges into the decoded weights.
    """

    def __init__(self, model: nn.Module, master: Master | None) -> None:
        self.model, self.master = model, master
        self.shapes = dense_shapes(model)
        self._held = Held(model)
        self._adapters, self._norms = adapters_of(model), trained_norms_of(model)

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """Return one of `shapes`: bf16 if it is a float, on the model's device.

        Raises:
            ExportError, CheckpointError: the master is another model's, or damaged.
        """
        path, _, leaf = name.rpartition(".")
        packed = self._held.packed(name)
        if self.master is not None:
            tensor = self.master.read(name)
        elif packed is not None:
            tensor = dequantize(packed, torch.float32)
        else:
            tensor = self._held.tensor(name).detach()
        if leaf == "weight" and path in self._norms:
            tensor = self._norms[path].detach()
        if leaf == "weight" and path in self._adapters:
            tensor = tensor.float() + delta(self._adapters[path])
        return tensor.to(DTYPE) if tensor.is_floating_point() else tensor

    def entry(self, name: str) -> Entry:
        """Return what the shard writer needs to know of a tensor; nothing is computed yet."""
        held = self._held.tensor(name)
        dtype = DTYPE if held.is_floating_point() else held.dtype
        shape = self.shapes[name]
        return _Computed(torch.empty(shape, dtype=dtype, device="meta"), dtype, shape, lambda: self.tensor(name))


def write_dense(
    merge: DenseMerge, directory: Path, *, mode: str, tokenizer: Any = None, base_name: str | None = None
) -> None:
    """Write config, shards, tokenizer and card into an empty directory.

    Args:
        merge: what is written.
        directory: exists and is empty.
        mode: for the card.
        tokenizer: anything with `save_pretrained`, or None.
        base_name: for the card; default: what the model recorded.

    Raises:
        ExportError, CheckpointError: as `DenseMerge.tensor`.
    """
    write_model_config(merge.model, directory, DTYPE)
    write_shards({name: merge.entry(name) for name in merge.shapes}, directory, SHARD_BYTES)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_card(directory, _card(merge, mode, base_name))


def _card(merge: DenseMerge, mode: str, base_name: str | None) -> Card:
    base, recipe_yaml = provenance(merge.model, base_name)
    adapters, norms = adapters_of(merge.model), trained_norms_of(merge.model)
    into = "the bf16 weights of the base model" if merge.master is not None else "the decoded 4-bit weights, in bf16"
    return Card(
        title=f"{shown_base(base) or type(merge.model).__name__}, merged ({mode})",
        summary=f"A LoRA adapter, trained by qerl-compile on 4-bit weights, merged into {into}.",
        facts={
            "Format": "bfloat16, dense",
            "Merge": f"`{mode}`: {len(adapters)} adapted linears, summed in float32 and rounded once",
            **({"Trained norms": f"{len(norms)}, as trained, in bfloat16"} if norms else {}),
        },
        usage="vllm serve THIS_DIRECTORY",
        base_name=base,
        relation="finetune",
        library="transformers",
        recipe_yaml=recipe_yaml,
    )
