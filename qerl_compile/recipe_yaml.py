"""Read YAML from strangers: PyYAML's safe loader with the surprises taken out.

A recipe needs mappings, lists, strings, numbers, booleans and null, nothing else of YAML. So the loader

- resolves plain scalars by the YAML 1.2 core schema: `1e-5` is a float (YAML 1.1 reads a string), `no` and `off` are
  strings, `012` is twelve, `2024-01-01` is a string;
- rejects duplicate keys (PyYAML keeps the last one silently), with line and column;
- rejects explicit tags (`!!python/object`, but also `!!timestamp`, whose constructor fails with an AttributeError on
  garbage) and aliases (a legal alias bomb is lazy until somebody walks it), so neither has to be bounded;
- bounds size (100 kB) and nesting (32), before recursion can hurt.

It never constructs an object of a class that the text names. Faults are `RecipeError`s that carry `file:line:column`.
"""

import re
from collections.abc import Hashable
from typing import Any, NoReturn

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode

from qerl_compile.errors import RecipeError
from qerl_compile.wording import shown

MAX_BYTES = 100_000  # a recipe has 2,000; PyYAML takes 17 s and 380 MB for a megabyte of `1,1,1,`
MAX_DEPTH = 32


class _CoreLoader(yaml.SafeLoader):
    """`SafeLoader` with the YAML 1.2 core schema, unique keys, no tags, no aliases and bounded depth."""

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self._where = where
        self._depth = 0

    def refuse(self, mark: yaml.Mark | None, *, expected: str, got: str, do: str) -> NoReturn:
        raise RecipeError(where=_place(self._where, mark), expected=expected, got=got, do=do)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if isinstance(event, AliasEvent):
            self.refuse(
                event.start_mark,
                expected="values written out",
                got=f"the alias *{event.anchor}",
                do="Write the value out in place of the alias.",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.refuse(
                event.start_mark,
                expected="plain YAML without tags",
                got=f"the tag {shown(tag)}",
                do="Remove the tag; a recipe holds only mappings, lists, strings and numbers.",
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.refuse(
                event.start_mark,
                expected=f"at most {MAX_DEPTH} levels of nesting",
                got=f"{MAX_DEPTH + 1} or more",
                do="Flatten it; a recipe needs four levels.",
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, ScalarNode):
                self.refuse(
                    key_node.start_mark,
                    expected="a word as key",
                    got="a list or a mapping as key",
                    do="Write `key: value` with a plain word before the colon.",
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                self.refuse(
                    key_node.start_mark,
                    expected="each key once in a mapping",
                    got=f"{shown(key)} again (first on line {seen[key].line + 1})",
                    do="Remove one of the two.",
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)

    def construct_core_int(self, node: ScalarNode) -> int:
        if len(node.value) > 100:  # Python itself refuses to convert 4300 digits, with a ValueError that has no place
            self.refuse(
                node.start_mark,
                expected="an integer of at most 100 digits",
                got=f"{len(node.value)} characters",
                do="Write a smaller number.",
            )
        return int(node.value)

    def construct_core_float(self, node: ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


# Emptied so that none of YAML 1.1's resolvers stays. SafeLoader keeps its own table: this one belongs to the subclass.
_CoreLoader.yaml_implicit_resolvers = {}
_CORE = "tag:yaml.org,2002:"
_CoreLoader.add_implicit_resolver(_CORE + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_CoreLoader.add_implicit_resolver(_CORE + "null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(_CORE + "int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_CoreLoader.add_implicit_resolver(
    _CORE + "float",
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)
_CoreLoader.add_constructor(_CORE + "int", _CoreLoader.construct_core_int)
_CoreLoader.add_constructor(_CORE + "float", _CoreLoader.construct_core_float)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document into plain Python values.

    Args:
        text: the document.
        where: file name or option, put before `line:column` in errors.

    Returns:
        dict, list, str, int, float, bool or None; mapping keys may be any scalar.

    Raises:
        RecipeError: malformed, too large, too deep, duplicate key, tag or alias.
    """
    size_bytes = len(text.encode("utf-8", errors="surrogatepass"))
    if size_bytes > MAX_BYTES:
        raise RecipeError(
            where=where,
            expected=f"at most {MAX_BYTES} bytes of YAML",
            got=f"{size_bytes} bytes",
            do="Check that this is a recipe and not a data file.",
        )
    try:
        return _CoreLoader(text, where).get_single_data()
    except yaml.MarkedYAMLError as fault:
        raise RecipeError(
            where=_place(where, fault.problem_mark or fault.context_mark),
            expected="valid YAML",
            got=fault.problem or fault.context or "a document that cannot be parsed",
            do="Mend that line.",
        ) from None
    except yaml.YAMLError as fault:  # ReaderError: control characters, lone surrogates
        raise RecipeError(where=where, expected="valid YAML", got=str(fault), do="Save it as UTF-8 text.") from None


def _place(where: str, mark: yaml.Mark | None) -> str:
    return where if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}"
