"""Publish a directory whole or not at all.

Every writer here fills a hidden sibling, `.NAME.xxxxxxxx.partial`, and the last step renames it to NAME. The order that
survives a crash at any point (ALICE, OSDI 2014) is

    write files → fsync each file → fsync each directory → rename → fsync the parent

so that a directory called NAME is complete whenever it exists, and a reader needs no marker file. A writer that raises
removes its sibling; one that is killed leaves it behind, and anything ending in `.partial` may be deleted.

Nothing is ever overwritten: a NAME that exists is refused, before the work and again before the rename. What this
module does not do: checksums, retention of old directories, writers on several machines.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from qerl_compile.errors import ExportError


@contextmanager
def staged_directory(out_dir: str | PathLike[str], what: str = "all files of a directory") -> Iterator[Path]:
    """Yield an empty directory to write into; when the block ends without an exception it becomes `out_dir`.

    Args:
        out_dir: must not exist. Missing parents are made.
        what: is written, for the error of a full disk.

    Raises:
        ExportError: `out_dir` exists, its parent cannot hold it, or the disk refuses what is written.
    """
    final = Path(out_dir).absolute()
    refuse_existing(final)
    stage = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as fault:
        raise ExportError(
            where=str(final),
            expected="a place where a directory can be made",
            got=fault.strerror or str(fault),
            do="Choose a directory under one that exists and that you may write to.",
        ) from None
    try:
        yield stage
        _sync_tree(stage)
        refuse_existing(final)
        stage.rename(final)
    except BaseException as fault:  # KeyboardInterrupt too: half-written files must not stay
        shutil.rmtree(stage, ignore_errors=True)
        if not _is_of_disk(fault):
            raise
        raise ExportError(
            where=str(final),
            expected=f"room and permission for {what}",
            got=getattr(fault, "strerror", None) or str(fault),
            do="Make room on that disk, or choose a directory on another; what was there before is whole.",
        ) from fault
    sync(final.parent)


def _is_of_disk(fault: BaseException) -> bool:
    """Whether a disk is full, read-only or over quota; safetensors has an exception of its own for it."""
    if isinstance(fault, OSError):
        return fault.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EIO,
            errno.EFBIG,
        )
    return type(fault).__name__ == "SafetensorError" and "os error" in str(fault)


def refuse_existing(out_dir: str | PathLike[str]) -> None:
    """Refuse an output directory that is already there, before any work for it starts.

    Raises:
        ExportError: it exists.
    """
    if os.path.lexists(out_dir):
        raise ExportError(
            where=str(out_dir),
            expected="an output directory that does not exist yet",
            got="an existing one",
            do="Choose another name, or move the old one away.",
        )


def _sync_tree(root: Path) -> None:
    file_mode = root.stat().st_mode & 0o666  # what the umask allows; safetensors makes files that only the owner reads
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            Path(directory, name).chmod(file_mode)
            sync(Path(directory, name))
        sync(Path(directory))


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk: its bytes, or which names are in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
