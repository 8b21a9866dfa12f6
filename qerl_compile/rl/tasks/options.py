"""The `key=value,key=value` part of a task spec, read into Python values and never evaluated.

A value is an integer, a float, true or false; anything else is a string, and `a|b|c` is a list of values. Pairs are
separated by a comma or a colon.
"""

import re
from typing import Any

from qerl_compile.errors import TaskError


def parse_options(text: str, *, where: str) -> dict[str, Any]:
    """Read `k=v` pairs.

    Args:
        text: pairs separated by `,` or `:`; empty means none.
        where: what to name in errors, normally the whole spec.

    Raises:
        TaskError: a part without `=`, an empty key or value, or a key given twice.
    """
    options: dict[str, Any] = {}
    for pair in re.split("[,:]", text) if text else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (equals and key and value):
            raise TaskError(where=where, expected="key=value", got=repr(pair), do="Write it as key=value or remove it.")
        if key in options:
            raise TaskError(where=where, expected="each key once", got=f"{key!r} twice", do=f"Remove one {key!r}.")
        options[key] = parse_list(value) if "|" in value else parse_scalar(value)
    return options


def parse_list(text: str) -> list[Any]:
    """`a|b|c` as a list; empty items are dropped, so `+|` is a list of one."""
    return [parse_scalar(item) for item in text.split("|") if item]


def parse_scalar(text: str) -> int | float | bool | str:
    """An int, float or bool when `text` reads as one, else `text` itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?", text):
        return float(text)
    return text
