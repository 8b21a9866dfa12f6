"""Stop a save at its k-th file operation: in a child process, by an error or by death.

Counted is every operation under the run's directory that Python tells its audit hooks of (open, rename, mkdir, chmod,
unlink, rmdir, listing), every fsync, and every write of contents, which stops with half of them written. An audit hook
stays for the life of its process, which is why this happens in a child.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from qerl_compile.errors import ExportError

EVENTS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}
NOT_REACHED, REACHED, REFUSED, BROKEN = 0, 9, 7, 8
"""How the child ends: without an operation k; killed or done although one failed; with an ExportError; otherwise."""


class Crash:
    """Counts operations and acts at the k-th."""

    def __init__(self, root: Path, k: int, *, kill: bool) -> None:
        self.root, self.k, self.kill, self.count = str(root), k, kill, 0

    def reached(self) -> bool:
        self.count += 1
        return self.count == self.k

    def act(self) -> None:
        if self.kill:
            os._exit(REACHED)
        raise OSError(errno.ENOSPC, "No space left on device")

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        is_ours = str(path).startswith(self.root) or not os.path.isabs(path)  # noqa: PTH117  # rmtree names relatively
        if is_ours and self.reached():
            self.act()

    def install(self) -> None:
        """Count from now on, in this process, for ever."""
        fsync, write_bytes, save_file = os.fsync, Path.write_bytes, safetensors.torch.save_file

        def counted_fsync(descriptor: int) -> None:
            if self.reached():
                self.act()
            fsync(descriptor)

        def counted_write(path: Path, data: bytes) -> int:
            if self.reached():
                write_bytes(path, data[: len(data) // 2])
                self.act()
            return write_bytes(path, data)

        def counted_save(tensors: Any, file: Path, metadata: Any = None) -> None:
            if not self.reached():
                return save_file(tensors, file, metadata)
            write_bytes(Path(file), safetensors.torch.save(tensors, metadata)[:-3])
            return self.act()

        os.fsync, Path.write_bytes, safetensors.torch.save_file = counted_fsync, counted_write, counted_save
        sys.addaudithook(self.hook)


def run_to_crash(root: Path, k: int, work: Callable[[], object], *, kill: bool) -> int:
    """Do `work` in a child that is stopped at its k-th file operation under `root`; return how it ended."""
    child = os.fork()
    if child == 0:
        crash = Crash(root, k, kill=kill)
        try:
            crash.install()
            work()
            os._exit(REACHED if crash.count >= k else NOT_REACHED)
        except ExportError:
            os._exit(REFUSED)
        except BaseException:
            traceback.print_exc()
            os._exit(BROKEN)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
