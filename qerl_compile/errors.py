"""Every error a user can meet, as one small tree of sentences.

An error message here always has four parts: *where* it happened (module path, file, recipe key), what was
*expected*, what was *got* (with the value), and the one thing to *do* about it. The parts are keyword arguments so
that none can be forgotten, and they stay readable as attributes for tools and tests.

What this module does not do: wrap errors of other libraries wholesale. A bug should keep its own traceback; only
input that a user can change is turned into a `QerlError`.
"""


class QerlError(Exception):
    """Base of all errors raised on purpose by qerl-compile.

    Args:
        where: module path, file or recipe key at which the fault lies.
        expected: what the rule is.
        got: what was found instead, with its value.
        do: the one thing that mends it, as an imperative sentence.
    """

    def __init__(self, *, where: str, expected: str, got: str, do: str) -> None:
        self.where, self.expected, self.got, self.do = where, expected, got, do
        super().__init__(f"{where}: expected {expected}; got {got}. {do}")


class RecipeError(QerlError):
    """A recipe is malformed, names unknown keys, or has a rule that matches nothing."""


class FormatError(QerlError):
    """A tensor cannot be represented in the requested number format."""


class CheckpointError(QerlError):
    """A checkpoint directory is damaged, hostile, or incomplete."""


class GraphError(QerlError):
    """A captured graph does not have the form a pass needs, or a ghost weight would be computed with."""


class ModelError(QerlError):
    """An operation was asked of a model that cannot support it, such as casting packed weights."""


class NotFiniteError(ModelError):
    """A model computed NaN or Inf; the trainer counts such a step and leaves all parameters as they were."""


class ExportError(QerlError):
    """An export cannot be written as asked."""


class TaskError(QerlError):
    """A task, dataset row, prompt template or reward function is unusable."""
