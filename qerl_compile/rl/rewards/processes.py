"""What the system offers to hold a process that runs somebody else's code, and to end it with all it started.

* A worker leads a session of its own, so one `killpg` ends it with everything that stayed in its group.
* A process that left the group by `setsid`, or whose parent ended (a daemon), is not lost: the supervisor is a "child
  subreaper" (prctl(2)), which orphans below it get as their new parent. So ending all descendants means: kill the
  children of this process, their descendants too, collect them, and look again until there is none.
* PR_SET_PDEATHSIG has the kernel kill a worker whose supervisor is gone.
* Limits are set on the worker and inherited by what it starts, but each counts for one process. Memory is limited by
  RLIMIT_DATA (private writable memory, since Linux 4.7) and not by RLIMIT_AS: CUDA and torch reserve address space by
  the ten gigabytes and never touch it. `oom_score_adj` 1000 has the kernel's memory killer take a worker, never the
  trainer.

All this is Linux. And it is no guard against malice: code that wants to harm runs with the user's rights and can.
"""

import contextlib
import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterable
from pathlib import Path

MAX_FILE_BYTES = 1 << 30
PATIENCE_S = 10.0
"""How long killed processes may take to vanish; one in uninterruptible sleep (a dead network disk) takes longer."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def confine(supervisor: int, memory_bytes: int) -> None:
    """In a new worker: own session, limits, and death with the supervisor.

    Args:
        supervisor: process id of the parent.
        memory_bytes: most private writable memory of each process.
    """
    os.setsid()
    for limit, most in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
    ):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    with contextlib.suppress(OSError):  # in some containers /proc is read-only
        Path("/proc/self/oom_score_adj").write_text("1000")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:  # it ended before the line above
        os._exit(1)


def children(pid: int) -> list[int]:
    """Process ids of the children of `pid`, ended ones that nobody collected included."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - every 0.1 s; a Path costs more than the call
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    return found


def descendants(pid: int) -> list[int]:
    """Process ids of everything below `pid`."""
    found = children(pid)
    for each in found:  # grows while it is walked
        found += children(each)
    return found


def end_children(spared: int = 0) -> bool:
    """SIGKILL everything below this process but `spared` and what is below that; whether nothing is left.

    A forked process cannot outrun this for long: its group dies in one call, and a stranger is found when its parent
    ends.
    """
    until = time.monotonic() + PATIENCE_S
    while found := [pid for pid in children(os.getpid()) if pid != spared]:
        for pid in found:
            end_strays((pid, *descendants(pid)))
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > until:
            return False
        time.sleep(0.0002)
    return True


def end_worker(pid: int) -> bool:
    """SIGKILL a worker that was not collected yet, its group, and all else below; whether nothing is left."""
    with contextlib.suppress(OSError):  # no group yet if the worker was caught before its setsid
        os.killpg(pid, signal.SIGKILL)
    end_strays([pid])
    return end_children()


def end_strays(pids: Iterable[int]) -> None:
    """SIGKILL processes, which may be gone already."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def how_it_ended(pid: int, within_s: float = 0) -> str | None:
    """How a child ended, in words, or None if it runs. It is not collected, so that its id stays its own."""
    until = time.monotonic() + within_s
    while (found := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
        if time.monotonic() >= until:
            return None
        time.sleep(0.0002)
    if found.si_code == os.CLD_EXITED:
        return f"exit code {found.si_status}"
    name = signal.Signals(found.si_status).name
    return "SIGKILL (by hand, or because memory ran out)" if name == "SIGKILL" else name
