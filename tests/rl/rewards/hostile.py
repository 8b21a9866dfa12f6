"""Reward functions that do the worst to the completion "bad" and give the length of every other, and what must come.

The file is both things: a reward file, which a worker loads, and the table `CASES`, which tests and
benchmarks/hostile_rewards.py read. It imports the standard library only, as the worker loads it again after each kill.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """What a function does to "bad", and what must come of that completion.

    Args:
        name: of the function.
        does: in words.
        kind: the outcome.
        message: what its message must hold.
        costs_all: whether the others fail with it, because the function breaks the interface.
        or_late: whether a timeout is right too, since on a busy machine it can come first.
    """

    name: str
    does: str
    kind: str
    message: str = ""
    costs_all: bool = False
    or_late: bool = False

    def is_right(self, kind, message):
        return (kind, self.message in message) == (self.kind, True) or (self.or_late and kind == "timeout")


CASES: list[Case] = []


def hostile(does, kind, message="", *, costs_all=False, or_late=False):
    """Make a reward function of one that is called if "bad" is in the batch; what it returns replaces the scores."""

    def wrap(attack):
        def reward(completions, **kwargs):
            lengths = [float(len(text)) for text in completions]
            if "bad" not in completions:
                return lengths
            done = attack(completions)
            return lengths if done is None else done

        CASES.append(Case(attack.__name__, does, kind, message, costs_all, or_late))
        reward.__name__ = attack.__name__
        return reward

    return wrap


def only_bad(completions, value):
    return [value if text == "bad" else float(len(text)) for text in completions]


# --- takes too long -------------------------------------------------------------------------------


@hostile("loops for ever", "timeout")
def loop(completions):
    while True:
        pass


@hostile("10**10**9, one operation that holds the interpreter lock", "timeout")
def bignum(completions):
    return 10 ** (10**9)


@hostile("sleeps, with SIGTERM, SIGINT and SIGALRM ignored", "timeout")
def ignores_signals(completions):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


@hostile("stops itself with SIGSTOP", "timeout")
def stops_itself(completions):
    os.kill(os.getpid(), signal.SIGSTOP)


@hostile("forks; child and parent sleep", "timeout")
def forks_and_sleeps(completions):
    os.fork()
    time.sleep(1000)


@hostile("forks; the child takes a session of its own, and both sleep", "timeout")
def forks_away_and_sleeps(completions):
    if os.fork() == 0:
        os.setsid()
    time.sleep(1000)


@hostile("raises an exception whose text never ends", "timeout")
def endless_text(completions):
    class EndlessError(Exception):
        def __str__(self):
            while True:
                pass

    raise EndlessError


@hostile("catches everything, for ever", "timeout")
def catches_everything(completions):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(1000)


# --- ends the process -----------------------------------------------------------------------------


@hostile("os._exit(3)", "error", "exit code 3")
def exits(completions):
    os._exit(3)


@hostile("os._exit(0)", "error", "exit code 0")
def exits_with_0(completions):
    os._exit(0)


@hostile("reads address 0", "error", "SIGSEGV")
def segfault(completions):
    ctypes.string_at(0)


@hostile("os.abort()", "error", "SIGABRT")
def aborts(completions):
    os.abort()


@hostile("kills its process group", "error", "SIGKILL")
def kills_itself(completions):
    os.killpg(0, signal.SIGKILL)


@hostile("recurses without limit on the C stack", "error", "SIGSEGV")
def overflows_the_stack(completions):
    sys.setrecursionlimit(10**9)

    def down(_):
        return list(map(down, [0]))

    down(0)


@hostile("closes every file", "error", "its process ")
def closes_files(completions):
    os.closerange(0, 1024)


@hostile("writes rubbish into every file", "error", "something else than one reply")
def writes_rubbish(completions):
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"\xff" * 100)


@hostile("forks without end", "error", "more than 256 processes", or_late=True)
def fork_bomb(completions):
    until = time.monotonic() + 3  # a bound for the case that nothing stops it
    while time.monotonic() < until:
        if os.fork() == 0:
            time.sleep(0.005)


@hostile("allocates 8 GB", "error", "MemoryError")
def allocates(completions):
    return [float(len(bytearray(8 << 30)))] * len(completions)


@hostile("writes a file of 2 GB", "error", "File too large")
def writes_a_large_file(completions):
    path = Path(f"large-{os.getpid()}")
    try:
        with path.open("wb") as file:
            file.truncate(2 << 30)
    finally:
        path.unlink()


# --- raises ---------------------------------------------------------------------------------------


@hostile("1 / 0", "error", "ZeroDivisionError: division by zero (hostile.py:")
def divides(completions):
    return 1 / 0


@hostile("sys.exit('bye')", "error", "SystemExit: bye")
def system_exit(completions):
    sys.exit("bye")


@hostile("raises KeyboardInterrupt", "error", "KeyboardInterrupt")
def interrupts(completions):
    raise KeyboardInterrupt


@hostile("raises an exception whose text and repr raise", "error", "UnprintableError: a message that cannot be printed")
def unprintable(completions):
    class UnprintableError(Exception):
        def __str__(self):
            raise RuntimeError("no")

        __repr__ = __str__

    raise UnprintableError


@hostile("recurses until Python's limit", "error", "RecursionError")
def recurses(completions):
    def down(n):
        return down(n + 1)

    down(0)


@hostile("raises with a text of 100 MB", "error", "ValueError: xxx")
def raises_at_length(completions):
    raise ValueError("x" * 100_000_000)


# --- returns something wrong ----------------------------------------------------------------------


@hostile("NaN", "error", "expected a finite number; got nan")
def nan(completions):
    return only_bad(completions, float("nan"))


@hostile("infinity", "error", "expected a finite number; got inf")
def infinity(completions):
    return only_bad(completions, float("inf"))


@hostile("an integer of 401 digits", "error", "got an integer of 1329 bits")
def large_integer(completions):
    return only_bad(completions, 10**400)


@hostile("an integer of 10 million bits", "error", "got an integer of 10000001 bits")
def huge_integer(completions):
    return only_bad(completions, 1 << 10_000_000)


@hostile("text", "error", "expected a finite number; got '1.0'")
def text(completions):
    return only_bad(completions, "1.0")


@hostile("an object whose repr raises", "error", "got a Nameless that cannot be printed")
def nameless(completions):
    class Nameless:
        def __repr__(self):
            raise RuntimeError("no")

    return only_bad(completions, Nameless())


@hostile("one value too few", "error", "values; got", costs_all=True)
def too_short(completions):
    return [1.0] * (len(completions) - 1)


@hostile("10 million values", "error", "values; got 10000000", costs_all=True)
def too_long(completions):
    return [1.0] * 10_000_000


@hostile("a number and no list", "error", "a list of numbers; got float", costs_all=True)
def no_list(completions):
    return 1.0


@hostile("a generator without end", "error", "a list of numbers; got generator", costs_all=True)
def generator(completions):
    def values():
        while True:
            yield 1.0

    return values()


@hostile("text of 100 MB", "error", "a list of numbers; got str", costs_all=True)
def long_text(completions):
    return "1" * 100_000_000


@hostile("a dict", "error", "a list of numbers; got dict", costs_all=True)
def mapping(completions):
    return dict.fromkeys(completions, 1.0)


# --- misbehaves, but scores -----------------------------------------------------------------------


@hostile("booleans", "score")
def booleans(completions):
    return [True] * len(completions)


@hostile("None: not applicable", "score")
def none(completions):
    return only_bad(completions, None)


@hostile("prints 100 MB", "score")
def prints(completions):
    for _ in range(100):
        print("x" * 1_000_000)  # noqa: T201


@hostile("makes a directory, goes there and removes it", "score")
def loses_its_directory(completions):
    path = Path(f"gone-{os.getpid()}")
    path.mkdir(exist_ok=True)
    os.chdir(path)
    Path("../" + path.name).resolve().rmdir()


@hostile("leaves a busy thread behind", "score")
def leaves_a_thread(completions):
    def run():
        while True:
            time.sleep(0.001)

    threading.Thread(target=run).start()


@hostile("leaves an alarm behind", "score")
def leaves_an_alarm(completions):
    signal.setitimer(signal.ITIMER_REAL, 0.05)


@hostile("leaves a sleeping child behind", "score")
def leaves_a_child(completions):
    if os.fork() == 0:
        time.sleep(1000)


@hostile("leaves a daemon behind: two forks and a session of its own", "score")
def leaves_a_daemon(completions):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    os.wait()


@hostile("closes and replaces standard output and error", "score")
def replaces_streams(completions):
    sys.stdout.close()
    sys.stdout = sys.stderr = None


@hostile("ends a moment after it answered", "score")
def ends_later(completions):
    threading.Timer(0.05, lambda: os._exit(1)).start()
