"""Text with holes filled from a row: `What is {expression}?` or `{expression} =`.

A hole is a bare name and nothing more: no attributes, no indexing, no conversions, no format specification. So
neither a template nor the data behind it can reach into objects, and a template is refused when it is written, not
when the first odd row arrives. `{{` and `}}` stand for braces. A name is looked up among the row's columns and then
in its `metadata`; only text and numbers are filled in.
"""

from string import Formatter

from qerl_compile.errors import TaskError
from qerl_compile.rl.tasks.task import Row


class FieldTemplate:
    """A checked template.

    Args:
        text: the template.
        where: which setting it is, named in errors.

    Raises:
        TaskError: unbalanced braces, or a hole that is not a bare name.
    """

    def __init__(self, text: str, *, where: str) -> None:
        self.text, self.where = text, where
        do = "Use bare column names such as {expression}, and {{ or }} for a brace."
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise TaskError(where=where, expected="balanced braces", got=f"{text!r} ({error})", do=do) from error
        for _, field, spec, conversion in parts:
            if field is not None and (spec or conversion or not field.isidentifier()):
                raise TaskError(where=where, expected="holes that are bare names", got=repr(text), do=do)
        self._parts = [(literal, field) for literal, field, _, _ in parts]

    def fill(self, row: Row) -> str:
        """The text for one row.

        Raises:
            TaskError: the row has no such text or number; the message lists what it has.
        """
        return "".join(literal + ("" if field is None else self._value(field, row)) for literal, field in self._parts)

    def _value(self, field: str, row: Row) -> str:
        metadata = row.get("metadata")
        known = {**(metadata if isinstance(metadata, dict) else {}), **row}
        value = known.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            usable = [name for name, v in known.items() if isinstance(v, str | int | float) and not isinstance(v, bool)]
            do = f"This task has {', '.join(sorted(usable)) or 'no such columns'}."
            raise TaskError(where=self.where, expected=f"text or a number in {{{field}}}", got=repr(value)[:80], do=do)
        return str(value)
