"""Read and judge the header of a safetensors file without reading a single tensor.

The format: 8 bytes little-endian length n, n bytes of JSON, then the data.

    {"name": {"dtype": "BF16", "shape": [576, 576], "data_offsets": [begin, end]}, ..., "__metadata__": {text: text}}

The offsets are relative to the data. A file is accepted only if every byte of it is accounted for: sorted by begin, the
tensors start at 0, follow each other without gap or overlap, and the last one ends where the file ends; and each has
end - begin = product(shape) * bytes per element. The safetensors library checks that too; here it is done before that
library sees the file, together with what it lets pass: duplicate keys, names such as `../x`, a shape [0, 2**62], and a
header that costs a gigabyte to parse. Bounds: header 16 MB, 100,000 tensors, rank 8. Memory to refuse a file stays
below 64 MB because the header is walked member by member (strict_json.members).

The header is decoded as Latin-1, one byte per character whatever it holds; JSON's own characters are ASCII, so the
structure is the same, and names must be ASCII. That the bytes are UTF-8 is checked beside it, piece by piece.
"""

import codecs
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qerl_compile.strict_json import members
from qerl_compile.wording import refuse_checkpoint, shown

MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_NAME_CHARACTERS = 512

# What weights, packed weights and buffers of causal language models are stored in. Complex numbers, sub-byte types and
# unsigned 16..64-bit integers are not among them; torch on CPU computes with none of those.
ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}

_NAME = re.compile(rf"[\x21-\x7e]{{1,{MAX_NAME_CHARACTERS}}}")
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies. Invariants: end - begin == product(shape) * bytes of dtype; [begin, end) is in the file."""

    file: Path
    """The shard."""
    dtype: str
    """Name as in the format, e.g. `BF16`."""
    shape: tuple[int, ...]
    """Dimensions, outermost first."""
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin


def checked_name(name: str, where: str) -> str:
    """Return a tensor name if it is one that cannot be mistaken for a path.

    Raises:
        CheckpointError: empty, longer than 512, not printable ASCII, or with `/`, `\\` or `..` in it.
    """
    if not _NAME.fullmatch(name) or "/" in name or "\\" in name or ".." in name:
        refuse_checkpoint(
            where,
            f"tensor names of 1 to {MAX_NAME_CHARACTERS} printable ASCII characters without `/`, `\\` and `..`",
            shown(name),
            do="Do not use this file; no training library writes such a name.",
        )
    return name


def read_header(file: Path, *, max_tensors: int = MAX_TENSORS) -> dict[str, TensorEntry]:
    """Read one file's header and judge it against the file's size.

    Args:
        file: a regular file; the caller has checked that it lies where it may.
        max_tensors: how many the file may hold.

    Returns:
        Entry by tensor name, in the order of the data.

    Raises:
        CheckpointError: anything that breaks the format or our bounds; names the file, and the tensor if there is one.
    """
    where = str(file)
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            text = _header_text(stream, file_bytes, where)
    except OSError as fault:
        refuse_checkpoint(where, "a readable file", fault.strerror or str(fault), do="Check the file's permissions.")
    data_begin = 8 + len(text)
    entries: dict[str, TensorEntry] = {}
    for name, value in members(text, where=where, max_characters=lambda k: 1_000_000 if k == "__metadata__" else 4096):
        if name == "__metadata__":
            _check_metadata(value, where)
            continue
        if len(entries) == max_tensors:
            refuse_checkpoint(
                where, f"at most {MAX_TENSORS} tensors in a checkpoint", "more", do="Do not use this file."
            )
        checked_name(name, where)
        entries[name] = _entry(value, file, data_begin, f"{where}: tensor {shown(name)}")
    del text
    return _laid_out(entries, data_begin, file_bytes, where)


def _header_text(stream: BinaryIO, file_bytes: int, where: str) -> str:
    prefix = stream.read(8)
    if prefix == b"version ":
        refuse_checkpoint(where, "a safetensors file", "a Git LFS pointer", do="Run `git lfs pull` in that directory.")
    if len(prefix) < 8:
        refuse_checkpoint(where, "at least 8 bytes", f"{file_bytes} bytes", do="Fetch the truncated file again.")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        refuse_checkpoint(
            where,
            f"a header of at most {MAX_HEADER_BYTES} bytes",
            f"a length field of {header_bytes}",
            do="Fetch the file again; if it comes so, it is not a safetensors file.",
        )
    if 8 + header_bytes > file_bytes:
        refuse_checkpoint(
            where,
            f"a header of {header_bytes} bytes",
            f"a file that ends after {file_bytes} bytes",
            do="Fetch the truncated file again.",
        )
    utf8 = codecs.getincrementaldecoder("utf-8")()
    pieces: list[str] = []
    left = header_bytes
    try:
        while left:
            piece = stream.read(min(left, 1 << 20))
            if not piece:
                refuse_checkpoint(
                    where, f"{left} more bytes of header", "the end of the file", do="Fetch the file again."
                )
            left -= len(piece)
            utf8.decode(piece, final=not left)
            pieces.append(piece.decode("latin-1"))
    except UnicodeDecodeError as fault:
        refuse_checkpoint(where, "a header in UTF-8", f"{fault.reason} in it", do="Fetch the file again.")
    text = "".join(pieces)
    if not text.startswith("{"):
        refuse_checkpoint(where, "a header that begins with `{`", shown(text[:20]), do="Fetch the file again.")
    return text


def _check_metadata(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        refuse_checkpoint(
            f"{where}: __metadata__", "a mapping of texts to texts", shown(value), do="Do not use this file."
        )


def _entry(value: Any, file: Path, data_begin: int, where: str) -> TensorEntry:
    do = "Fetch the file again; its header is not what a safetensors writer produces."
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        refuse_checkpoint(where, "the keys dtype, shape and data_offsets", shown(value), do=do)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        refuse_checkpoint(
            where,
            "a dtype out of " + ", ".join(ELEMENT_BYTES),
            shown(dtype),
            do="Convert the checkpoint to one of these dtypes.",
        )
    if not _is_naturals(shape):
        refuse_checkpoint(where, "a shape of integers >= 0", shown(shape), do=do)
    if len(shape) > MAX_RANK:
        refuse_checkpoint(
            where, f"at most {MAX_RANK} dimensions", f"{len(shape)}: {shown(shape)}", do="Do not use this file."
        )
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse_checkpoint(where, "data_offsets [begin, end] with begin <= end", shown(offsets), do=do)
    elements = math.prod(shape)
    if math.prod(size for size in shape if size) >= 2**63:  # [0, 2**62, 4] holds nothing, yet overflows strides
        refuse_checkpoint(
            where, "a shape whose sizes multiply to less than 2**63", shown(shape), do="Do not use this file."
        )
    begin, end = offsets
    size_bytes = elements * ELEMENT_BYTES[dtype]
    if end - begin != size_bytes:
        refuse_checkpoint(
            where, f"{size_bytes} bytes for {dtype} {shape}", f"{end - begin} (data_offsets {offsets})", do=do
        )
    return TensorEntry(file, sys.intern(dtype), tuple(shape), data_begin + begin, data_begin + end)


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _laid_out(entries: dict[str, TensorEntry], data_begin: int, file_bytes: int, where: str) -> dict[str, TensorEntry]:
    """The entries in the order of their data, if they cover it exactly."""
    at = data_begin
    names = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    for name in names:
        entry = entries[name]
        if entry.begin != at:
            kind = "an overlap with the tensor before it" if entry.begin < at else "a gap before it"
            refuse_checkpoint(
                f"{where}: tensor {shown(name)}",
                f"data that begin at byte {at - data_begin}, where the tensor before it ends",
                f"{entry.begin - data_begin}, {kind}",
                do="Do not use this file; bytes in gaps and overlaps can hide other content.",
            )
        at = entry.end
    if at > file_bytes:
        refuse_checkpoint(
            f"{where}: tensor {shown(names[-1])}",
            f"a file of {at} bytes",
            f"{file_bytes}: the file is truncated",
            do="Fetch the file again.",
        )
    if at < file_bytes:
        refuse_checkpoint(
            where,
            f"the end of the file at byte {at}, after the last tensor",
            f"{file_bytes - at} trailing bytes",
            do="Do not use this file; trailing bytes can hide other content.",
        )
    return {name: entries[name] for name in names}
