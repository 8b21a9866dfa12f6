"""A process that does nothing but run one reward function, batch after batch, until it is killed.

It is forked by its supervisor (supervisor.py), reads requests from one pipe and writes replies to another. Points 0, 1
and 2 of its file table lead to /dev/null or a log, so printing cannot garble the replies. Before each batch it goes
back to its directory and stops alarms that the last one left. It catches everything a function can raise, SystemExit
and KeyboardInterrupt too; what cannot be caught ends the process, and the supervisor sees that.

A reply is {"values": [number | null | [message], ...], "metrics", "extras"}, where a message stands for a completion
in error, or {"fault": message, "whole", "spent"}. `whole` says that the function breaks the interface (no list, or one
of another length), so that asking again completion by completion would hide a bug. `spent` says that memory ran out: a
process that leaks would only fail again, so the next call gets a new one.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards import processes, wire
from qerl_compile.rl.rewards.calling import RewardFunction, as_list, as_number, call, described, reward_name
from qerl_compile.rl.rewards.loading import load
from qerl_compile.rl.rewards.outcomes import GivesOutcomes

TAIL_FRAMES, TAIL_CHARACTERS = 4, 1500


def run(requests: int, replies: int, setup: dict[str, Any], supervisor: int, function: RewardFunction | None) -> None:
    """Be a worker; never returns.

    Args:
        requests: file descriptor to read from.
        replies: file descriptor to write to.
        setup: see `IsolatedReward`.
        supervisor: process id of the parent.
        function: the function, if the supervisor has made it already.
    """
    try:
        out = os.open(setup["log"] or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for fd, point in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
            os.dup2(fd, point)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        processes.confine(supervisor, setup["memory_bytes"])
        serve(requests, replies, setup, function)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # no cleanup that belongs to the supervisor, and no waiting for threads that were left running


def serve(requests: int, replies: int, setup: dict[str, Any], function: RewardFunction | None) -> None:
    """Load, say so, and answer requests."""
    hello: dict[str, Any]
    try:
        function = function or load(setup["function"])
        hello = {"name": reward_name(function)}
    except TaskError as error:
        hello = {"refused": {"where": error.where, "expected": error.expected, "got": error.got, "do": error.do}}
    except BaseException as error:
        refused = {"expected": "a function that can be made", "got": told(error), "do": "Correct its file."}
        hello = {"refused": {"where": str(setup["function"]), **refused}}
    say(replies, hello)
    while function is not None:
        request = wire.decode(wire.receive(requests))
        with contextlib.suppress(OSError):  # it may be gone by now
            os.chdir(setup["cwd"])
        reply = answer(function, request["count"], request["given"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(replies, reply)


def answer(function: RewardFunction, count: int, given: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    where = f"reward function {reward_name(function)}"
    try:
        if isinstance(function, GivesOutcomes):
            each = function.outcomes(count, given).each
            return {"values": [o.value if o.kind == "score" else [o.message] for o in each]}
        output, remarks = call(function, count, given)
        try:
            values = as_list(output, count, where=where)
        except TaskError as error:
            return {"fault": str(error), "whole": True, "spent": False}
        numbers = [checked(value, f"{where}, completion {i}") for i, value in enumerate(values)]
        return {"values": numbers, "metrics": remarks.metrics, "extras": remarks.extras}
    except BaseException as error:
        return {"fault": told(error), "whole": False, "spent": isinstance(error, MemoryError)}


def checked(value: Any, where: str) -> float | list[str] | None:
    """A value as the reply has it."""
    try:
        return as_number(value, where=where)
    except TaskError as error:
        return [str(error)]


def told(error: BaseException) -> str:
    """An exception as its type, its text and the last frames of its traceback, without running more of it than that."""
    try:
        text = str(error)
    except BaseException:
        text = "a message that cannot be printed"
    frames = traceback.extract_tb(error.__traceback__)[-TAIL_FRAMES:]
    at = " < ".join(f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}" for frame in reversed(frames))  # noqa: PTH119
    said = f": {text[:TAIL_CHARACTERS]}" if text else ""
    return f"{type(error).__name__}{said} ({at[:TAIL_CHARACTERS]})"


def say(replies: int, reply: dict[str, Any]) -> None:
    """Write a reply; a message that cannot be written as JSON becomes a fault."""
    try:
        body = wire.encode(reply)
    except (TypeError, ValueError) as error:
        body = wire.encode(
            {"fault": f"a reply that cannot be sent: {described(error)}", "whole": False, "spent": False}
        )
    wire.send(replies, body, time.monotonic() + 3600)  # the supervisor's own deadline is the one that counts
