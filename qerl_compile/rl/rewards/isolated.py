"""A reward function that runs in another process and is killed when it takes too long.

    score    a finite number, or None for not applicable
    timeout  no result in time; the process was killed
    error    an exception, a value that is no finite number, or the end of the process

A batch gets `timeout` seconds T. If the call for the whole batch fails (time, exception, death), the batch is repeated
completion by completion, so that one that hangs or crashes does not cost the others their scores. Each then gets T/4
(T/N for a batch of N < 4): together they fitted into T, so alone a usual one needs about T/N, and a quarter leaves
room for 16 that hang. All repeats together get 4 T, and what is not reached by then is a timeout. So a batch takes at
most about 5 T, and not N T. Loading the function anew after a kill is part of the 4 T, but not of a completion's T/4.

A function that returns no list, or one of the wrong length, has a bug: nothing is repeated (alone, a list of one would
look right) and every completion is an error. Values that are not finite are errors of their own completions.

The other process is two: see supervisor.py. It starts with this object and ends with `close`, or with this process.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from qerl_compile.errors import TaskError
from qerl_compile.rl.rewards import processes, wire
from qerl_compile.rl.rewards.loading import is_ours
from qerl_compile.rl.rewards.outcomes import Outcome, Outcomes

LOAD_TIMEOUT_S = 120.0
MEMORY_GIB = 4.0
REPEAT_SHARE = 4
GRACE_S = 30.0
"""How much longer than it should a supervisor may take (a machine under load) before it counts as lost."""

_BOOT = """
import sys, json
sys.path[:] = json.loads(sys.argv[1])
from qerl_compile.rl.rewards.supervisor import main
main()
"""


class IsolatedReward:
    """A reward function in a process of its own, with TRL's interface.

    Args:
        name: under which the reward is logged, until the function is loaded and says its own.
        function: what to load there; see loading.py.
        timeout: seconds for a batch, above 0.
        memory_gib: most private memory of each process of the function, in GiB.
        log: file to which what it prints is appended; None drops it.
        load_timeout: seconds for loading the function.
    """

    def __init__(
        self,
        name: str,
        function: Mapping[str, Any],
        *,
        timeout: float,
        memory_gib: float = MEMORY_GIB,
        log: Path | None = None,
        load_timeout: float = LOAD_TIMEOUT_S,
    ) -> None:
        self.__name__, self.timeout, self.load_timeout = name, timeout, load_timeout
        self._setup = {
            "function": dict(function),
            "memory_bytes": int(memory_gib * 2**30),
            "log": None if log is None else str(log.resolve()),
            "load_timeout": load_timeout,
            "cwd": str(Path.cwd()),
        }
        self._lock = threading.Lock()
        self._is_loaded = self._is_spent = False
        self._start()

    def __call__(self, *, completions: Any, **given: Any) -> list[float | None]:
        """TRL's call. `score` asks `outcomes` instead.

        Raises:
            TaskError: a completion has no score.
        """
        own = ("trainer_state", "log_metric", "log_extra")
        given = {key: value for key, value in given.items() if key not in own}
        each = self.outcomes(len(completions), {"completions": completions, **given}).each
        for i, outcome in enumerate(each):
            if outcome.kind != "score":
                where = f"reward function {self.__name__}, completion {i}"
                do = "Correct the function, or give it more time."
                raise TaskError(where=where, expected="a score", got=f"{outcome.kind}: {outcome.message}", do=do)
        return [outcome.value for outcome in each]

    def outcomes(self, count: int, given: Mapping[str, Any]) -> Outcomes:
        """Score `count` completions; `given` holds the keywords of TRL's call, lists of that length.

        Raises:
            TaskError: the function does not load, or a column holds objects that cannot be sent.
        """
        with self._lock:
            if not self._end.alive:
                self._start()
            self._load()
            answer = self._ask(count, given, self.timeout)
            if isinstance(answer, Outcomes):
                return answer
            if count <= 1 or answer.is_whole:
                return Outcomes((answer.outcome,) * count)
            return self._repeat(count, given)

    def _repeat(self, count: int, given: Mapping[str, Any]) -> Outcomes:
        """Completion by completion, after the call for all of them failed."""
        limit = self.timeout / min(count, REPEAT_SHARE)
        deadline = time.monotonic() + REPEAT_SHARE * self.timeout
        late = Outcome(
            "timeout", message=f"not tried alone: {REPEAT_SHARE * self.timeout:g} s went to others of its batch"
        )
        each: list[Outcome] = []
        metrics: dict[str, list[float]] = {}
        extras: dict[str, list[Any]] = {}
        repeats = 0
        for i in range(count):
            left = deadline - time.monotonic()
            if left <= 0:
                each.append(late)
                continue
            repeats += 1
            answer = self._ask(1, {key: [values[i]] for key, values in given.items()}, min(limit, left))
            if not isinstance(answer, Outcomes):
                each.append(answer.outcome)
                continue
            each += answer.each
            for name, values in answer.metrics.items():
                metrics.setdefault(name, []).extend(values)
            for column, values in answer.extras.items():
                extras.setdefault(column, [None] * count)[i] = values[0]
        return Outcomes(tuple(each), metrics, extras, repeats)

    def load(self) -> "IsolatedReward":
        """Wait until the function is loaded; return self.

        Raises:
            TaskError: it cannot be loaded, for the reason that loading.py gives, or not in time.
        """
        with self._lock:
            self._load()
        return self

    def _load(self) -> None:
        if self._is_loaded:
            return
        where, do = f"reward function {self.__name__}", "Correct the file."
        expected = f"a function that loads within {self.load_timeout:g} s"
        try:
            verdict, body = self._verdict(time.monotonic() + self.load_timeout + GRACE_S)
        except (wire.ClosedError, wire.LateError) as lost:
            got = "a supervisor that ended or does not answer"
            self.close()
            raise TaskError(where=where, expected=expected, got=got, do="Look above for its traceback.") from lost
        hello = wire.decode(body) if body is not None else {}
        if "refused" in hello:
            self.close()
            parts = hello["refused"]  # the worker refused the function in these words
            raise TaskError(where=parts["where"], expected=parts["expected"], got=parts["got"], do=parts["do"])
        if "name" not in hello:
            self.close()
            raise TaskError(where=where, expected=expected, got=str(verdict.get("message")), do=do)
        self.__name__, self._is_loaded = hello["name"], True

    def _ask(self, count: int, given: Mapping[str, Any], timeout: float) -> "Outcomes | _Failure":
        """One call in the worker."""
        body = self._encoded(count, given)
        lost = f"a supervisor that ended or does not answer, in a call of {timeout:g} s"
        deadline = time.monotonic() + timeout + self.load_timeout + GRACE_S
        try:
            wire.send(self._requests, wire.encode({"timeout": timeout, "fresh": self._is_spent}), deadline)
            wire.send(self._requests, body, deadline)
            verdict, reply = self._verdict(deadline)
        except (wire.ClosedError, wire.LateError):
            self.close()
            self._start()
            self._load()
            return _Failure(Outcome("error", message=lost))
        except BaseException:  # Ctrl-C: the verdict still to come must not be taken for that of a later call
            self.close()
            raise
        if reply is None:
            return _Failure(Outcome(verdict["status"], message=verdict["message"]))
        try:
            said = wire.decode(reply)
            self._is_spent = bool(said.get("spent"))
            return _read(said, count)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return _Failure(Outcome("error", message=f"a reply that is none: {type(error).__name__}: {error}"))

    def _encoded(self, count: int, given: Mapping[str, Any]) -> bytes:
        try:
            return wire.encode({"count": count, "given": dict(given)})
        except (TypeError, ValueError, RecursionError) as error:
            raise TaskError(
                where=f"reward function {self.__name__}",
                expected="columns of text, numbers, lists, tuples, sets and dicts, which can be sent to its process",
                got=str(error),
                do="Change the rows, or give the function itself to Trainer(rewards=[...]), which calls it here.",
            ) from error

    def _verdict(self, deadline: float) -> tuple[dict[str, Any], bytes | None]:
        verdict = wire.decode(wire.receive(self._verdicts, deadline))
        return verdict, wire.receive(self._verdicts, deadline) if verdict["status"] == "reply" else None

    def _start(self) -> None:
        """Start a supervisor in a fresh interpreter with our import path, in a session of its own (no Ctrl-C)."""
        path = json.dumps([each or str(Path.cwd()) for each in sys.path])
        command = [sys.executable, "-P", "-c", _BOOT, path]
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} if is_ours(self._setup["function"]) else {}
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **one_thread},  # numpy, which reasoning_gym imports, would start threads; then it forks
        )
        self._requests, self._verdicts = (pipe.fileno() for pipe in _pipes(process))
        self.supervisor = process.pid
        os.set_blocking(self._requests, False)
        self._is_loaded = False
        self._end = weakref.finalize(self, _end, process, os.getpid())
        wire.send(self._requests, wire.encode(self._setup), time.monotonic() + GRACE_S)

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        self._end()


class _Failure:
    """A call without scores: the outcome of each of its completions, and whether the function breaks the interface."""

    def __init__(self, outcome: Outcome, is_whole: bool = False) -> None:
        self.outcome, self.is_whole = outcome, is_whole


def _read(reply: dict[str, Any], count: int) -> "Outcomes | _Failure":
    """A worker's reply, which is not taken on trust."""
    if "fault" in reply:
        return _Failure(Outcome("error", message=str(reply["fault"])), bool(reply["whole"]))
    values = reply["values"]
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} completions")
    each = tuple(
        Outcome("error", message=str(value[0]))
        if isinstance(value, list)
        else Outcome("score", None if value is None else float(value))
        for value in values
    )
    metrics = {str(name): [float(value) for value in found] for name, found in reply.get("metrics", {}).items()}
    extras = {str(name): list(found) for name, found in reply.get("extras", {}).items() if len(found) == count}
    return Outcomes(each, metrics, extras)


def _pipes(process: "subprocess.Popen[bytes]") -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output, which are pipes."""
    return cast("tuple[IO[bytes], IO[bytes]]", (process.stdin, process.stdout))


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Ask a supervisor to end; kill it and what is below if it does not."""
    if os.getpid() != owner:  # a fork of the trainer that ends must not end the trainer's workers
        return
    requests, verdicts = _pipes(process)
    with contextlib.suppress(wire.ClosedError, wire.LateError):
        wire.send(requests.fileno(), wire.encode(wire.GOODBYE), time.monotonic() + 1)
    requests.close()
    verdicts.close()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        below = processes.descendants(process.pid)
        process.kill()
        processes.end_strays(below)
        process.wait()
