"""The three ways to merge an adapter, and what must hold before any of them starts.

An adapter was trained against the packed weight: the function that RL rewarded is `deq(W4) + s·B·A`. Every merge
computes another one, so none is a default; the adapter as a file of its own (target `peft`) is.

    mode          written weight                         what it costs
    dequantized   bf16( deq(W4) + s·B·A )                16 bits a weight; nearest to the function that was trained
    bf16-master   bf16( W16 + s·B·A )                    16 bits a weight; the adapter meets weights it never saw
    nvfp4         Q( deq(W4) + s·B·A )                   4.5 bits a weight; noise, since Q rounds without bias

The second is what most tools do without saying (unslothai/unsloth-zoo issue 810), and is as far from the trained
function as the bf16 base is from the 4-bit one. The third cannot be exact (huggingface/peft issue 2321), and rounding
to nearest would lose the adapter whole (requantized.py). How large the differences are depends on model and adapter,
hence they are measured for each (exporters/verify). Trained norms are merged as trained, rounded to bf16.

Shape suffixes: N output features, K input features, R rank.
"""

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import Adapter, adapter_tensors, adapters_of
from qerl_compile.adapters_off import adapters_are_off
from qerl_compile.errors import ExportError

MODES = ("dequantized", "bf16-master", "nvfp4")


def check_merge(model: nn.Module, mode: str) -> None:
    """Refuse a merge that cannot be, before any work.

    Raises:
        ExportError: an unknown mode; no adapter, one with NaN or Inf, or one that is switched off; an adapter on an
            output head that is tied to the embedding.
    """
    check_mode(mode)
    adapter_tensors(model)  # refuses a model without an adapter, and NaN or Inf in it
    if adapters_are_off(model):
        raise ExportError(
            where="merge",
            expected="a model whose adapter is on",
            got="one inside adapters_off, where its factors are zero",
            do="Merge outside of that block.",
        )
    for path in adapters_of(model):
        name = tied_name(model, path)
        if name is not None:
            raise ExportError(
                where=path,
                expected="an adapter on a weight of its own",
                got=f"one on the weight that is tied to {name}, which a merge would change too",
                do="Export the adapter by itself (target peft), or train without one on this module.",
            )


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        ExportError: lists the known ones.
    """
    if mode not in MODES:
        known = ", ".join(MODES)
        raise ExportError(where="merge", expected=f"one of {known}", got=repr(mode), do="Choose one of these.")


def tied_name(model: nn.Module, path: str) -> str | None:
    """Return the name of another tensor that is the weight of the module at `path`, or None."""
    weight = model.get_submodule(path)._parameters.get("weight")
    if weight is None:
        return None
    holders = (name for name, each in model.named_parameters(remove_duplicate=False) if each is weight)
    return next((name for name in holders if name != f"{path}.weight"), None)


@torch.no_grad()
def delta(adapter: Adapter) -> Tensor:
    """Return what an adapter adds to its weight, `B·A·alpha/rank`: float32 [N, K]."""
    return (adapter.b_NR.float() @ adapter.a_RK.float()).mul_(adapter.alpha / adapter.rank)


def master_directory(model: nn.Module, base: str | PathLike[str] | None) -> Path:
    """Return the directory of the bf16 weights that a model was packed from.

    Args:
        model: a transformed model; `model.qerl.base_name` is asked if `base` is None.
        base: a directory or a hub id.

    Raises:
        ExportError: nothing was recorded.
        CheckpointError: there is no such model.
    """
    from qerl_compile.loading import model_directory

    state = model.__dict__.get("qerl")
    name = base if base is not None else ("" if state is None else state.base_name)
    if not str(name):
        raise ExportError(
            where="merge bf16-master",
            expected="the directory or hub id of the bf16 base model",
            got="none: the model does not know what it was made from",
            do="Name it (base=…, --base).",
        )
    return model_directory(name)
