"""SIGTERM and Ctrl-C become a question that the loop asks: should I stop?

    with Interrupt() as interrupt:
        for step in …:
            …
            if interrupt.requested:        # after the rollout: the running step is given up; after the step: it is kept
                save(…); raise SystemExit(interrupt.exit_code)

A handler that saved by itself would do so in the middle of an update. So the first signal only sets a flag, and the
loop saves the state of its last finished step and leaves with 128 + signal: 143 for SIGTERM, 130 for Ctrl-C.

A second signal ends the process at once with the same code. Nothing is flushed or cleaned up, and nothing has to be:
the last checkpoint is whole at every moment. Within a second of the first it counts as its echo, because a terminal, a
launcher and a scheduler each pass one request on, and torchrun's workers would otherwise be ended before they save.

Python runs handlers in the main thread only and lets no other thread install them; entered elsewhere, this object is
inert. Python also runs them between bytecodes only: a signal that arrives inside a long kernel is seen after it.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_S = 1.0


class Interrupt:
    """A context manager under which SIGTERM and SIGINT are requests; the old handlers come back at its end.

    Attributes:
        signal_number: the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._since = 0.0
        self._old: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """What the process ends with after a request: 128 + signal, as a shell reports it; 0 without one."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            # None is a handler that was not installed from Python; it cannot be put back, and the default is nearest.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal_number is None:
            self.signal_number, self._since = number, now
        elif now - self._since > ECHO_S:
            os._exit(128 + number)
