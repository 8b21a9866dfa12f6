"""The YAML of recipes: numbers as people write them, and none of YAML's surprises."""

import math

import pytest

from qerl_compile.errors import RecipeError
from qerl_compile.recipe_yaml import parse_yaml


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),  # YAML 1.1, and so PyYAML by itself, reads these two as texts
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1.0e-5", 1e-5),
        ("+12", 12),
        ("012", 12),  # eight-based ten in YAML 1.1
        ("1_000", "1_000"),
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("0x10", "0x10"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("'1e-5'", "1e-5"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("'(.*\\.)?\\w+'", "(.*\\.)?\\w+"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_yaml(text, "r.yaml")
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(parse_yaml(".NaN", "r.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml:3:1: expected each key once in a mapping; got 'a' again (first on line 1)"),
        ("x:\n  a: 1\n  'a': 2", "r.yaml:3:3: expected each key once"),
        ("{1: a, 01: b}", "got 1 again"),
        ("a: &b 1\nc: *b", "r.yaml:2:4: expected values written out; got the alias *b"),
        ("&a [*a]", "got the alias *a"),
        ("<<: {a: 1}\n? [x]\n: 1", "r.yaml:2:3: expected a word as key"),
        ("!!python/object/apply:os.system ['id']", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("!!timestamp x", "expected plain YAML without tags"),
        ("a: !x 1", "r.yaml:1:4: expected plain YAML without tags; got the tag '!x'"),
        ("[" * 33 + "]" * 33, "expected at most 32 levels of nesting"),
        ("a: b: c", "r.yaml:1:5: expected valid YAML; got mapping values are not allowed here"),
        ("a: [1", "expected valid YAML"),
        ("\t- a", "expected valid YAML"),
        ("--- 1\n--- 2", "expected valid YAML"),
        ("a\0b", "expected valid YAML"),
        ("\ud800", "expected valid YAML"),
        ("9" * 5000, "an integer of at most 100 digits; got 5000 characters"),
        ("#" * 100_001, "at most 100000 bytes of YAML; got 100001 bytes"),
        ("\u00e9" * 50_001, "got 100002 bytes"),
    ],
)
def test_surprises_are_refused_with_line_and_column(text: str, words: str) -> None:
    assert words in refusal(text)


def test_32_levels_are_enough_and_allowed() -> None:
    value = parse_yaml("[" * 32 + "]" * 32, "r.yaml")
    for _ in range(31):
        (value,) = value
    assert value == []


def test_ever_more_brackets_do_not_reach_pythons_recursion_limit() -> None:
    assert "at most 32 levels" in refusal("[" * 99_999)


def test_a_merge_key_is_a_key_like_any_other() -> None:
    assert parse_yaml("<<: {a: 1}", "r.yaml") == {"<<": {"a": 1}}
