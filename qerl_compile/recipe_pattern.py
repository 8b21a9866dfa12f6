"""Refuse a regular expression that is invalid, or that could match for minutes, before it meets a module path.

Python's `re` backtracks: `(\\w+)+x` tries 2^n ways to split a path of n characters, and cannot be interrupted from
another thread. Recipes come from strangers, so each pattern is priced before use. The price bounds the number of ways
in which the engine can arrange one failing match:

    a character, class or escape      1
    a sequence                        product of its parts
    alternatives `a|b`                sum
    `x?`                              price(x) + 1
    `x*`, `x+`, `x{2,9}`              32, and x must have the price 1: a loop around a choice is exponential
    `x{3}`                            price(x) ** 3

The limit 2^26 lets through five loops in a row, which is one more than the built-in recipes use, and keeps the worst
accepted pattern at about a second for a path of 100 characters. The price is an upper bound, so a harmless pattern such
as `([a-z]+\\.)*q_proj` is refused too; `(.*\\.)?q_proj` says the same and is accepted.

What this module does not do: judge validity itself. `re.compile` runs first, so the scanner below may rely on balanced
brackets.
"""

import re

MAX_CHARACTERS = 1000
MAX_PRICE = 2**26
LOOP_PRICE = 32
MAX_GROUPS = 64  # brackets in all, which bounds the recursion here and in `re`

_GROUP_HEAD = re.compile(r"\?(?:P<\w+>|P=\w+|<=|<!|[:=!>]|\(\w+\)|[a-zA-Z-]*:|[a-zA-Z-]+(?=\))|#[^)]*)")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})[?+]?")


def checked_pattern(pattern: str) -> str:
    """Return `pattern` unchanged if it is valid, short and cheap.

    Raises:
        ValueError: in the words "<expected>; <got>", for recipe_errors.py to locate.
    """
    if len(pattern) > MAX_CHARACTERS:
        raise ValueError(f"a pattern of at most {MAX_CHARACTERS} characters; it has {len(pattern)}")
    if pattern.count("(") > MAX_GROUPS:
        raise ValueError(f"at most {MAX_GROUPS} opening brackets; it has {pattern.count('(')}")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError) as fault:
        raise ValueError(f"a valid regular expression; {fault}") from None
    if compiled.flags & re.VERBOSE:
        raise ValueError("a regular expression without the verbose flag; (?x)")
    price = _Scanner(pattern).alternatives()
    if price > MAX_PRICE:
        raise ValueError("at most five repetitions in a row; more could backtrack for minutes")
    return pattern


class _Scanner:
    """One pass over a valid pattern; each method returns the price of what it consumed."""

    def __init__(self, pattern: str) -> None:
        self.text = pattern
        self.at = 0

    def alternatives(self) -> int:
        price = self.sequence()
        while self.at < len(self.text) and self.text[self.at] == "|":
            self.at += 1
            price += self.sequence()
        return price

    def sequence(self) -> int:
        price = 1
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            begin = self.at
            atom_price = self.atom()
            price *= self.quantified(atom_price, self.text[begin : self.at])
        return price

    def atom(self) -> int:
        first = self.text[self.at]
        self.at += 1
        if first == "\\":
            self.at += 1
        elif first == "[":
            self.skip_class()
        elif first == "(":
            head = _GROUP_HEAD.match(self.text, self.at)
            if head:
                self.at = head.end()
            price = self.alternatives()
            self.at += 1  # the closing bracket
            return price
        return 1

    def skip_class(self) -> None:
        if self.text.startswith("^", self.at):
            self.at += 1
        self.at += 1  # the first member may be a literal `]`
        if self.text[self.at - 1] == "\\":
            self.at += 1
        while self.text[self.at] != "]":
            self.at += 2 if self.text[self.at] == "\\" else 1
        self.at += 1

    def quantified(self, price: int, atom: str) -> int:
        found = _QUANTIFIER.match(self.text, self.at)
        if not found or found.group() in ("{}", "{,}?", "{}?", "{}+"):  # `{}` is two literal braces
            return price
        self.at = found.end()
        least, comma, most = found.groups(default="")
        if found.group()[0] == "?":
            return price + 1
        if found.group()[0] == "{" and (not comma or least == most != ""):
            return min(price ** min(int(least), 64), MAX_PRICE + 1)
        if price > 1:
            raise ValueError(
                "no repetition around a choice or another repetition; "
                f"`{atom}{found.group()}` could backtrack for minutes. `.*` says the same"
            )
        return LOOP_PRICE
