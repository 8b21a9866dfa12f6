"""Write a checkpoint so that at every moment, whatever fails, the newest one that can be loaded is whole.

    RUN/checkpoints/step-000025/
        adapter/              PEFT files: LoRA factors and trained norms, float32
        optimizer.json, optimizer.safetensors
        random.json, random.safetensors
        progress.json         counters, recipe, base model, versions
        manifest.json         size and SHA-256 of each of these

The directory is filled under a hidden name, synced, and renamed (staged_write.py); only then are older ones taken away,
each renamed to a hidden name first, so that no visible checkpoint is ever half there. The crash tests stop a save
before and after every file operation and find the old newest or the new one, complete.

Taken away are all but the `kept` newest, and also those of later steps: `latest` passed them over as damaged, the run
went back behind them, and they are not part of it any more. A whole checkpoint of the same run and step is left as it
is, for writing it again could only lose it.

One process writes to a run. What a killed one left behind (`.partial`, `.del`) the next save removes.
"""

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import adapter_tensors, write_adapter_files
from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.rl.checkpoints.finding import checkpoints_dir, name_of, opened, step_dirs
from qerl_compile.rl.checkpoints.manifest import ADAPTER, OPTIMIZER, PROGRESS, RANDOM, write_manifest
from qerl_compile.rl.checkpoints.optimizer_state import optimizer_state
from qerl_compile.rl.checkpoints.plain_values import pack
from qerl_compile.rl.checkpoints.progress import Identity, Progress, decode, encode
from qerl_compile.rl.checkpoints.random_states import random_states
from qerl_compile.staged_write import staged_directory, sync
from qerl_compile.strict_json import parse_json

MAX_JSON_BYTES = 64_000_000

_LEFT_BEHIND = re.compile(r"\.step-\d{6,}\.[0-9a-f]{8}\.(partial|del)")


def save(
    run_dir: Path,
    identity: Identity,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    generators: dict[str, Any] | None = None,
    kept: int = 2,
) -> Path:
    """Write the checkpoint of a finished step, then take old ones away.

    Args:
        run_dir: the run; `checkpoints/` in it is made.
        identity: of the run.
        progress: its counters after the step.
        model: with adapters.
        optimizer: over adapters and trained norms only.
        generators: `random_states()` after the step; None for those of now.
        kept: how many of the newest stay, at least 1.

    Returns:
        The directory.

    Raises:
        ExportError: the state is not finite or cannot be written as values, a whole checkpoint of another course has
            the name, or the disk refuses; the checkpoints that were there still are, except those in excess.
    """
    final = checkpoints_dir(run_dir) / name_of(progress.step)
    told = encode(identity, progress)
    try:
        _remove_left_behind(final.parent)
        if not _is_there(final, told):
            parts = {
                RANDOM: pack(random_states() if generators is None else generators, RANDOM),
                OPTIMIZER: pack(optimizer_state(model, optimizer), OPTIMIZER),
            }
            tensors = adapter_tensors(model)
            if os.path.lexists(final):  # damaged, since `latest` did not take it; its name would be in the way
                _take_away(final)
            with staged_directory(final, "a checkpoint") as stage:
                (stage / ADAPTER).mkdir()
                write_adapter_files(model, stage / ADAPTER, tensors, base_name=identity.base)
                for name, (value, parted) in parts.items():
                    _write_pair(stage, name, value, parted)
                (stage / PROGRESS).write_bytes(told)
                write_manifest(stage)
        _prune(run_dir, progress.step, kept)
    except OSError as fault:
        raise ExportError(
            where=str(final),
            expected="room and permission for a checkpoint",
            got=fault.strerror or str(fault),
            do="Make room on that disk, then resume; earlier checkpoints are whole.",
        ) from fault
    return final


def _write_pair(stage: Path, name: str, value: Any, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    text = json.dumps(value, allow_nan=False).encode()
    if len(text) > MAX_JSON_BYTES:
        do = "Train fewer parameters."
        raise ExportError(where=name, expected=f"at most {MAX_JSON_BYTES} bytes", got=str(len(text)), do=do)
    (stage / f"{name}.json").write_bytes(text)
    save_file(tensors, stage / f"{name}.safetensors", metadata={"format": "pt"})


def _is_there(final: Path, told: bytes) -> bool:
    """Whether the checkpoint is there already; False if what has its name is damaged."""
    if not final.is_dir():
        return False
    where = str(final / PROGRESS)
    try:
        there = opened(final)[:2]
    except CheckpointError:
        return False
    if there != decode(parse_json(told, where=where), where)[:2]:  # versions may differ
        do = "Move that checkpoint away, or train with another -o."
        expected = "no checkpoint of this step, or this one"
        raise ExportError(where=str(final), expected=expected, got="a whole one of another run or course", do=do)
    return True


def _prune(run_dir: Path, step: int, kept: int) -> None:
    here = step_dirs(run_dir)
    stays = [number for number in here if number <= step][: max(1, kept)]
    for number, directory in here.items():
        if number not in stays:
            _take_away(directory)


def _take_away(directory: Path) -> None:
    hidden = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.del"
    directory.rename(hidden)
    sync(directory.parent)
    _remove(hidden)


def _remove_left_behind(folder: Path) -> None:
    if folder.is_dir():
        for entry in folder.iterdir():
            if _LEFT_BEHIND.fullmatch(entry.name):
                _remove(entry)


def _remove(hidden: Path) -> None:
    """Nothing reads it any more, so what cannot be removed may stay."""
    if hidden.is_symlink() or hidden.is_file():
        hidden.unlink(missing_ok=True)
    else:
        shutil.rmtree(hidden, ignore_errors=True)
