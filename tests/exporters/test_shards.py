"""Shards are written one at a time, and nothing of one is kept while the next is made."""

import weakref
from typing import ClassVar

import torch
from safetensors.torch import load_file

from qerl_compile.exporters.shards import Entry, write_shards


class Watched(Entry):
    """An entry that knows which tensors, made by any entry of its kind, are still alive."""

    alive: ClassVar = weakref.WeakSet()
    most_bytes = 0

    def tensor(self):
        made = super().tensor()
        Watched.alive.add(made)
        Watched.most_bytes = max(Watched.most_bytes, sum(t.numel() * t.itemsize for t in Watched.alive))
        return made


def test_at_most_one_shard_is_held_in_memory(tmp_path):
    sources = {f"layer.{index}": torch.randn(10, 10) for index in range(20)}
    entries = {name: Watched(source, torch.bfloat16, (100,)) for name, source in sources.items()}
    write_shards(entries, tmp_path, 1000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert Watched.most_bytes == 1000
    assert not Watched.alive
    found = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert all(torch.equal(found[name], source.bfloat16().reshape(100)) for name, source in sources.items())


def test_what_needs_no_conversion_is_written_from_where_it_lies():
    weight = torch.randn(8, 4, dtype=torch.bfloat16)
    assert Entry.of(weight).tensor().data_ptr() == weight.data_ptr()
    assert Entry.of(weight, shape=(32,)).tensor().data_ptr() == weight.data_ptr()
    assert Entry.of(weight, torch.float32).tensor().data_ptr() != weight.data_ptr()
    assert Entry.of(weight.t()).tensor().is_contiguous()
