"""Export, measure, and publish only what passes.

    stage/export     what the exporter writes, complete with card
    verify           load it back, measure
    card and page    the table goes into README.md, the page is quality.html
    publish          the directory gets its name, or, over budget, never does

An export that fails is not published: a directory that exists will be served by somebody. Its page is kept beside the
place where it would have been, as `NAME.quality.html`, so that one can see why; if that name is taken, by the page of
an earlier attempt, as `NAME.quality.2.html` and so on. `keep_failing` publishes it nonetheless, with the verdict on its
card. A budget is a number, and raising it is the other way to accept an export.

A merge is always measured; exporting without one is measured when `export_verified` is called rather than `export`.
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from qerl_compile.errors import ExportError
from qerl_compile.exporters import check_target, export
from qerl_compile.exporters.card import add_quality, provenance, shown_base
from qerl_compile.exporters.merging import (
    DenseMerge,
    Master,
    check_merge,
    check_mode,
    master_directory,
    requantized,
    write_dense,
)
from qerl_compile.exporters.verify.budgets import Budgets
from qerl_compile.exporters.verify.card_section import quality_section
from qerl_compile.exporters.verify.logits import MAX_TOKENS
from qerl_compile.exporters.verify.page import PAGE, render
from qerl_compile.exporters.verify.verification import Verification
from qerl_compile.exporters.verify.verifying import DENSE_MERGES, verify
from qerl_compile.perplexity import WINDOW, sample_texts, token_windows
from qerl_compile.staged_write import refuse_existing, staged_directory


def export_verified(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    target: str,
    tokenizer: Any,
    merge: str = "",
    base: str | PathLike[str] | None = None,
    base_name: str | None = None,
    norms_in_base: bool = False,
    texts: Sequence[str] | None = None,
    text_name: str = "",
    budgets: Budgets | None = None,
    window: int = WINDOW,
    keep_failing: bool = False,
    **options: Any,
) -> Verification:
    """Export a model, verify the directory, write its quality on it, and publish it if it passes.

    Args:
        model: a transformed causal LM.
        out_dir: must not exist.
        target: as `export`. The dense merge modes write a bf16 directory, which every serving target loads.
        tokenizer: a Hugging Face tokenizer; it is saved beside the weights, and cuts the texts.
        merge: "" leaves the adapter out; "dequantized", "bf16-master" or "nvfp4" merges it (merging/modes.py).
        base: directory or hub id of the bf16 base, for bf16-master and for comparison; None is what the model recorded.
        base_name: for the card, as `export`.
        norms_in_base: as `export`; a merge includes trained norms anyway.
        texts: what to predict; None is the sample that comes with the package.
        text_name: what `texts` are called in the table; "" is a plain description.
        budgets: None is the defaults.
        window: most tokens of a window.
        keep_failing: publish what is over budget too; its card says so.
        **options: of the target, as `export`.

    Returns:
        What was measured. It has passed, unless `keep_failing`.

    Raises:
        OverBudgetError: it has not passed; `out_dir` does not exist, `out_dir.quality.html` does.
        ExportError, CheckpointError: it cannot be exported or merged so, or cannot be read back.
    """
    refuse_existing(out_dir)
    check_verified(target, merge, options, base=base, texts=texts, budgets=budgets)
    if merge:
        check_merge(model, merge)
    needs_base = base is not None or merge == "bf16-master"
    master = Master(master_directory(model, base), model) if needs_base else None
    if target != "peft":  # texts without a token to predict
        token_windows(tokenizer, sample_texts() if texts is None else texts, window=window, max_tokens=MAX_TOKENS)
    limits = budgets or Budgets()
    final = Path(out_dir).absolute()
    with staged_directory(final) as stage:
        inner = stage / "export"
        if merge in DENSE_MERGES:
            inner.mkdir()
            weights = DenseMerge(model, master if merge == "bf16-master" else None)
            write_dense(weights, inner, mode=merge, tokenizer=tokenizer, base_name=base_name)
        else:
            context = requantized(model) if merge else contextlib.nullcontext()
            with context:
                export(
                    *(model, inner),
                    target=target,
                    tokenizer=tokenizer,
                    base_name=base_name,
                    norms_in_base=norms_in_base and not merge,
                    **options,
                )
        found = verify(
            *(inner, model),
            target=target,
            tokenizer=tokenizer,
            merge=merge,
            norms_in_base=norms_in_base,
            texts=texts,
            text_name=text_name,
            budgets=limits,
            base=base,
            window=window,
        )
        title = f"Quality of {final.name}, from {shown_base(provenance(model, base_name)[0]) or type(model).__name__}"
        page = render(found, title)
        if not found.passed and not keep_failing:
            _write_page(final, page)
            found.refuse(str(out_dir))
        (inner / PAGE).write_text(page, encoding="utf-8")
        add_quality(inner, quality_section(found, page=PAGE))
        for entry in inner.iterdir():
            entry.rename(stage / entry.name)
        inner.rmdir()
    return found


def check_verified(
    target: str,
    merge: str,
    options: Mapping[str, Any],
    *,
    base: str | PathLike[str] | None = None,
    texts: Sequence[str] | None = None,
    budgets: Budgets | None = None,
) -> None:
    """Refuse what no model can be exported or measured with, before one is loaded.

    Args:
        target: as `export_verified`, and so are the others.
        merge: "" for none.
        options: of the target.
        base: of no use to an adapter, whose tensors alone are compared.
        texts: likewise.
        budgets: likewise.

    Raises:
        ExportError: an unknown target, option or mode, two that exclude each other, or one that would do nothing.
    """
    check_target(target, **options)
    if merge:
        check_mode(merge)
    if target == "onnx":
        raise ExportError(
            where="target onnx",
            expected="a target whose directory qerl_compile.load reads",
            got="onnx",
            do="Export it without --verify and --merge.",
        )
    if merge and (target == "peft" or (merge in DENSE_MERGES and options)):
        got = "target peft, which is the adapter alone" if target == "peft" else f"options {', '.join(options)}"
        raise ExportError(
            where=f"merge {merge}",
            expected="a serving target, without options of a packed format if the result is dense",
            got=got,
            do="Leave out one of the two.",
        )
    given = {"base": base, "texts": texts, "budgets": budgets}
    idle = [name for name, value in given.items() if value is not None]
    if target == "peft" and idle:
        raise ExportError(
            where="target peft",
            expected="no base, texts or budgets, since an adapter is verified by its tensors alone",
            got=", ".join(idle),
            do=f"Leave {idle[0]} out.",
        )


def _write_page(final: Path, page: str) -> None:
    for number in itertools.count(1):
        name = f"{final.name}.quality.html" if number == 1 else f"{final.name}.quality.{number}.html"
        try:
            with final.with_name(name).open("x", encoding="utf-8") as file:  # "x" follows no link either
                file.write(page)
        except FileExistsError:
            continue
        return
