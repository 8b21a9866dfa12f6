"""Check a recipe's regular expression before any module path is matched against it."""

import re

MAX_PATTERN_CHARACTERS = 1000


def checked_pattern(pattern: str) -> str:
    """Return `pattern` unchanged if it compiles and is short.

    Raises:
        ValueError: in the words "<expected>; <got>", for recipe_errors.py to locate.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise ValueError(f"a pattern of at most {MAX_PATTERN_CHARACTERS} characters; it has {len(pattern)}")
    try:
        re.compile(pattern)
    except re.error as fault:
        raise ValueError(f"a valid regular expression; {fault}") from None
    return pattern
