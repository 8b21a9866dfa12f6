"""Which module a rule selects: `re.fullmatch` over full module paths, the first match within a list wins.

    rules × paths  →  (path, rule) pairs, and an error for a rule that selects nothing

A rule that selects nothing is an error, not a silent no-op, because that is how noise was never applied in the field
(design/method.md, trap 2). It says whether an earlier rule takes all of its modules, and which path was near.

What this module does not do: know what a rule does with a module (plan.py).
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Protocol, TypeVar

from qerl_compile.errors import RecipeError


class _Rule(Protocol):
    @property
    def match(self) -> str: ...


RuleT = TypeVar("RuleT", bound=_Rule)


def first_matches(
    key: str, rules: Sequence[RuleT], paths: Sequence[str], known: Iterable[str]
) -> list[tuple[str, RuleT]]:
    """Return (path, rule) for each path that a rule selects.

    Args:
        key: the recipe's list, for errors.
        rules: in the order of the recipe.
        paths: what may be selected.
        known: what an error may name as near, which is more than `paths`.

    Raises:
        RecipeError: a rule is never the first to match.
    """
    selected: list[tuple[str, RuleT]] = []
    used = [False] * len(rules)
    for path in paths:
        for index, rule in enumerate(rules):
            if re.fullmatch(rule.match, path):
                selected.append((path, rule))
                used[index] = True
                break
    for index, rule in enumerate(rules):
        if not used[index]:
            shadowed = any(re.fullmatch(rule.match, path) for path in paths)
            _refuse_unused(f"{key}[{index}].match", rule.match, list(known), shadowed=shadowed)
    return selected


def matching(key: str, pattern: str, paths: Sequence[str]) -> tuple[str, ...]:
    """Return the paths that one pattern selects.

    Raises:
        RecipeError: it selects none.
    """
    matches = re.compile(pattern).fullmatch
    selected = tuple(path for path in paths if matches(path))
    if not selected:
        _refuse_unused(key, pattern, list(paths), shadowed=False)
    return selected


def _refuse_unused(where: str, pattern: str, paths: list[str], *, shadowed: bool) -> None:
    if shadowed:
        got = f"{pattern!r}, all of whose modules an earlier rule takes"
        do = "Move this rule up or delete it: within a list the first match wins."
    else:
        near = get_close_matches(pattern.replace("\\", ""), paths, n=1, cutoff=0.3) or paths[:1]
        got = f"{pattern!r}, which matches none of {len(paths)} modules"
        do = f"Match the full path, such as {near[0]!r}." if near else "The model has no such modules; delete the rule."
    raise RecipeError(where=where, expected="a pattern that selects at least one module", got=got, do=do)
