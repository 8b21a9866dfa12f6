"""How values and names are put into messages: short, recognisable, safe to print.

`repr` escapes control characters, so a hostile file name cannot move a terminal's cursor, and everything is cut to a
length that leaves the sentence readable.
"""

import difflib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import NoReturn

from qerl_compile.errors import CheckpointError

MAX_SHOWN_CHARACTERS = 80
MAX_LISTED = 5


def shown(value: object) -> str:
    """The value as a reader would recognise it, cut to 80 characters."""
    if isinstance(value, str | bytes):  # cut first: repr of a 16 MB text is another 16 MB
        value = value[: MAX_SHOWN_CHARACTERS + 1]
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, or None. Looks at the first 2000 known words only."""
    found = difflib.get_close_matches(word, list(islice(known, 2000)), n=1, cutoff=0.6)
    return found[0] if found else None


def listed(names: Collection[str]) -> str:
    """At most five of the names, and how many more there are: `'a', 'b' and 7 more`."""
    text = ", ".join(shown(name) for name in islice(names, MAX_LISTED))
    return text if len(names) <= MAX_LISTED else f"{text} and {len(names) - MAX_LISTED} more"


def printable(text: str) -> str:
    """The text itself, or with escapes if it holds control characters or undecodable bytes of a file name."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def refuse_checkpoint(where: str, expected: str, got: str, *, do: str) -> NoReturn:
    """Raise a CheckpointError without the exception in whose handler it may be called: the message says it all."""
    raise CheckpointError(where=printable(where), expected=expected, got=got, do=do) from None
