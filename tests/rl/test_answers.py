from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.rl.answers import (
    default_extractor,
    extract,
    is_numeric_answer,
    last_boxed,
    last_tagged,
    numbers,
    to_number,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no digits", []),
        ("4 + 3 = 7", ["4", "3", "7"]),
        ("The answer is -7.", ["-7"]),
        ("The answer is \u22127", ["-7"]),
        ("= +7", ["7"]),
        ("9-5", ["9", "5"]),
        ("9 -5", ["9", "5"]),
        ("9 - 5", ["9", "5"]),
        ("(3) -5", ["3", "5"]),
        ("(3)-5", ["3", "5"]),
        ("x-7", ["7"]),
        ("(-5)", ["-5"]),
        ("$-5", ["-5"]),
        ("-$5", ["-5"]),
        ("costs $1,234.50 now", ["1234.50"]),
        ("1,000,000", ["1000000"]),
        (r"1{,}234 or 1,\!234 or 1\!,234 or 1\,234{,}567", ["1234", "1234", "1234", "1234567"]),
        (r"f(1{,}2) and 3\,cm", ["1", "2", "3"]),
        ("1, 2,3", ["1", "2", "3"]),
        ("1,2345", ["1", "2345"]),
        ("12345,678", ["12345", "678"]),
        ("7.", ["7"]),
        (".5 or 0.5", ["0.5", "0.5"]),
        ("-.5", ["-0.5"]),
        ("**7**", ["7"]),
        ("7km and 50%", ["7", "50"]),
        ("R2D2 x3 y_4", []),
        ("1e5 12E-3 5e", ["5"]),
        ("1.2.3", ["1.2"]),
        ("是72。", ["72"]),
        ("\u0663", []),
        ("- 7", ["7"]),
        ("4\n-5", ["4", "-5"]),
        ("1" * 401 + " 2", ["2"]),
    ],
)
def test_numbers_in_text(text: str, expected: list[str]) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("final", "4 + 3 = 7", "7"),
        ("final", "first 3, then <answer>1,234</answer> and 9", "1234"),
        ("final", "<answer>1</answer> no, <answer> 2 </answer>", "2"),
        ("final", "<ANSWER>7 apples</ANSWER>", "7"),
        ("final", "<answer>7 or 8</answer>", "7 or 8"),
        ("final", "<answer></answer> 7", None),
        ("final", "so \\boxed{-12} is right, see 3", "-12"),
        ("final", "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("final", "\\boxed{7\\text{ cm}}", "7"),
        ("final", "reason\n#### 72\nmore 9", "72"),
        ("final", "#### $1,000 in all", "1000"),
        ("final", "#### Step 1\nThe answer is 9", "9"),
        ("final", "#### 1. Add\n3 + 4 = 7\n#### 2. Answer\nThe answer is 7.", "7"),
        ("final", "#### 7.\nwhich is not 9", "7"),
        ("final", "#### 3.5 apples, not 9", "3.5 apples, not 9"),
        ("final", r"so \boxed{1{,}234}", "1234"),
        ("final", "##### 5\nthen 9", "9"),
        ("final", "<think>maybe 3</think>it is 4", "4"),
        ("final", "<think>maybe 3", None),
        ("final", "maybe 3</think>it is 4", "4"),
        ("final", "", None),
        ("marked", "4 + 3 = 7", None),
        ("marked", "4 + 3 = <answer>7</answer>", "7"),
        ("first_number", " 7. Then 8 + 9", "7"),
        ("first_number", " seven", None),
        ("last_number", "#### 5\nno, 6", "6"),
        ("last_number", "<think>5", None),
        ("text", "  olleh \n", "olleh"),
        ("text", " ", None),
    ],
)
def test_each_rule_finds_its_answer(how, text: str, expected: str | None) -> None:
    assert extract(text, how) == expected


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("final", "I reverse it.\nolleh\n", "olleh"),
        ("final", "so #### B", "B"),
        ("final", "<answer>3 4 5</answer>", "3 4 5"),
        ("final", "  ", None),
        ("marked", "\\boxed{B}", "B"),
    ],
)
def test_answers_that_are_no_numbers_are_kept_as_text(how, text: str, expected: str | None) -> None:
    assert extract(text, how, numeric=False) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        (" -7.50 ", Decimal("-7.5")),
        ("1,000", 1000),
        (r"1{,}000", 1000),
        ("\u22123", -3),
        ("$5", 5),
        ("7.0", 7),
        ("7 8", None),
        ("7 apples", None),
        ("1e3", None),
        ("", None),
        (None, None),
        ("nan", None),
        ("9" * 401, None),
    ],
)
def test_text_as_a_number(text: str | None, expected: int | Decimal | None) -> None:
    assert to_number(text) == expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        *((number, True) for number in ("7", "-7", "0", "0.5", "1,000")),
        ("0101", False),
        ("-01", False),
        ("3/4", False),
        ("B", False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_which_references_are_compared_as_numbers(reference: object, expected: bool) -> None:
    assert is_numeric_answer(reference) is expected


def test_a_prompt_that_begins_the_answer_reads_the_first_number() -> None:
    assert default_extractor("{expression} =") == "first_number"
    assert default_extractor(None) == "final"
    assert default_extractor("") == "final"


def test_marks_that_are_never_closed_are_no_marks() -> None:
    assert last_boxed("\\boxed{7") is None
    assert last_boxed("\\boxed{7} \\boxed{8") == "7"
    assert last_boxed("}} \\boxed{{a}b} {c}") == "{a}b"
    assert last_tagged("</answer> <answer>7") is None
    assert last_tagged("<answer>6</answer> <answer>7") == "6"


@given(st.decimals(-(10**9), 10**9, places=3, allow_nan=False), st.booleans())
def test_a_number_written_into_a_sentence_is_found_again(value: Decimal, commas: bool) -> None:
    written = f"{value:,}" if commas else f"{value}"
    found = extract(f"After 3 steps I think the answer is {written}.", "final")
    assert to_number(found) == value


@given(st.text(alphabet="<answer>/\\boxed{} #-+.,$0123456789eE\n\u2212thinks()", max_size=200))
def test_no_text_breaks_a_rule_and_a_found_number_is_one(text: str) -> None:
    for how in ("final", "marked", "text"):
        extract(text, how, numeric=False)
        extract(text, how)
    for found in (extract(text, "first_number"), extract(text, "last_number")):
        assert found is None or to_number(found) is not None


@pytest.mark.parametrize("unit", ["\\boxed{", "<answer>", "#### ", "1,000", "-", "<think>", "</think>"])
def test_degenerate_repetition_is_read_to_its_end(unit: str) -> None:
    assert extract(unit * 20_000 + " <answer>7</answer>") in ("7", None)
