"""Every error that we raise on purpose says where, what was expected, what was got, and what to do."""

import ast
from pathlib import Path

import pytest

from qerl_compile import errors
from qerl_compile.errors import QerlError

PACKAGE = Path(errors.__file__).parent
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, QerlError)]
NAMES = {cls.__name__ for cls in CLASSES}
PARTS = {"where", "expected", "got", "do"}


def calls() -> list[tuple[str, ast.Call]]:
    """Every construction of a QerlError in the package, with its place."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", None)
            if isinstance(node, ast.Call) and name in NAMES:
                found.append((f"{file.relative_to(PACKAGE)}:{node.lineno}", node))
    return found


def constant_text(node: ast.expr) -> str:
    """The literal part of a string or f-string; empty for anything else."""
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "…" for p in pieces)


def test_errors_are_raised_in_many_places():
    assert len(calls()) > 40


@pytest.mark.parametrize("place, call", calls(), ids=[place for place, _ in calls()])
def test_every_error_is_given_its_four_parts(place, call):
    given = {keyword.arg for keyword in call.keywords}
    assert not call.args, place
    assert given == PARTS, place
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Constant):
            assert isinstance(keyword.value.value, str), place
            assert keyword.value.value.strip(), (place, keyword.arg)


@pytest.mark.parametrize("place, call", calls(), ids=[place for place, _ in calls()])
def test_what_to_do_is_a_sentence(place, call):
    do = next(keyword.value for keyword in call.keywords if keyword.arg == "do")
    text = constant_text(do)
    if text.strip("…"):
        assert text[0].isupper() or text[0] == "…", (place, text)
        assert text.endswith((".", "…")), (place, text)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_text_holds_all_parts_and_they_stay_readable(cls):
    fault = cls(where="a.b", expected="an apple", got="3 pears", do="Buy apples.")
    assert str(fault) == "a.b: expected an apple; got 3 pears. Buy apples."
    assert (fault.where, fault.expected, fault.got, fault.do) == ("a.b", "an apple", "3 pears", "Buy apples.")
    assert isinstance(fault, QerlError)


@pytest.mark.parametrize("missing", sorted(PARTS))
def test_no_part_can_be_forgotten(missing):
    parts = dict.fromkeys(PARTS - {missing}, "x")
    with pytest.raises(TypeError, match=missing):
        QerlError(**parts)
    with pytest.raises(TypeError):
        QerlError("a message")


def test_errors_of_ours_are_no_errors_of_python():
    """`except ValueError` around a library call must not swallow them."""
    assert not any(issubclass(cls, ValueError | TypeError | RuntimeError | OSError) for cls in CLASSES)


def test_every_class_is_raised_somewhere():
    raised = {call.func.id for _, call in calls()}
    assert NAMES - raised == {"QerlError"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_input_is_never_checked_with_assert(file):
    """Assertions vanish under -O and say nothing to a user."""
    asserts = [node.lineno for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]
    assert asserts == []
