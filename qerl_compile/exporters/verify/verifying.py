"""Load an exported directory back and measure it against the model it was written from, and against the bf16 base.

    schema      does the engine's table accept config and headers?                 exporters/schemas.py
    weights     bits equal to the model's; decibels against the original weights   layers.py
    function    logits beside the model's in memory, and beside the base's         logits.py

The directory is read with `qerl_compile.load`, by the code that reads foreign checkpoints, and never by the writer's.
Models are in memory one after another: the given one records its logits, the base is loaded, records and goes, then the
export is loaded. What coexists is the given model and one other, and the recorded logits.

All is measured with the noise off and activations in 16 bits, whatever the checkpoint says about them: the numbers
speak of the file's weights and not of an engine's kernels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import WEIGHTS, adapter_tensors, trained_norms_of
from qerl_compile.adapters_off import adapters_off
from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.exporters.merging import Master, master_directory
from qerl_compile.exporters.verify.budgets import Budgets
from qerl_compile.exporters.verify.layers import LayerQuality, layer_qualities
from qerl_compile.exporters.verify.logits import MAX_TOKENS, compare, effect_kept, record_logits
from qerl_compile.exporters.verify.verification import Verification
from qerl_compile.loading import load
from qerl_compile.perplexity import WINDOW, sample_texts, token_windows
from qerl_compile.transforming import noise_off

SAMPLE_NAME = "the text that comes with qerl-compile"
DENSE_MERGES = ("dequantized", "bf16-master")


def verify(
    directory: str | PathLike[str],
    model: nn.Module,
    *,
    target: str,
    tokenizer: Any,
    merge: str = "",
    norms_in_base: bool = False,
    texts: Sequence[str] | None = None,
    text_name: str = "",
    budgets: Budgets | None = None,
    base: str | PathLike[str] | None = None,
    window: int = WINDOW,
) -> Verification:
    """Measure an exported directory.

    Args:
        directory: what was exported.
        model: the transformed model in memory that it was written from.
        target: what it was exported for, with or without a version.
        tokenizer: a Hugging Face tokenizer.
        merge: the merge mode, "" if the adapter was left out.
        norms_in_base: whether trained norms were written in the place of the base's.
        texts: what to predict; None is the sample that comes with the package. At most 2048 tokens are used.
        text_name: what `texts` are called in the table; "" is a plain description.
        budgets: None is the defaults.
        base: directory or hub id of the bf16 base; None is what the model recorded, if that is still there.
        window: most tokens of a window.

    Returns:
        All numbers and the verdict; nothing is raised for a value over its budget.

    Raises:
        CheckpointError: the directory cannot be read back, or the texts hold no token to predict.
        ExportError: `base` was given and holds other names or shapes than the model's.
    """
    if target == "peft":
        return _verify_adapter(Path(directory), model, norms_in_base=norms_in_base, budgets=budgets or Budgets())
    windows = token_windows(tokenizer, sample_texts() if texts is None else texts, window=window, max_tokens=MAX_TOKENS)
    problems = None if merge in DENSE_MERGES else _schema_problems(directory, target)
    master, base_note = _find_master(model, base)
    with noise_off(model), _as_exported(model, merged=bool(merge), norms_in_base=norms_in_base):
        expected = record_logits(model, windows)
    plain = None
    if merge:
        with noise_off(model), adapters_off(model):
            plain = record_logits(model, windows)
    of_base = None if master is None else record_logits(_load(master.checkpoint.root, model), windows)
    exported = _load(directory, model)
    layers, against = _layers(exported, model, master, merged=bool(merge))
    to_model = compare(expected, exported, windows)
    kept = None
    if plain is not None:
        start = of_base if merge == "bf16-master" and of_base is not None else plain
        kept = effect_kept(expected, plain, start, exported, windows)
    if not text_name:
        text_name = SAMPLE_NAME if texts is None else "the given texts"
    return Verification(
        target=target,
        merge=merge,
        schema_problems=problems,
        layers=layers,
        sqnr_against=against,
        to_model=to_model,
        effect_kept=kept,
        to_base=None if of_base is None else compare(of_base, exported, windows),
        base_note=base_note,
        text=f"{to_model.tokens:,} tokens of {text_name}, in windows of {window}",
        budgets=budgets or Budgets(),
    )


def _schema_problems(directory: str | PathLike[str], target: str) -> tuple[str, ...]:
    from qerl_compile.exporters.schemas import check_schema

    return tuple(str(problem) for problem in check_schema(directory, target))


def _find_master(model: nn.Module, base: str | PathLike[str] | None) -> tuple[Master | None, str]:
    try:
        return Master(master_directory(model, base), model), ""
    except (CheckpointError, ExportError) as fault:
        if base is not None:
            raise
        return None, f"expected {fault.expected}; got {fault.got}"


def _load(directory: str | PathLike[str], model: Any) -> Any:
    """Load a directory where and as the model is, compiled alike, so that a difference is one of files."""
    embedding_VD = model.get_input_embeddings().weight
    return load(directory, device=embedding_VD.device, dtype=embedding_VD.dtype, inner=model.qerl.inner)


def _layers(
    exported: Any, model: nn.Module, master: Master | None, *, merged: bool
) -> tuple[tuple[LayerQuality, ...], str]:
    """Every layer's quality, and what the weights were compared with, in words."""
    if merged:
        return tuple(layer_qualities(exported, model, merged=True, original=None)), "the trained weight deq(W4) + s·B·A"
    if master is not None:
        # weights into which calibration folded factors, or that were trained, are not the base's up to rounding
        with contextlib.suppress(ExportError):
            found = tuple(layer_qualities(exported, model, merged=False, original=master.read))
            return found, "the base's bf16 weight"
    return tuple(layer_qualities(exported, model, merged=False, original=None)), "what the model computes with"


@contextmanager
def _as_exported(model: nn.Module, *, merged: bool, norms_in_base: bool) -> Iterator[None]:
    """Let the model compute what the export should: with its adapter only if that was merged."""
    if merged:
        yield
        return
    trained: dict[str, Tensor] = {path: each.data.clone() for path, each in trained_norms_of(model).items()}
    with adapters_off(model):
        if norms_in_base:
            for path, weight_D in trained_norms_of(model).items():
                weight_D.data.copy_(trained[path])
        yield


def _verify_adapter(directory: Path, model: nn.Module, *, norms_in_base: bool, budgets: Budgets) -> Verification:
    """Compare an exported adapter's tensors with the model's; its function is theirs and the base's."""
    from safetensors.torch import load_file

    expected = adapter_tensors(model, norms=not norms_in_base)
    try:
        found = load_file(directory / WEIGHTS)
    except OSError as fault:
        raise CheckpointError(
            where=str(directory / WEIGHTS),
            expected="a readable file",
            got=fault.strerror or str(fault),
            do="Export the adapter again.",
        ) from None
    names = sorted({*expected, *found})
    unequal = [
        name
        for name in names
        if name not in expected or name not in found or not torch.equal(expected[name], found[name])
    ]
    note = "an adapter has no weights of its own"
    return Verification("peft", "", None, (), "", None, None, None, note, "", budgets, unequal_factors=tuple(unequal))
