"""Patterns that could match for minutes are refused; those that people write are not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.recipe_pattern import LOOP_PRICE, MAX_PRICE, _Scanner, checked_pattern


@pytest.mark.parametrize(
    ("pattern", "price"),
    [
        ("", 1),
        (r"model\.layers\.0\.mlp", 1),
        (r"model\.layers\.(0|1|2)\.self_attn\.[qkv]_proj", 3),
        (".*", LOOP_PRICE),
        (r"\d+?", LOOP_PRICE),
        ("x{1,3}", LOOP_PRICE),
        ("a{3}", 1),
        ("(a|b){3}", 8),
        ("a{b}", 1),  # braces that are no repetition are letters
        ("a{}", 1),
        (r"(.*\.)?", LOOP_PRICE + 1),
        ("(?!lm_head).*", LOOP_PRICE),
        ("[]a]+", LOOP_PRICE),
        (r"[^]a\]]+x", LOOP_PRICE),
        (r"[\]]+(a|b)?", LOOP_PRICE * 3),
        (r"a\(b\|", 1),
        ("(?i:abc)", 1),
        ("(?i)abc", 1),
        ("(?P<x>a|b)(?P=x)", 2),
        ("(a)?(?(1)a|b)", 4),
        ("(?#a(comment)a", 1),
        ("(?<=a)b(?<!c)", 1),
    ],
)
def test_a_pattern_costs_the_product_of_its_choices(pattern: str, price: int) -> None:
    assert _Scanner(pattern).alternatives() == price
    assert checked_pattern(pattern) == pattern


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a+)+b", "no repetition around a choice or another repetition"),
        (r"(\w+\.)*x", "no repetition around a choice"),
        ("(a|a)*b", r"`\(a|a\)\*` could backtrack"),
        ("(a?)*", "no repetition around a choice"),
        ("(?:a{1,9}){1,9}", "no repetition around a choice"),
        (".*" * 6 + "x", "at most five repetitions in a row"),
        ("(.*a){12}", "at most five repetitions in a row"),
        ("a?" * 27, "at most five repetitions in a row"),
        ("(a|b)" * 30, "at most five repetitions in a row"),
        ("(", "a valid regular expression; missing"),
        ("[", "a valid regular expression; unterminated character set"),
        ("a**", "a valid regular expression; multiple repeat"),
        ("\\", "a valid regular expression; bad escape"),
        ("a{99999999999999999999}", "a valid regular expression; the repetition number is too large"),
        ("(?x) a # (", "without the verbose flag"),
        ("x" * 1001, "at most 1000 characters; it has 1001"),
        ("(" * 400 + ")" * 400, "at most 64 opening brackets; it has 400"),
    ],
)
def test_a_pattern_that_could_match_for_minutes_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words).replace(r"\\", "\\") if "`" not in words else words):
        checked_pattern(pattern)


PIECES = st.sampled_from(
    ["a", "b", ".", r"\d", "[ab]", "[^]]", "(", ")", "(?:", "|", "*", "+", "?", "{2}", "{1,3}", "{,"]
)


@given(st.lists(PIECES, max_size=14).map("".join), st.text("ab1.", max_size=60))
def test_any_pattern_is_refused_or_answers(pattern: str, path: str) -> None:
    try:
        checked_pattern(pattern)
    except ValueError as refusal:
        assert "; " in str(refusal)
    else:
        assert _Scanner(pattern).alternatives() <= MAX_PRICE
        re.fullmatch(pattern, path)
