"""Rows of measurements: what each says of itself, and a JSON file that grows by one row at a time.

A device command may be stopped at its limit, so every row is written, and printed, as soon as it is there. A row names
its device, versions, commit and date itself: rows of several runs and machines meet in one report.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

GB = 1e9


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Device and its memory, torch, commit and date."""
    on_cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if on_cuda else None,
        "torch": torch.__version__,
        "commit": options.commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(path: str, row: dict[str, Any]) -> None:
    """Add a row to a JSON list; the file is whole at every moment."""
    rows = [*read([path]), row] if Path(path).exists() else [row]
    partial = Path(path + ".partial")
    partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    partial.replace(path)
    print(f"# {row['part']} {row['size']} -> {path}", file=sys.stderr, flush=True)


def read(paths: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of several files, in order."""
    return [row for path in paths for row in json.loads(Path(path).read_text(encoding="utf-8"))]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]
