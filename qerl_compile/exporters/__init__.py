"""Exporters: they read a model's attached state, never its graphs, and write directories that other programs load.

vllm, sglang    compressed-tensors NVFP4A16   exporters/compressed_tensors.py
peft            the adapter alone             exporters/peft.py
"""

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn

from qerl_compile.errors import ExportError

__all__ = ["TARGETS", "export"]


def _compressed_tensors(*args: Any, **kwargs: Any) -> None:
    from qerl_compile.exporters.compressed_tensors import export_compressed_tensors

    export_compressed_tensors(*args, **kwargs)


def _peft(*args: Any, **kwargs: Any) -> None:
    from qerl_compile.exporters.peft import export_peft

    export_peft(*args, **kwargs)


TARGETS: dict[str, Callable[..., None]] = {"vllm": _compressed_tensors, "sglang": _compressed_tensors, "peft": _peft}


def export(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    target: str,
    tokenizer: Any = None,
    base_name: str | None = None,
    norms_in_base: bool = False,
) -> None:
    """Write a transformed model for another program.

    Args:
        model: a transformed causal LM.
        out_dir: must not exist.
        target: "vllm" or "sglang" for the model without its adapter; "peft" for the adapter alone.
        tokenizer: saved beside the weights if given.
        base_name: what the model came from, for the card; default: what `load` or `transform` recorded.
        norms_in_base: for a model with trained norms: "vllm" and "sglang" write them in the place of the base's, "peft"
            leaves them out. The two exports then belong together, and vLLM, which refuses norms in an adapter, can
            serve them.

    Raises:
        ExportError: an unknown target, an existing `out_dir`, or a model that cannot be written so.
    """
    check_target(target)
    TARGETS[target](model, out_dir, tokenizer=tokenizer, base_name=base_name, norms_in_base=norms_in_base)


def check_target(target: str) -> None:
    """Refuse an unknown target before any work starts.

    Raises:
        ExportError: lists the known ones.
    """
    if target not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise ExportError(where="target", expected=f"one of {known}", got=repr(target), do="Choose one of these.")
