"""Judge the entries of a model directory by name and kind, before any of them is opened.

Refused by name: pickles (reading one runs its code), Python files (transformers runs them when asked to trust them),
links that leave the directory, and entries that are not regular files (opening a FIFO waits for ever). Allowed beyond
the directory is one thing, the cache of the Hugging Face hub, whose `models--org--name/snapshots/<revision>/x` are
links to `models--org--name/blobs/<hash>`.

Sub-directories are not read: neither we nor transformers look into them without being told to, except
`custom_generate/`, which holds code.

What is not covered: hard links, mounts, and somebody who changes the directory between this check and the reading.
"""

import os
import stat
from pathlib import Path
from typing import NoReturn

from qerl_compile.wording import refuse_checkpoint, shown

MAX_ENTRIES = 10_000
PICKLE_SUFFIXES = frozenset(
    {".bin", ".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".distcp", ".npy", ".npz"}
)
CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyx", ".so", ".pyd", ".dll", ".dylib"})


def checked_entries(root: Path, *, trust_remote_code: bool) -> list[str]:
    """Names of the regular files directly in `root`, sorted.

    Args:
        root: the directory.
        trust_remote_code: allow Python files and `custom_generate/`.

    Raises:
        CheckpointError: an entry that must not be there; its name is in the message.
    """
    files: list[str] = []
    try:
        with os.scandir(root) as entries:
            for count, entry in enumerate(entries):
                if count == MAX_ENTRIES:
                    refuse_checkpoint(
                        str(root),
                        f"at most {MAX_ENTRIES} entries",
                        "more",
                        do="Put the model into a directory of its own.",
                    )
                if _is_regular(entry, root, trust_remote_code):
                    files.append(entry.name)
    except OSError as fault:
        refuse_checkpoint(str(root), "a readable directory", fault.strerror or str(fault), do="Check its permissions.")
    return sorted(files)


def _is_regular(entry: os.DirEntry[str], root: Path, trust_remote_code: bool) -> bool:
    """Whether the entry is a regular file (rather than a sub-directory), if it may be there at all."""
    where = os.fspath(root / entry.name)
    suffix = Path(entry.name).suffix.lower()
    if entry.is_symlink():
        _check_link(Path(entry.path), root, where)
    mode = entry.stat().st_mode  # of what a link leads to, which by now is known to be inside
    if stat.S_ISDIR(mode):
        if entry.name == "custom_generate" and not trust_remote_code:
            _refuse_code(where, "a directory of generation code")
        return False
    if not stat.S_ISREG(mode):
        refuse_checkpoint(where, "regular files", f"a {_kind(mode)}", do="Remove it.")
    if suffix in PICKLE_SUFFIXES or entry.name == ".metadata":
        refuse_checkpoint(
            where,
            "weights in safetensors files only",
            f"{shown(entry.name)}, which may be a pickle; reading a pickle runs the code in it",
            do="Move it out of the directory, or convert it to safetensors where you trust it.",
        )
    if suffix in CODE_SUFFIXES and not trust_remote_code:
        _refuse_code(where, f"the code file {shown(entry.name)}")
    return True


def _check_link(link: Path, root: Path, where: str) -> None:
    target, inside = os.path.realpath(link), os.path.realpath(root)
    if not os.path.lexists(target):
        refuse_checkpoint(
            where, "an existing file", f"a link to {shown(target)}, which does not exist", do="Fetch it again."
        )
    if Path(target).is_relative_to(inside):
        return
    snapshot = Path(inside)  # <cache>/models--org--name/snapshots/<revision>
    repository = snapshot.parent.parent
    is_cache = snapshot.parent.name == "snapshots" and repository.name.startswith("models--")
    if is_cache and Path(target).parent == repository / "blobs":
        return
    refuse_checkpoint(
        where,
        "links that stay in the directory",
        f"a link to {shown(target)}",
        do="Replace the link by a copy of the file, if you know what it is.",
    )


def _refuse_code(where: str, got: str) -> NoReturn:
    refuse_checkpoint(
        where, "no code in a model directory", got, do="Read it; if you trust it, pass --trust-remote-code."
    )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
