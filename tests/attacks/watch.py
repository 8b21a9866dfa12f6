"""Open directories while watching the process: which files it opens, what else it does, how far its memory grows.

A process of its own, because an audit hook cannot be removed and a memory peak cannot be reset. Reads a JSON list of
directories from stdin; the first one is healthy and warms up lazily imported codecs. Writes a JSON report.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import CheckpointError

FORBIDDEN = ("pickle.find_class", "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "exec", "import")


def peak_mb() -> float:
    """Highest resident memory of this process. Not ru_maxrss on Linux: that begins with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def main() -> None:
    warm_up, *paths = json.load(sys.stdin)
    open_checkpoint(warm_up)
    "".encode("unicode_escape")  # the codec for hostile file names is imported on first use
    state: dict[str, Any] = {"root": Path(warm_up), "report": {}}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        report = state["report"]
        if event == "open" and isinstance(arguments[0], str):
            file, root = Path(arguments[0]).resolve(), state["root"].resolve()
            is_blob = root.parent.name == "snapshots" and file.parent == root.parent.parent / "blobs"
            report.setdefault("inside" if file.is_relative_to(root) or is_blob else "outside", []).append(str(file))
        elif event.startswith(FORBIDDEN):
            report.setdefault("forbidden", []).append(event)

    sys.addaudithook(watch)
    reports: dict[str, Any] = {}
    base_mb = peak_mb()
    for path in paths:
        state["root"], state["report"] = Path(path), {}
        try:
            open_checkpoint(path)
            outcome = "accepted"
        except CheckpointError as refusal:
            outcome = f"refused: {refusal}"
        except Exception as fault:
            outcome = f"crashed: {type(fault).__name__}: {fault}"
        report = state["report"]
        state["report"] = {}  # reading the memory figure opens a file, too
        reports[path] = {"outcome": outcome, "grown_mb": peak_mb() - base_mb, **report}
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
