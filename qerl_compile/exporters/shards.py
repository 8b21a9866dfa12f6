"""Write tensors as safetensors shards without holding the model twice.

    Entry       what a tensor will be in the file: its source in the model, dtype and shape; nothing is converted yet
    shards      entries are dealt out by size alone (huggingface_hub's rule: in order, as many as fit)
    writing     one shard's entries are converted, moved to the CPU, written, and dropped before the next shard begins

So the memory above the model is one shard at most, and less where an entry needs no conversion: a bfloat16 tensor that
lies contiguous on the CPU is written from where it lies, for safetensors takes pointers. A float32 or CUDA model costs
a full shard. One tensor at a time would need the header written by hand; a smaller `shard_size_bytes` does the same.

Order in a file has no meaning; entries are sorted by module so that a reader which streams a shard finishes layer by
layer.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of the file, not made yet.

    Attributes:
        source: the model's own tensor, on its device.
        dtype: what the file holds.
        shape: what the file holds; as many elements as `source`.
    """

    source: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, source: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> "Entry":
        """An entry like `source`, but for what is given."""
        return cls(source, dtype or source.dtype, tuple(source.shape) if shape is None else shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """Make it: contiguous, on the CPU; the source itself where that is so already."""
        return self.source.detach().to("cpu", self.dtype).reshape(self.shape).contiguous()


def in_model_order(model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Sort entries by the module they belong to; entries of one module keep their order."""
    place = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}

    def module_of(name: str) -> int:
        path = name.rpartition(".")[0]
        while path not in place:  # an expert, which is no module of its own
            path = path.rpartition(".")[0]
        return place[path]

    return dict(sorted(entries.items(), key=lambda item: module_of(item[0])))


def write_shards(entries: Mapping[str, Entry], directory: Path, shard_size_bytes: int) -> None:
    """Write `model.safetensors`, or shards and their index.

    Args:
        entries: by the name that each has in the file.
        directory: exists.
        shard_size_bytes: a shard holds at most this many bytes, or one tensor.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.size_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: entries[name].tensor() for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
