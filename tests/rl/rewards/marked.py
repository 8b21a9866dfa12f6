"""Processes found by a mark in their environment, which every child inherits and none loses."""

import contextlib
import os
import time
from pathlib import Path

NAME = "QERL_TEST_MARK"


def marked(mark: str) -> list[int]:
    """Process ids, but this one's, whose environment at their start held NAME=mark and that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if f"{NAME}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def left_behind(mark: str, but: int = 0) -> list[int]:
    """What is still there of the marked processes but one after they had 10 seconds to end."""
    until = time.monotonic() + 10
    while (found := [pid for pid in marked(mark) if pid != but]) and time.monotonic() < until:
        time.sleep(0.01)
    return found
