"""Find the newest whole checkpoint of a run, and put a run back into its state: everything or nothing.

    latest     names, files, sizes, hashes, progress.json    what is damaged is passed over, with its reason
    restore    recipe, base, trained parameters, optimizer, generators, adapter are judged;
               then adapter, optimizer and generators are set, in this order

A damaged newest checkpoint costs the steps since the one before it. A whole checkpoint of *another* run is no damage,
and there is nothing to fall back to: `restore` refuses it and names what differs. If every checkpoint is damaged,
`latest` raises, because starting again at step 0 without a word would lose a run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_reading import read_adapter
from qerl_compile.checkpoint_config import read_bounded
from qerl_compile.errors import CheckpointError
from qerl_compile.rl.checkpoints import optimizer_state, random_states
from qerl_compile.rl.checkpoints.finding import opened, step_dirs
from qerl_compile.rl.checkpoints.manifest import ADAPTER, OPTIMIZER, PROGRESS, RANDOM
from qerl_compile.rl.checkpoints.plain_values import unpack
from qerl_compile.rl.checkpoints.progress import Identity, Progress, refuse_other_run
from qerl_compile.rl.checkpoints.writing import MAX_JSON_BYTES
from qerl_compile.safetensors_header import read_header
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import refuse_checkpoint

MAX_VALUES = 4_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose files are those of its manifest. Invariant: its name is that of `progress.step`.

    Attributes:
        directory: RUN/checkpoints/step-NNNNNN.
        identity: of the run that wrote it.
        progress: its counters.
        versions: of the libraries that wrote it; see `version_changes`.
    """

    directory: Path
    identity: Identity
    progress: Progress
    versions: dict[str, str]

    @property
    def adapter(self) -> Path:
        """The PEFT directory in it."""
        return self.directory / ADAPTER


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was passed over, and the sentence that says why: file, expected, got."""

    directory: Path
    reason: str


def latest(run_dir: Path) -> tuple[Checkpoint | None, list[Rejected]]:
    """Return a run's newest whole checkpoint, and the newer ones that are damaged.

    Returns:
        (None, []) if the run has no checkpoint yet.

    Raises:
        CheckpointError: it has some, and every one is damaged.
    """
    rejected: list[Rejected] = []
    for directory in step_dirs(run_dir).values():
        try:
            return Checkpoint(directory, *opened(directory)), rejected
        except CheckpointError as fault:
            rejected.append(Rejected(directory, str(fault)))
    if rejected:
        refuse_checkpoint(
            str(run_dir),
            "a checkpoint that is whole",
            f"{len(rejected)} damaged; the newest: {rejected[0].reason.rstrip('.')}",
            do="Train again with another -o, or copy a whole checkpoint back.",
        )
    return None, []


def restore(checkpoint: Checkpoint, identity: Identity, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put model, optimizer and generators into the state of a checkpoint.

    Args:
        checkpoint: from `latest`.
        identity: of the run that is to go on.
        model: made from the recipe as at the run's beginning.
        optimizer: new, over the same parameters in the same order.

    Raises:
        CheckpointError: it is of another run, or not what `save` writes; nothing was changed.
    """
    root = checkpoint.directory
    refuse_other_run(checkpoint.identity, identity, str(root / PROGRESS))
    saved = _read_pair(root, OPTIMIZER)
    state_dict = optimizer_state.judged(saved, model, optimizer, str(root / OPTIMIZER))
    states = random_states.judged(_read_pair(root, RANDOM), str(root / RANDOM))
    read_adapter(model, checkpoint.adapter)  # judges all of it before it changes the model
    optimizer_state.set_optimizer_state(optimizer, state_dict)
    random_states.set_random_states(states)
    return checkpoint.progress


def _read_pair(root: Path, name: str) -> Any:
    value = _json(root / f"{name}.json")
    return unpack(value, _tensors(root / f"{name}.safetensors"), str(root / f"{name}.json"))


def _json(file: Path) -> Any:
    return parse_json(read_bounded(file, MAX_JSON_BYTES), where=str(file), max_values=MAX_VALUES)


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    entries = read_header(file)
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in entries}
