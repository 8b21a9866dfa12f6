"""A signal is a request; the second one, a second later, is an order."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qerl_compile.rl.checkpoints import Interrupt, interrupt

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_sets_a_flag_and_the_old_handlers_come_back(number, code):
    heard = []
    before = {each: signal.signal(each, lambda *_: heard.append(1)) for each in interrupt.SIGNALS}
    try:
        mine = {each: signal.getsignal(each) for each in interrupt.SIGNALS}
        with Interrupt() as request:
            assert (request.requested, request.exit_code) == (False, 0)
            signal.raise_signal(number)
            assert (request.requested, request.exit_code, request.signal_number) == (True, code, number)
            signal.raise_signal(number)  # an echo within a second: we are still here
            signal.raise_signal(signal.SIGTERM)
            assert request.exit_code == code
        assert {each: signal.getsignal(each) for each in interrupt.SIGNALS} == mine
        assert heard == []
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_old_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interrupt():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_it_is_inert():
    seen = []

    def work():
        before = signal.getsignal(signal.SIGTERM)
        with Interrupt() as request:
            seen.append((request.requested, signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


LOOP = """
import os, time
from qerl_compile.rl.checkpoints import interrupt
interrupt.ECHO_S = float(os.environ["ECHO_S"])
with interrupt.Interrupt() as request:
    os.write(1, b"ready\\n")
    while not request.requested:
        time.sleep(0.01)
    os.write(1, b"asked\\n")
    if "STUBBORN" in os.environ:
        time.sleep(60)
raise SystemExit(request.exit_code)
"""


def started(**environment):
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "ECHO_S": "0", **environment}
    )
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == b"asked\n"
    return child


def test_a_loop_that_asks_ends_with_143():
    with started() as child:
        assert child.wait(30) == 143


def test_a_second_signal_ends_a_process_that_does_not_ask():
    with started(STUBBORN="1") as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 143  # long before its 60 s


def test_an_echo_of_the_first_signal_does_not():
    with started(STUBBORN="1", ECHO_S="1000") as child:
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        child.kill()
