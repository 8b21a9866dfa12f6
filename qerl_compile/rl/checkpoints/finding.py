"""Which checkpoints a run has, and whether one is whole: names, files, sizes, hashes, progress.json.

Nothing is changed here and no tensor is read; `writing` and `reading` both begin with it.
"""

import re
from pathlib import Path

from qerl_compile.checkpoint_config import read_bounded
from qerl_compile.rl.checkpoints.manifest import PROGRESS, check_manifest
from qerl_compile.rl.checkpoints.progress import Identity, Progress, decode
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import refuse_checkpoint

MAX_PROGRESS_BYTES = 4_000_000


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the folder in which a run's checkpoints lie."""
    return run_dir / "checkpoints"


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint; six digits keep the names of most runs in order."""
    return f"step-{step:06d}"


def step_dirs(run_dir: Path) -> dict[int, Path]:
    """Return what is called like a checkpoint, by step, the newest first; nothing is opened."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return {}
    matches = ((re.fullmatch(r"step-(\d{6,12})", entry.name), entry) for entry in folder.iterdir())
    found = {int(match[1]): entry for match, entry in matches if match and entry.name == name_of(int(match[1]))}
    return dict(sorted(found.items(), reverse=True))


def opened(directory: Path) -> tuple[Identity, Progress, dict[str, str]]:
    """Return identity, progress and versions of a checkpoint whose files are those of its manifest.

    Raises:
        CheckpointError: it is not whole; names the file, what was expected and what is there.
    """
    file = directory / PROGRESS
    try:
        check_manifest(directory)
        data = parse_json(read_bounded(file, MAX_PROGRESS_BYTES), where=str(file))
    except OSError as fault:
        refuse_checkpoint(str(directory), "readable files", fault.strerror or str(fault), do="Check its permissions.")
    identity, progress, versions = decode(data, str(file))
    if directory.name != name_of(progress.step):
        do = "Give the directory its own name back."
        refuse_checkpoint(str(directory), f"the name {name_of(progress.step)}", "another", do=do)
    return identity, progress, versions
