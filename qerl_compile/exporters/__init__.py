"""Exporters: they read a model's attached state, never its graphs, and write directories that other programs load.

    target          format                                              written by
    vllm, sglang    compressed-tensors; format="modelopt" on request    compressed_tensors.py, modelopt.py
    tensorrt-llm    ModelOpt                                            modelopt.py
    transformers    the tensors of compressed-tensors, as "qerl-nvfp4"  compressed_tensors.py
    onnx            one graph with its cache, linears in 4 bits         onnx/
    peft            the adapter alone                                   peft.py

A serving target may name a version of the table in schemas.py: "vllm==0.33". The adapter is never merged unless that
is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import nn

from qerl_compile.errors import ExportError

__all__ = ["TARGETS", "check_target", "export"]


@dataclass(frozen=True)
class Target:
    """What can be exported for: `write` does it, and takes `options` besides the arguments that all targets take."""

    write: Callable[..., None]
    options: frozenset[str] = frozenset()


def _compressed_tensors(*args: Any, **kwargs: Any) -> None:
    from qerl_compile.exporters.compressed_tensors import export_compressed_tensors

    export_compressed_tensors(*args, **kwargs)


def _modelopt(*args: Any, **kwargs: Any) -> None:
    from qerl_compile.exporters.modelopt import export_modelopt

    export_modelopt(*args, **kwargs)


FORMATS: dict[str, Callable[..., None]] = {"compressed-tensors": _compressed_tensors, "modelopt": _modelopt}


def _either(*args: Any, format: str = "compressed-tensors", **kwargs: Any) -> None:
    FORMATS[format](*args, **kwargs)


def _peft(*args: Any, target: str, **kwargs: Any) -> None:
    from qerl_compile.exporters.peft import export_peft

    export_peft(*args, **kwargs)


def _onnx(*args: Any, target: str, norms_in_base: bool, **kwargs: Any) -> None:
    from qerl_compile.exporters.onnx import export_onnx  # norms are always written as trained: it holds the adapter

    export_onnx(*args, **kwargs)


_SERVED = frozenset({"activations", "kv_cache", "shard_size_bytes"})
TARGETS: dict[str, Target] = {
    "vllm": Target(_either, _SERVED | {"format"}),
    "sglang": Target(_either, _SERVED | {"format"}),
    "tensorrt-llm": Target(_modelopt, _SERVED),
    "transformers": Target(_compressed_tensors, _SERVED),
    "onnx": Target(_onnx, frozenset({"runtime", "adapter"})),
    "peft": Target(_peft),
}


def export(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    target: str,
    tokenizer: Any = None,
    base_name: str | None = None,
    norms_in_base: bool = False,
    **options: Any,
) -> None:
    """Write a transformed model for another program.

    Args:
        model: a transformed causal LM.
        out_dir: must not exist.
        target: "vllm", "sglang", "tensorrt-llm" or "transformers" for the model without its adapter, with a version if
            it matters ("vllm==0.33"); "onnx" for a graph; "peft" for the adapter alone.
        tokenizer: saved beside the weights if given.
        base_name: what the model came from, for the card; default: what `load` or `transform` recorded.
        norms_in_base: for a model with trained norms: serving targets write them in the place of the base's, "peft"
            leaves them out. The two exports then belong together, and vLLM, which refuses norms in an adapter, can
            serve them. "onnx" has them in any case, with the adapter.
        **options: of the target. All serving targets: `activations` "16" or "4" (bits; 4 needs calibrated input
            scales), `kv_cache` "16" or "8" (8 needs calibrated scales), `shard_size_bytes`. "vllm" and "sglang":
            `format` "compressed-tensors" or "modelopt". "onnx": `runtime` and `adapter`, see `export_onnx`.

    Raises:
        ExportError: an unknown target or option, an existing `out_dir`, or a model that cannot be written so.
    """
    check_target(target, **options)
    shared = {"tokenizer": tokenizer, "base_name": base_name, "norms_in_base": norms_in_base}
    TARGETS[target.partition("==")[0]].write(model, out_dir, target=target, **shared, **options)


def check_target(target: str, **options: Any) -> None:
    """Refuse an unknown target, version, option or value of one before any work starts.

    Raises:
        ExportError: lists the known ones.
    """
    engine, stated, _ = target.partition("==")
    if engine not in TARGETS:
        known = ", ".join(sorted(TARGETS))
        raise ExportError(where="target", expected=f"one of {known}", got=repr(target), do="Choose one of these.")
    if stated:
        from qerl_compile.exporters.schemas import split_target

        split_target(target)
    for name in options:
        if name not in TARGETS[engine].options:
            known = ", ".join(sorted(TARGETS[engine].options)) or "none"
            raise ExportError(
                where=f"target {engine!r}", expected=f"its options ({known})", got=name, do=f"Leave {name} out."
            )
    for name, known in _choices().items():
        if name in options and options[name] not in known:
            expected = " or ".join(map(repr, known))
            raise ExportError(where=name, expected=expected, got=repr(options[name]), do="Choose one of these.")


def _choices() -> dict[str, tuple[str, ...]]:
    from qerl_compile.exporters.onnx import ADAPTER_MODES, RUNTIMES
    from qerl_compile.exporters.served_state import BITS, KV_BITS

    return {
        "format": tuple(FORMATS),
        "activations": BITS,
        "kv_cache": KV_BITS,
        "runtime": tuple(RUNTIMES),
        "adapter": ADAPTER_MODES,
    }
