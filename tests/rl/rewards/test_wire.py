import math
import os
import time
from fractions import Fraction

import numpy as np
import pytest

from qerl_compile.rl.rewards import wire


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -(10**30), 0.1, "text", "\ud800 \x00 é", [], {}, [[1, "a"], [None]]),
        *((), (1, (2, [3])), {1, 2}, frozenset({(1, 2)}), {1: "a", (2, 3): {"b": ()}}, {"a": {None: 1}}),
        {"__qerl__": "tuple", "items": [1]},
        {"given": {"metadata": [{"edges": [(0, 1)], "colors": {0: 1}}]}},
    ],
    ids=repr,
)
def test_python_values_come_back_as_they_were(value) -> None:
    back = wire.decode(wire.encode(value))
    assert (back, type(back)) == (value, type(value))


def test_bytes_of_a_plain_value_are_json() -> None:
    assert wire.encode({"a": [1, 0.5, None, True, "é"]}) == b'{"a": [1, 0.5, null, true, "\\u00e9"]}'
    assert wire.encode((1,)) == b'{"__qerl__": "tuple", "items": [1]}'


def test_numbers_and_text_of_numpy_become_pythons() -> None:
    back = wire.decode(wire.encode([np.int64(3), np.float32(0.5), np.str_("a"), Fraction(1, 4)]))
    assert back == [3, 0.5, "a", 0.25]
    assert [type(each) for each in back] == [int, float, str, float]
    assert math.isnan(wire.decode(wire.encode(math.nan)))


@pytest.mark.parametrize("value", [object(), b"bytes", 1j, {"a": [print]}])
def test_an_object_is_refused_by_its_type(value) -> None:
    with pytest.raises(TypeError, match=r"a builtins\.\w+"):
        wire.encode(value)


def test_frames_arrive_whole_and_in_order() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    soon = time.monotonic() + 10
    for body in (b"one", b"", b"three"):
        wire.send(write, body, soon)
    assert [wire.receive(read, soon) for _ in range(3)] == [b"one", b"", b"three"]
    os.close(write)
    with pytest.raises(wire.ClosedError):
        wire.receive(read)
    os.close(read)


def test_a_peer_that_does_not_read_or_write_cannot_hold_the_other() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with pytest.raises(wire.LateError):
        wire.receive(read, time.monotonic())
    with pytest.raises(wire.LateError):
        wire.send(write, bytes(1 << 20), time.monotonic() + 0.01)
    os.close(read)
    with pytest.raises(wire.ClosedError):
        wire.send(write, b"x", time.monotonic() + 10)
    os.close(write)
