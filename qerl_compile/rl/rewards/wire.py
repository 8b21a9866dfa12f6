"""How the trainer, a supervisor and its worker talk: frames on pipes, JSON inside.

    frame = length of the body, 8 bytes, big-endian | body

Nothing is pickled: what a worker sends may have been garbled by the code it runs, and reading a pickle runs code. JSON
alone would lose what Python rows may hold (tuples, sets, keys that are not text; reasoning_gym's scorers look at
them), so `encode` writes those as {"__qerl__": kind, "items": [...]} and `decode` builds them again. Other objects are
a TypeError. A subclass of str (numpy's) arrives as str.

File descriptors that are written to are non-blocking, so that a peer that does not read cannot hold the writer.
"""

import json
import os
import select
import struct
import time
from numbers import Integral, Real
from typing import Any

TAG = "__qerl__"
HEAD = struct.Struct(">Q")
CHUNK_BYTES = 1 << 16
MAX_REPLY_BYTES = 64 << 20
"""Most that a worker may say at once; the scores of 100,000 completions take 2 MB."""

GOODBYE = {"end": True}
"""The trainer's last frame. A closed pipe would say the same, were it not that a fork of the trainer holds it open."""

_PLAIN = frozenset({str, int, float, bool, type(None)})
_BUILD = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}


class ClosedError(Exception):
    """The other end is closed."""


class LateError(Exception):
    """The deadline passed."""


def encode(value: Any) -> bytes:
    """Python values as JSON.

    Raises:
        TypeError: an object that is neither plain nor a container of plain values.
        ValueError: an integer of more than 4300 digits, or a container that holds itself.
    """
    return json.dumps(_plain(value)).encode("ascii")


def decode(body: bytes) -> Any:
    """What `encode` was given. ValueError if it is not JSON."""
    return json.loads(body, object_hook=_restored)


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN or (kind is list and _PLAIN.issuperset(map(type, value))):  # token ids, by the million
        return value
    if kind is list:
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        if TAG not in value and all(type(key) is str for key in value):
            return {key: _plain(each) for key, each in value.items()}
        return {TAG: "dict", "items": [[_plain(key), _plain(each)] for key, each in value.items()]}
    for name in ("tuple", "set", "frozenset"):
        if isinstance(value, _BUILD[name]):
            return {TAG: name, "items": [_plain(each) for each in value]}
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__}")


def _restored(found: dict[str, Any]) -> Any:
    return _BUILD[found[TAG]](found["items"]) if TAG in found else found


def send(fd: int, body: bytes, deadline: float) -> None:
    """Write a frame to a non-blocking `fd` before `deadline` (of time.monotonic).

    Raises:
        ClosedError: nobody reads.
        LateError: the deadline passed.
    """
    rest = memoryview(HEAD.pack(len(body)) + body)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise LateError from None
        except OSError as error:
            raise ClosedError from error


def receive(fd: int, deadline: float | None = None) -> bytes:
    """Read a frame's body before `deadline`; None waits for ever. Raises as `send` does."""
    head = _read(fd, HEAD.size, deadline)
    return _read(fd, HEAD.unpack(head)[0], deadline)


def _read(fd: int, count: int, deadline: float | None) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    found = bytearray()
    while len(found) < count:
        wait = None if deadline is None else max(0, deadline - time.monotonic()) * 1000
        if not poll.poll(wait):
            raise LateError
        chunk = os.read(fd, min(CHUNK_BYTES, count - len(found)))
        if not chunk:
            raise ClosedError
        found += chunk
    return bytes(found)
