"""Open a model directory: everything is judged before any tensor is read or any library touches it.

    checkpoint = open_checkpoint("path/to/model")
    checkpoint.tensors["model.embed_tokens.weight"]   # TensorEntry(file, dtype, shape, begin, end)

Libraries are generous here: transformers 5.23 follows an index to `../../etc/x`, fills a missing tensor with random
numbers, and computes with NaN weights. So the order is: names and kinds of the entries (checkpoint_entries.py), what
the configs would run (checkpoint_config.py), which shards there are, each shard's header against its size
(safetensors_header.py), the index against the headers. Whoever holds a `CheckpointDirectory` may open the shards.

What remains for the loader: `compare_names` against the model's own names and `finite_or_raise` on each tensor as it
arrives (checkpoint_tensors.py). What nobody covers: a directory that changes while it is being read.
"""

import os
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from qerl_compile.checkpoint_config import read_bounded, read_config
from qerl_compile.checkpoint_entries import checked_entries
from qerl_compile.safetensors_header import MAX_TENSORS, TensorEntry, checked_name, read_header
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import listed, nearest, refuse_checkpoint, shown

__all__ = ["CheckpointDirectory", "TensorEntry", "listed_tensors", "open_checkpoint"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 12_000_000  # DeepSeek-V3's index of 91,000 tensors has 9 MB


@dataclass(frozen=True)
class CheckpointDirectory:
    """A model directory that passed every check.

    Invariants: each entry's file is one of `shards`; each shard is a regular file in `root` (or a blob of the same hub
    cache); the byte ranges cover their shard exactly; the index, if there is one, names exactly these tensors.
    """

    root: Path
    config: dict[str, Any]
    """Contents of config.json."""
    shards: tuple[Path, ...]
    """Files, in the order of their names."""
    tensors: dict[str, TensorEntry]
    """Entry by name, shard by shard, in the order of the data: reading in this order reads each file once, forward."""


def open_checkpoint(path: str | PathLike[str], *, trust_remote_code: bool = False) -> CheckpointDirectory:
    """Judge a model directory and tell where its tensors lie. Reads headers and JSON, no tensor.

    Args:
        path: a directory with config.json and safetensors files.
        trust_remote_code: allow Python files in it and configs that name code. Nothing here runs them.

    Raises:
        CheckpointError: for the first fault, with the file and the tensor or key at which it lies.
    """
    root = Path(path)
    if not os.path.isdir(root):  # noqa: PTH112  # Path.is_dir raises for a name of 5000 characters
        refuse_checkpoint(
            shown(str(root)),
            "a model directory",
            "a file" if os.path.isfile(root) else "nothing there",  # noqa: PTH113
            do="Pass the directory that holds config.json and the safetensors files.",
        )
    files = checked_entries(root, trust_remote_code=trust_remote_code)
    config = read_config(root, files, trust_remote_code=trust_remote_code)
    weight_map = _weight_map(root) if INDEX in files else None
    shard_names = _shard_names(root, files, weight_map)
    tensors: dict[str, TensorEntry] = {}
    for shard in shard_names:
        found = read_header(root / shard, max_tensors=MAX_TENSORS - len(tensors))
        twice = [name for name in found if name in tensors]
        if twice:
            refuse_checkpoint(
                str(root / shard),
                "each tensor in one shard",
                f"{listed(twice)} again, after {tensors[twice[0]].file.name}",
                do="Fetch the checkpoint again; shards of two versions may be mixed.",
            )
        tensors.update(found)
    if not tensors:
        refuse_checkpoint(str(root), "at least one tensor", "none", do="Fetch the checkpoint again.")
    if weight_map is not None:
        _check_agreement(root / INDEX, weight_map, tensors)
    return CheckpointDirectory(root, config, tuple(root / shard for shard in shard_names), tensors)


def listed_tensors(root: Path) -> list[str]:
    """Return the names of tensors that the index of a directory lists; its shards need not be there.

    Raises:
        CheckpointError: the index is unreadable or malformed, or leads out of the directory.
    """
    return list(_weight_map(root))


def _weight_map(root: Path) -> dict[str, str]:
    """The index's map from tensor name to shard name, each name judged."""
    file = root / INDEX
    max_values = MAX_TENSORS + 1000  # beyond the map there are a few lines of metadata
    index = parse_json(read_bounded(file, MAX_INDEX_BYTES), where=str(file), encoding="ascii", max_values=max_values)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse_checkpoint(
            f"{file}: weight_map", "a mapping of tensor names to shards", shown(weight_map), do="Fetch it again."
        )
    for name, shard in weight_map.items():
        checked_name(name, f"{file}: weight_map")
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]{0,240}\.safetensors", shard, re.ASCII):
            refuse_checkpoint(
                f"{file}: weight_map[{shown(name)}]",
                "the plain name of a .safetensors file in this directory",
                shown(shard),
                do="Do not use this checkpoint; an index must not lead anywhere else.",
            )
    return weight_map


def _shard_names(root: Path, files: list[str], weight_map: dict[str, str] | None) -> list[str]:
    if weight_map is None:
        if SINGLE not in files:
            guess = nearest(SINGLE, (name for name in files if name.endswith(".safetensors")))
            refuse_checkpoint(
                str(root),
                f"{SINGLE} or {INDEX}",
                f"neither (there is {shown(guess)})" if guess else "neither",
                do="Save the model with save_pretrained; GGUF and pickles are not read.",
            )
        wanted = {SINGLE}
    else:
        wanted = set(weight_map.values())
        missing = sorted(wanted.difference(files))
        if missing:
            refuse_checkpoint(
                str(root / INDEX), "every shard it names", f"no {listed(missing)}", do="Fetch the missing shards."
            )
    # transformers prefers model.safetensors to the index, so what is judged must be all that could be read.
    extra = [name for name in files if re.fullmatch(r"model.*\.safetensors", name) and name not in wanted]
    if extra:
        refuse_checkpoint(
            str(root),
            "no weights but " + listed(sorted(wanted)),
            f"also {listed(extra)}",
            do="Move the surplus files out of the directory.",
        )
    return sorted(wanted)


def _check_agreement(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        refuse_checkpoint(
            str(index),
            f"tensor {shown(absent[0])} in {weight_map[absent[0]]}",
            f"{len(absent)} listed but in no shard: {listed(absent)}",
            do="Fetch index and shards again, from one version.",
        )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        refuse_checkpoint(
            str(tensors[unlisted[0]].file),
            "only tensors that the index lists",
            f"{len(unlisted)} more: {listed(unlisted)}",
            do="Fetch index and shards again, from one version.",
        )
    for name, shard in weight_map.items():
        if tensors[name].file.name != shard:
            refuse_checkpoint(
                f"{index}: weight_map[{shown(name)}]",
                f"the shard that holds it, {tensors[name].file.name}",
                shard,
                do="Fetch index and shards again, from one version.",
            )
