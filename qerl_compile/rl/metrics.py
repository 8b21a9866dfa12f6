"""metrics.jsonl: one JSON object a line, only ever appended to.

Each row is one unbuffered write of a whole line, so a killed process leaves at most one torn line, the last. Opening
the file again mends it (a complete row without its newline gets it, a torn one is cut off), and the reader passes over
a torn last line by itself. Damage anywhere else is an error: something other than us has written to the file.

JSON knows no NaN. A non-finite number becomes null, and its name and value are kept in the row's `non_finite`, so a
curve has a gap and the cause can still be read.

A resumed run repeats the steps after its last checkpoint, so a step can occur twice; the later row holds.
`read_metrics` returns all rows, `latest_rows` those that hold.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qerl_compile.errors import TaskError


class MetricsWriter:
    """Append rows to a metrics file; a context manager.

    Args:
        path: the file; it and its folder are made if missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mend(self.path)
        self._file = self.path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row of numbers, strings, booleans and None; one-element tensors and arrays count as numbers.

        Raises:
            TypeError: a value is none of these.
            OSError: the row was not written whole, for want of disk space.
        """
        line = encode(row)
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: the last row was not written whole")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every complete row, in the order of writing; a torn last line is left out.

    Raises:
        TaskError: the file cannot be read, or a line before the last is no JSON object.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        do = "Give the path of a run's metrics.jsonl."
        raise TaskError(where=str(path), expected="a readable file", got=str(error), do=do) from error
    lines = data.split(b"\n")
    rows = [decode(line) for line in lines]
    for number, row in enumerate(rows[:-1], start=1):
        if row is None:
            do = "Remove that line; only the last one can be torn by a crash."
            got = repr(lines[number - 1][:80])
            raise TaskError(where=f"{path}, line {number}", expected="a JSON object", got=got, do=do)
    return [row for row in rows if row is not None]


def latest_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a file without those that a resumed run has written again, in the order of writing.

    Steps never fall within one process, and none of its rows occurs twice. So a row takes the place of every earlier
    row of a later step, and of an earlier one of its own step and kind: training rows are one kind, those with a name
    in `eval/` another, and rows with a `prompt` (samples.jsonl) are one kind for each prompt. Rows without a step are
    left out.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        step = row.get("step")
        if type(step) is not int:
            continue
        while kept and kept[-1]["step"] > step:
            kept.pop()
        begin = len(kept)
        while begin and kept[begin - 1]["step"] == step:
            begin -= 1
        kept[begin:] = [each for each in kept[begin:] if _kind(each) != _kind(row)]
        kept.append(dict(row))
    return kept


def _kind(row: Mapping[str, Any]) -> str:
    if "prompt" in row:
        return f"prompt {row['prompt']}"
    return "evaluation" if any(name.startswith("eval/") for name in row) else "training"


def encode(row: Mapping[str, Any]) -> bytes:
    """A row as one line of strict JSON, newline included."""
    plain: dict[str, Any] = {}
    non_finite: dict[str, str] = {}
    for name, value in row.items():
        if hasattr(value, "item") and math.prod(value.shape) == 1:
            value = value.item()
        if value is not None and not isinstance(value, str | int | float):
            raise TypeError(f"metric {name!r} is no number, string, boolean or None: {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            non_finite[name], value = str(value), None
        plain[name] = value
    if non_finite:
        plain["non_finite"] = non_finite
    return json.dumps(plain, allow_nan=False, ensure_ascii=False).encode("utf-8") + b"\n"


def decode(line: bytes) -> dict[str, Any] | None:
    """A line as a row, or None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def mend(path: Path) -> None:
    """Make the file end in a newline, keeping every complete row."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        tail = data.rpartition(b"\n")[2]
        if tail and decode(tail) is not None:
            file.write(b"\n")
        elif tail:
            file.truncate(len(data) - len(tail))
