"""The process between the trainer and a worker: it forks the worker, holds the clock, and ends what must end.

    trainer ──request──▶ supervisor ──request──▶ worker, which runs the reward function
            ◀──verdict──            ◀──reply───

Why it exists. The trainer has threads and perhaps CUDA, so it must not fork; a fresh interpreter for each worker would
cost its start and the imports of the reward again after every kill. The supervisor is a fresh interpreter, has one
thread and runs none of the user's code, so it forks safely and within a few milliseconds; functions of our own
(`loading.is_ours`) it makes beforehand, so that math-verify or reasoning_gym are imported once. And it can adopt the
orphans of a worker (processes.py), a thing that would change the trainer for good.

A verdict is {"status": "reply"} and then the worker's bytes as they came, or {"status": "timeout" | "error",
"message"}. After a timeout, a death, or a reply that is none, the worker and all below it are killed and the next one
is forked at once. After a good reply, only processes that the worker's own children left behind are killed.

The supervisor ends, and its worker with it, when the trainer says goodbye, closes the pipe, or is gone in whatever way.
"""

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from qerl_compile.rl.rewards import processes, wire, worker
from qerl_compile.rl.rewards.loading import is_ours, load

TICK_S = 0.1
MAX_PROCESSES = 256
"""Most processes below one worker; a fork bomb is ended at the next tick, when it has made some hundreds."""


class FaultError(Exception):
    """A worker gave no reply: `status` is "timeout" or "error"."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def main() -> None:
    """Serve the trainer on the pipes that are now standard input and output; never returns."""
    control, verdicts = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.set_blocking(verdicts, False)
    try:
        Supervisor(control, verdicts).serve()
    except wire.ClosedError:
        pass
    except Exception:
        traceback.print_exc()
    finally:
        processes.end_children()
        sys.stderr.flush()
        os._exit(0)


class Supervisor:
    """One worker at a time, and the talk with the trainer.

    Args:
        control: file descriptor of the trainer's requests, of which the first is the setup (see `IsolatedReward`).
        verdicts: non-blocking file descriptor of the answers.
    """

    def __init__(self, control: int, verdicts: int) -> None:
        self.control, self.verdicts = control, verdicts
        self.setup: dict[str, Any] = wire.decode(wire.receive(control))
        self.trainer = os.getppid()
        self.pid = self.requests = self.replies = 0
        self.ready = False
        self.wake, wake_write = os.pipe()
        for fd in (self.wake, wake_write):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the byte in the pipe is what counts
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        processes.adopt_orphans()

    def serve(self) -> None:
        """Start, say how that went, and answer requests until the trainer is gone."""
        self.function = None
        if is_ours(self.setup["function"]):
            with contextlib.suppress(Exception):  # the worker fails in the same way, and says so
                self.function = load(self.setup["function"])
        self.fork()
        self.give(self.hello)
        while True:
            self.wait_for_request()
            request = wire.decode(wire.receive(self.control))
            if request == wire.GOODBYE:
                return
            body = wire.receive(self.control)
            self.give(lambda request=request, body=body: self.score(body, request))

    def hello(self) -> bytes:
        """What the worker says when it has loaded its function, or has not."""
        reply = self.exchange(None, self.setup["load_timeout"])
        self.ready = True
        return reply

    def score(self, body: bytes, request: dict[str, Any]) -> bytes:
        """Have a request answered within its `timeout`; if it says `fresh`, by a new worker."""
        if request["fresh"] or processes.how_it_ended(self.pid) is not None:  # after its last reply
            self.renew()
        if not self.ready:
            hello = wire.decode(self.hello())
            if "refused" in hello:
                raise FaultError("error", f"the function no longer loads: {hello['refused']['got']}")
        return self.exchange(body, request["timeout"])

    def give(self, ask: Callable[[], bytes]) -> None:
        """Send the trainer what `ask` returns, or the fault it raises; then make the processes fit for the next one."""
        try:
            reply = ask()
        except FaultError as fault:
            self.tell({"status": fault.status, "message": str(fault)})
            self.renew()
        else:
            self.tell({"status": "reply"})
            wire.send(self.verdicts, reply, time.monotonic() + 3600)
            processes.end_children(spared=self.pid)

    def tell(self, verdict: dict[str, Any]) -> None:
        """Send a verdict to the trainer, which is waiting for it."""
        wire.send(self.verdicts, wire.encode(verdict), time.monotonic() + 3600)

    def renew(self) -> None:
        """End the worker and what it started, and fork the next."""
        processes.end_worker(self.pid)
        self.fork()

    def fork(self) -> None:
        """Fork a worker; it loads its function while the trainer does something else."""
        if self.requests:
            os.close(self.requests)
            os.close(self.replies)
        theirs_in, self.requests = os.pipe()
        self.replies, theirs_out = os.pipe()
        supervisor = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (self.control, self.verdicts, self.wake, self.requests, self.replies):
                os.close(fd)
            worker.run(theirs_in, theirs_out, self.setup, supervisor, self.function)
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.ready = False

    def wait_for_request(self) -> None:
        """Wait until the trainer says something; ClosedError if it is gone."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while not poll.poll(1000):
            self.check_trainer()

    def check_trainer(self) -> None:
        """ClosedError if the trainer is gone though a process it forked still holds the pipe open."""
        if os.getppid() != self.trainer:
            raise wire.ClosedError

    def exchange(self, body: bytes | None, limit_s: float) -> bytes:
        """Send a request (None: none) to the worker and return its reply.

        Raises:
            FaultError: no reply within `limit_s`, the worker ended, wrote no frame, or started too many processes.
            ClosedError: the trainer is gone or wants to go.
        """
        deadline = time.monotonic() + limit_s
        next_look = time.monotonic() + TICK_S
        rest = memoryview(b"" if body is None else wire.HEAD.pack(len(body)) + body)
        reply = bytearray()
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        poll.register(self.control, select.POLLIN)  # while it waits, the trainer has nothing to say but goodbye
        if rest:
            poll.register(self.requests, select.POLLOUT)
        while (left := deadline - time.monotonic()) > 0:
            events = dict(poll.poll(min(TICK_S, left) * 1000))
            if self.control in events:
                raise wire.ClosedError
            if self.requests in events:
                rest = self.write_some(rest)
                if not rest:
                    poll.unregister(self.requests)
            self.silence_wake()
            ended = processes.how_it_ended(self.pid)
            is_open = self.read_some(reply)
            if is_whole(reply):
                return bytes(reply[wire.HEAD.size :])
            if not is_open and ended is None:
                ended = processes.how_it_ended(
                    self.pid, within_s=0.1
                )  # a dying process closes its files a little before
            if ended is not None:
                raise FaultError("error", f"its process ended: {ended}")
            if not is_open:
                raise FaultError("error", "its process closed the pipe of its replies")
            if time.monotonic() > next_look:
                next_look = time.monotonic() + TICK_S
                self.check_trainer()
                if len(processes.descendants(os.getpid())) > MAX_PROCESSES:
                    raise FaultError("error", f"its process started more than {MAX_PROCESSES} processes")
        raise FaultError("timeout", f"no result within {limit_s:g} s")

    def write_some(self, rest: memoryview) -> memoryview:
        """Write what the pipe takes; return what is left."""
        try:
            return rest[os.write(self.requests, rest) :]
        except BlockingIOError:
            return rest
        except OSError:
            return rest[:0]  # the worker closed its end, and is found dead, or gives no reply

    def read_some(self, reply: bytearray) -> bool:
        """Read what is there into `reply`; whether the worker's end is open."""
        while len(reply) <= wire.MAX_REPLY_BYTES + wire.HEAD.size:
            try:
                chunk = os.read(self.replies, wire.CHUNK_BYTES)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            reply += chunk
        return True

    def silence_wake(self) -> None:
        """Take the bytes that ended children left in the pipe which wakes `poll`."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake, wire.CHUNK_BYTES):
                pass


def is_whole(reply: bytearray) -> bool:
    """Whether the bytes so far are a whole frame; FaultError if they cannot become one."""
    if len(reply) < wire.HEAD.size:
        return False
    size = wire.HEAD.unpack_from(reply)[0]
    if size > wire.MAX_REPLY_BYTES or len(reply) > size + wire.HEAD.size:
        raise FaultError("error", "its process wrote something else than one reply into its pipe")
    return len(reply) == size + wire.HEAD.size


if __name__ == "__main__":
    main()
