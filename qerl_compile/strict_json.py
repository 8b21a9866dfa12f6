"""Read JSON from strangers within bounds of memory, without silent choices.

Python's `json` keeps the last of two equal keys, recurses until `RecursionError`, and turns 1 MB of `[],[],` into 20 MB
of lists. Two readers here take that out:

- `parse_json`: a whole document. Bytes and the number of values are bounded *before* parsing (every value but the first
  follows a comma or an opening bracket, so counting those three characters bounds the count from above).
- `members`: one object, member by member, for a safetensors header of up to 16 MB: nothing but the current member is
  ever parsed, and a member is bounded in characters.

Both refuse duplicate keys at every level. Faults are `CheckpointError`s that name the file.

What this module does not do: judge what the values mean.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from qerl_compile.wording import refuse_checkpoint, shown

MAX_VALUES = 300_000

_SPACE = re.compile(r"[ \t\r\n]*")


class _DuplicateKeyError(ValueError):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _DuplicateKeyError(f"the key {shown(twice)} twice in one object")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _refuse(where: str, expected: str, got: str) -> NoReturn:
    refuse_checkpoint(where, expected, got, do="Fetch the file again from its source.")


def parse_json(raw: bytes, *, where: str, encoding: str = "utf-8", max_values: int = MAX_VALUES) -> Any:
    """Parse one JSON document.

    Args:
        raw: the bytes; the caller has bounded their number.
        where: file name for errors.
        encoding: "utf-8", or "ascii" where names must be ASCII anyway (one emoji makes a text four times larger).
        max_values: bound on the number of values of any kind in the document.

    Raises:
        CheckpointError: not JSON, too many values, nested too deep, or a key twice in one object.
    """
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count > max_values:
        _refuse(where, f"at most {max_values} JSON values", f"up to {count}")
    try:
        text = raw.decode(encoding)
        del raw  # the caller passed its only reference, so that bytes, text and values are never there together
        return _DECODER.decode(text)
    except _DuplicateKeyError as fault:
        _refuse(where, "each key once", str(fault))
    except RecursionError:
        _refuse(where, "JSON of moderate depth", "nesting deeper than Python's recursion limit")
    except ValueError as fault:  # JSONDecodeError, UnicodeDecodeError, an integer of more than 4300 digits
        _refuse(where, f"JSON in {encoding.upper()}", shown(str(fault)))


def members(text: str, *, where: str, max_characters: Callable[[str], int]) -> Iterator[tuple[str, Any]]:
    """Yield the members of the one object that `text` holds, parsing one at a time.

    Args:
        text: `{...}` with optional white space around it.
        where: file name for errors.
        max_characters: bound on the text of a member's value, given its key. A key has at most 4096 characters.

    Raises:
        CheckpointError: not an object, a member out of bounds, a key twice.
    """

    def after_space(at: int) -> int:
        found = _SPACE.match(text, at)
        return found.end() if found else at

    def value_at(at: int, limit: int) -> tuple[Any, int]:
        window = text[at : at + limit]
        try:
            value, length = _DECODER.raw_decode(window)
        except _DuplicateKeyError as fault:
            _refuse(where, "each key once", str(fault))
        except (ValueError, RecursionError) as fault:
            is_cut = len(window) == limit
            _refuse(
                where,
                f"a JSON value of at most {limit} characters" if is_cut else "valid JSON",
                f"{shown(window)} at character {at}" + ("" if is_cut else f" ({shown(str(fault))})"),
            )
        return value, at + length

    def expect(at: int, allowed: str) -> int:
        if at >= len(text) or text[at] not in allowed:
            _refuse(where, " or ".join(f"`{c}`" for c in allowed) + f" at character {at}", shown(text[at : at + 20]))
        return at + 1

    seen: set[str] = set()
    at = after_space(expect(after_space(0), "{"))
    if text[at : at + 1] == "}":
        at += 1
    else:
        while True:
            if text[at : at + 1] != '"':
                _refuse(where, f"a key in quotation marks at character {at}", shown(text[at : at + 20]))
            key, at = value_at(at, 4096)
            if key in seen:
                _refuse(where, "each key once", f"the key {shown(key)} twice in one object")
            seen.add(key)
            at = after_space(expect(after_space(at), ":"))
            value, at = value_at(at, max_characters(key))
            yield key, value
            at = expect(after_space(at), ",}")
            if text[at - 1] == "}":
                break
            at = after_space(at)
    at = after_space(at)
    if at != len(text):
        _refuse(where, f"nothing after the object, which ends at character {at}", shown(text[at : at + 20]))
