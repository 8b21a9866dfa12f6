"""A command's single output file: whole or not at all, and never over a file that is somebody else's.

`refuse_file` runs before the work, so that none is thrown away at the end; `write_file` after it. An existing file may
be replaced only if the command has a mark by which it knows its own; a symlink never is.

What this module does not do: directories (staged_write.py), or guard the name while the work goes on: a file that
somebody puts there meanwhile is replaced.
"""

import os
import secrets
from pathlib import Path

from qerl_compile.errors import ExportError


def refuse_file(out: Path, *, ours: bytes | None = None) -> None:
    """Refuse an output file that exists, before any work for it starts.

    Args:
        out: the file.
        ours: what an earlier output of the same command holds in its first kilobyte; such a file may be replaced.
            None for no such thing.

    Raises:
        ExportError: it exists and is not ours, or its directory does not exist.
    """
    if not os.path.lexists(out):
        if out.parent.is_dir():
            return
        expected, got, do = "a file in a directory that exists", f"no directory {out.parent}", "Make it first."
    else:
        if ours is not None and out.is_file() and not out.is_symlink():
            with out.open("rb") as file:
                if ours in file.read(1024):
                    return
        expected, got, do = "a file that does not exist yet", "an existing one", "Choose another name, or remove it."
    raise ExportError(where=str(out), expected=expected, got=got, do=do)


def write_file(out: Path, text: str) -> None:
    """Write UTF-8 text to a hidden sibling and rename it, so that `out` is never half written.

    Raises:
        ExportError: the directory cannot be written to, or the disk is full; `out` is as it was.
    """
    stage = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        with stage.open("xb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        stage.replace(out)
    except OSError as fault:
        stage.unlink(missing_ok=True)
        expected, do = "a place where a file can be written", "Choose another directory, or free some space."
        raise ExportError(where=str(out), expected=expected, got=fault.strerror or str(fault), do=do) from fault
