"""`--calibrate-on FILE|TASK`: sample text for commands that pack, and what they say about it.

A file that exists is text (plain, or JSON lines). Anything else is a task, whose training prompts are rendered by the
model's chat template with the right answer after each: the text that the model will see when it is trained.

What this module does not do: calibrate (calibrating/).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qerl_compile.calibrating import LayerReport
    from qerl_compile.recipe import Recipe

CalibrateOn = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TASK",
        help="Sample text to calibrate on: a text or JSONL file, or a task, as rg:NAME[:k=v,…]. What is measured, "
        "and on how much of it, is in the recipe.",
    ),
]


def calibration_texts(spec: str, tokenizer: Any) -> Iterable[str]:
    """Return the texts of a file, or an endless stream of a task's training rows with their answers.

    Raises:
        CheckpointError: the file is unreadable.
        TaskError: the task is.
    """
    if Path(spec).is_file():
        from qerl_compile.perplexity import read_texts

        return read_texts(spec)
    from qerl_compile.rl.tasks import parse_task

    return _rows_as_texts(parse_task(spec), tokenizer)


def refuse_unread(recipe: "Recipe") -> None:
    """Refuse sample text with a recipe that makes the same bytes without it.

    Raises:
        RecipeError: no rule reads text.
    """
    from qerl_compile.errors import RecipeError

    measured = recipe.calibration
    readers = (
        any((rule.scales, rule.rounding) != ("amax", "nearest") for rule in recipe.quantize),
        any(rule.score == "wanda" for rule in recipe.sparsify),
        measured is not None
        and (measured.activations or (measured.channel_scaling, measured.kv_cache) != ("none", "none")),
    )
    if not any(readers):
        raise RecipeError(
            where="--calibrate-on",
            expected="a rule that reads text: scales mse or four_over_six, rounding gptq, score wanda, or "
            "calibration with awq, activations or kv_cache",
            got=f"none in recipe {recipe.name!r}",
            do="Leave --calibrate-on out, or add one, as --set quantize[0].rounding=gptq.",
        )


def _rows_as_texts(task: Any, tokenizer: Any) -> Iterator[str]:
    from qerl_compile.rl.prompts import PromptFormat

    form = PromptFormat(chat=bool(getattr(tokenizer, "chat_template", None)))
    position = 0
    while True:
        row = task.train_row(0, position)
        text, _ = form.render(tokenizer, row)
        yield text + str(row.get("solution", row["answer"]))
        position += 1


def summary(reports: list["LayerReport"]) -> str:
    """Return the line that says what calibration did."""
    errors = [report.output_error for report in reports]
    folded = sum(len(report.folded) for report in reports)
    scaled = f", channel factors moved out of {folded} modules" if folded else ""
    worst = max(range(len(errors)), key=errors.__getitem__)
    return (
        f"calibrated on {reports[0].tokens} tokens: squared error of a layer's output {errors[worst]:.2%} at most "
        f"({reports[worst].layer}){scaled}"
    )


def export_options(packed: Any) -> dict[str, Any]:
    """Return the export options under which measured scales are written: they would be lost otherwise."""
    measured = packed.qerl.recipe.calibration
    if measured is None:
        return {}
    return {
        **({"activations": "4"} if measured.activations else {}),
        **({"kv_cache": "8"} if measured.kv_cache == "fp8" else {}),
    }
