"""Turn pydantic's findings into located sentences with a suggestion.

Pydantic reports `loc=('quantize', 0, 'mach'), type='extra_forbidden'`. A user needs: which file, which key in the way
they would write it, what stood there, what is allowed, the nearest allowed word, and one thing to do. The first fault
is told in full and the others are counted, because faults of a mistyped key come in pairs (`mach` is unknown *and*
`match` is missing) and the unknown key is the cause: unknown keys are told first.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from qerl_compile.errors import RecipeError
from qerl_compile.wording import nearest, shown

_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "invalid_key": "a word as key",
    "string_too_short": "a text of {min_length} characters or more",
    "string_too_long": "a text of at most {max_length} characters",
    "tuple_type": "a list",
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "too_short": "{min_length} items or more",
    "too_long": "{max_length} items at most",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "literal_error": "one of {expected}",
}


def key_path(loc: Iterable[str | int]) -> str:
    """`('quantize', 0, 'match')` -> `quantize[0].match`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def recipe_error(fault: ValidationError, root: type[BaseModel], where: str) -> RecipeError:
    """Phrase the most telling of the faults that pydantic found.

    Args:
        fault: what pydantic raised while validating a mapping against `root`.
        root: the model class of the whole recipe.
        where: file name, option or "recipe", put before the key.
    """
    faults = sorted(fault.errors(include_url=False), key=lambda f: f["type"] != "extra_forbidden")
    first = faults[0]
    loc, kind = first["loc"], first["type"]
    place = f"{where}: {key_path(loc)}" if loc else where
    more = "" if len(faults) == 1 else f" ({len(faults) - 1} more after this one)"

    if kind == "extra_forbidden":
        known = _fields_at(root, loc[:-1])
        guess = nearest(str(loc[-1]), known)
        do = f"Did you mean `{guess}`?" if guess else "Remove it."
        return RecipeError(
            where=place,
            expected="one of the keys " + ", ".join(known),
            got=f"the unknown key {shown(loc[-1])} with the value {shown(first['input'])}{more}",
            do=do,
        )
    if kind == "missing" and isinstance(loc[-1], int):  # a tuple of fixed length
        return RecipeError(
            where=f"{where}: {key_path(loc[:-1])}",
            expected=f"a list of at least {loc[-1] + 1} items",
            got=f"{shown(first['input'])}{more}",
            do="Write the whole list.",
        )
    if kind == "missing":
        return RecipeError(
            where=place,
            expected=f"the key `{loc[-1]}`",
            got=f"none among {shown(first['input'])}{more}",
            do=f"Add `{loc[-1]}`.",
        )
    if kind == "value_error":  # raised by our own validators in the words "<expected>; <got>"
        expected, _, got = str(first.get("ctx", {}).get("error", first["msg"])).partition("; ")
        value = f"{shown(first['input'])}: " if isinstance(first["input"], str) else ""
        return RecipeError(where=place, expected=expected, got=f"{value}{got}{more}", do="Change the value.")
    expected = _KINDS[kind].format(**first.get("ctx", {})) if kind in _KINDS else first["msg"]
    return RecipeError(where=place, expected=expected, got=f"{shown(first['input'])}{more}", do=_remedy(first))


def _remedy(fault: Any) -> str:
    value, kind = fault["input"], fault["type"]
    if kind == "literal_error" and isinstance(value, str):
        allowed = [word.strip("' ") for word in fault["ctx"]["expected"].replace(" or ", ",").split(",")]
        guess = nearest(value, allowed)
        return f"Did you mean `{guess}`?" if guess else f"Write `{allowed[0]}`."
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "Write it without quotation marks." if _is_number(value) else "Write a number in its place."
    if kind == "tuple_type":
        return "Write a list: one `- ` item per line."
    if kind == "model_type":
        return "Write `key: value` lines below it."
    return "Change the value."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _fields_at(root: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the model that lies at `loc` below `root`."""
    model = root
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model class inside `NoiseConfig | None` or `tuple[QuantizeRule, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)
