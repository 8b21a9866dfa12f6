"""Which modules an entry of a config's list of dense modules names: compressed-tensors' `ignore`, ModelOpt's wildcards.

    compressed-tensors    a path, a class of modules ("Linear"), or `re:` and a pattern that matches from the start
    ModelOpt              a path with `*`, `?` and `[...]`

A config may be a stranger's, so a pattern is run only if it cannot run for minutes (recipe_pattern.py). One that could
names nothing here, and `is_unsafe` says so.
"""

import re
from fnmatch import fnmatchcase

from qerl_compile.recipe_pattern import checked_pattern

PATTERN = "re:"


def names_module(entry: str, path: str, *, wildcards: bool) -> bool:
    """Whether an entry names a linear.

    Args:
        entry: of the list.
        path: of an nn.Linear.
        wildcards: whether the list is ModelOpt's.
    """
    if wildcards:
        return fnmatchcase(path, entry)
    if entry.startswith(PATTERN):
        return not is_unsafe(entry) and re.match(entry.removeprefix(PATTERN), path) is not None
    return entry in (path, "Linear")


def is_unsafe(entry: str) -> bool:
    """Whether an entry of compressed-tensors is a pattern that is not run: no regular expression, or one too costly."""
    if not entry.startswith(PATTERN):
        return False
    try:
        checked_pattern(entry.removeprefix(PATTERN))
    except ValueError:
        return True
    return False
