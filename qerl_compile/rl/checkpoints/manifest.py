"""Which files a checkpoint consists of, and whether they are the bytes that were written.

    manifest.json   {"format_version": 1, "files": {"progress.json": {"bytes": 812, "sha256": "…"}, …}}

The set of files is fixed, so a manifest has no names to choose and cannot lead anywhere: any file more or less, any
link, pipe or deeper directory is refused. The manifest itself must be, byte for byte, what we would write for what it
says; together with sizes and SHA-256 this leaves no bit of a checkpoint that could change unseen.

It protects against damage, not against an enemy: who can write the files can write the manifest. Everything that is
read afterwards is judged on its own (strict JSON, safetensors headers), and nothing is ever unpickled.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from qerl_compile.adapter_files import CONFIG, WEIGHTS
from qerl_compile.checkpoint_config import read_bounded
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import listed, refuse_checkpoint, shown

MANIFEST, PROGRESS = "manifest.json", "progress.json"
ADAPTER = "adapter"
OPTIMIZER, RANDOM = "optimizer", "random"
"""Stems of the pairs NAME.json and NAME.safetensors."""
FILES = (
    f"{ADAPTER}/{CONFIG}",
    f"{ADAPTER}/{WEIGHTS}",
    f"{OPTIMIZER}.json",
    f"{OPTIMIZER}.safetensors",
    PROGRESS,
    f"{RANDOM}.json",
    f"{RANDOM}.safetensors",
)
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 100_000
_DO = "It is passed over; remove it when you no longer want to look into it."


def write_manifest(root: Path) -> None:
    """Hash the files of a finished directory and write its manifest."""
    files = {name: {"bytes": (root / name).stat().st_size, "sha256": _sha256(root / name)} for name in FILES}
    (root / MANIFEST).write_bytes(_encoded(files))


def check_manifest(root: Path) -> None:
    """Compare every file in a checkpoint with its manifest.

    Raises:
        CheckpointError: names the first file that is missing, surplus, no regular file, or has another size or hash.
    """
    found = _files(root)
    file = root / MANIFEST
    if MANIFEST not in found:
        refuse_checkpoint(str(root), f"a {MANIFEST}", "none", do=_DO)
    raw = read_bounded(file, MAX_MANIFEST_BYTES)
    files = _judged(parse_json(raw, where=str(file), max_values=1000), file)
    if raw != _encoded(files):
        refuse_checkpoint(str(file), "a manifest as qerl-compile writes it", "other white space or order", do=_DO)
    missing = [name for name in FILES if name not in found]
    if missing:
        refuse_checkpoint(str(root / missing[0]), "a file", "nothing there", do=_DO)
    extra = sorted(found - {*FILES, MANIFEST})
    if extra:
        refuse_checkpoint(str(root), "no file that the manifest does not have", listed(extra), do=_DO)
    for name, want in files.items():
        got_bytes = (root / name).stat().st_size
        if got_bytes != want["bytes"]:
            refuse_checkpoint(str(root / name), f"{want['bytes']} bytes", str(got_bytes), do=_DO)
    for name, want in files.items():
        got = _sha256(root / name)
        if got != want["sha256"]:
            refuse_checkpoint(str(root / name), f"sha256 {want['sha256']}", got, do=_DO)


def _encoded(files: dict[str, dict[str, Any]]) -> bytes:
    return json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1).encode() + b"\n"


def _judged(data: Any, file: Path) -> dict[str, dict[str, Any]]:
    version = data.get("format_version") if isinstance(data, dict) else data
    if type(version) is not int or version != FORMAT_VERSION:
        do = "Use the qerl-compile that wrote it."
        refuse_checkpoint(f"{file}: format_version", str(FORMAT_VERSION), shown(version), do=do)
    files = data.get("files")
    if not isinstance(files, dict) or tuple(files) != FILES:
        refuse_checkpoint(f"{file}: files", f"exactly {', '.join(FILES)}", shown(files), do=_DO)
    for name, each in files.items():
        is_sound = isinstance(each, dict) and type(each.get("bytes")) is int and isinstance(each.get("sha256"), str)
        if not is_sound:
            refuse_checkpoint(f"{file}: files: {name}", "bytes and sha256", shown(each), do=_DO)
    return files


def _files(root: Path) -> set[str]:
    """Relative names of the regular files in a checkpoint; links are not followed, deeper directories not entered."""
    found: set[str] = set()
    try:
        for prefix, folder in (("", root), (f"{ADAPTER}/", root / ADAPTER)):
            if not stat.S_ISDIR(folder.lstat().st_mode):
                refuse_checkpoint(str(folder), "a directory", "a link or a file", do=_DO)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if len(found) > 2 * len(FILES):
                        refuse_checkpoint(str(root), f"{len(FILES) + 1} files", "many more", do=_DO)
                    if name == ADAPTER:
                        continue
                    if not entry.is_file(follow_symlinks=False):
                        what = "a link" if entry.is_symlink() else "a directory or a special file"
                        refuse_checkpoint(str(folder / entry.name), "a regular file", what, do=_DO)
                    found.add(name)
    except OSError as fault:
        refuse_checkpoint(str(fault.filename or root), "a readable directory", fault.strerror or str(fault), do=_DO)
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
