"""Export a transformed causal LM as one ONNX graph with its cache, its linears still in 4 bits.

    twin.py           what to trace: the plain model of the config, without weights, adapters as branches
    tracing.py        torch.export and torch.onnx: a graph whose weights are inputs with checkpoint names
    weights.py        which number each weight is, checked before anything is written
    packed_nodes.py   how a packed weight is stored and decoded, for each runtime
    filling.py        numbers into the graph
    __init__.py       files: graph, weights beside it, config, tokenizer, card

Why the weights come last: what is traced is a plain Hugging Face model, so no operator of ours has to be translated, no
family is asked for by name, and nothing that holds 4 bits passes through an exporter that does not know them.

Files: `model.onnx` (the graph) and `model.onnx.data` (the weights; always beside the graph, which protobuf limits to 2
GB), config.json, generation_config.json, tokenizer files if given, README.md.

What this module does not do: 16-bit activations (the graph computes in float32), quantized activations, fused attention
operators, a cache of fixed size.
"""

import importlib.util
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from qerl_compile.errors import ExportError
from qerl_compile.exporters.card import Card, provenance, shown_base, write_card
from qerl_compile.exporters.model_config import write_model_config
from qerl_compile.exporters.onnx.filling import fill
from qerl_compile.exporters.onnx.packed_nodes import RUNTIMES, Runtime
from qerl_compile.exporters.onnx.tracing import trace
from qerl_compile.exporters.onnx.twin import make_twin
from qerl_compile.exporters.onnx.weights import Numbers, read_numbers
from qerl_compile.exporters.served_experts import packed_stacks
from qerl_compile.staged_write import refuse_existing, staged_directory

__all__ = ["RUNTIMES", "export_onnx"]

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
ADAPTER_MODES = ("kept", "folded")


def export_onnx(
    model: nn.Module,
    out_dir: str | PathLike[str],
    *,
    runtime: str = "standard",
    adapter: str = "kept",
    tokenizer: Any = None,
    base_name: str | None = None,
) -> None:
    """Write graph, weights, config, tokenizer and card.

    Args:
        model: a transformed causal LM.
        out_dir: must not exist.
        runtime: "standard" writes FLOAT4E2M1 weights and the ONNX operators that decode them (opset 23); "onnxruntime"
            writes bytes and operators that onnxruntime's CPU provider has (opset 21).
        adapter: "kept" leaves LoRA factors beside the packed weights; "folded" adds them into dense weights of the
            adapted linears, which are 4-bit no longer.
        tokenizer: anything with `save_pretrained`, or None.
        base_name: hub id or path of the base model, for the card; default: what `model.qerl` recorded.

    Raises:
        ExportError: an unknown runtime or mode, a missing library, nothing packed, a model that cannot be written so,
            NaN or Inf, or `out_dir` exists.
        FormatError: NaN or Inf in a full weight that is trained and would be packed.
    """
    refuse_existing(out_dir)
    _check_choices(runtime, adapter)
    _check_libraries()
    _refuse_experts(model)
    numbers = read_numbers(model, adapter=adapter)
    to = RUNTIMES[runtime]
    ir_model, weights = trace(make_twin(model, numbers.branches), to.opset)
    fill(ir_model, weights, model, numbers, to)
    ir_model.producer_name, ir_model.ir_version = "qerl-compile", to.ir_version
    with staged_directory(out_dir) as stage:
        _write_graph(ir_model, stage)
        write_model_config(model, stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_card(stage, _card(model, numbers, to, base_name))


def _check_choices(runtime: str, adapter: str) -> None:
    for where, chosen, known in (("runtime", runtime, tuple(RUNTIMES)), ("adapter", adapter, ADAPTER_MODES)):
        if chosen not in known:
            raise ExportError(
                where=where, expected=f"one of {', '.join(known)}", got=repr(chosen), do="Choose one of these."
            )


def _check_libraries() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            where="Python packages",
            expected="onnx and onnxscript, which write the graph",
            got=f"no {' and no '.join(missing)}",
            do="Run `pip install 'qerl-compile[onnx]'`.",
        )


def _refuse_experts(model: nn.Module) -> None:
    for stack, _ in packed_stacks(model):
        raise ExportError(
            where=stack.name,
            expected="linears, since experts are chosen by numbers that no ONNX operator here depends on",
            got="packed experts",
            do="Export it for vllm, sglang or tensorrt-llm.",
        )


def _write_graph(ir_model: Any, stage: Path) -> None:
    import onnx
    import onnx_ir as ir

    ir.save(ir_model, stage / GRAPH, external_data=WEIGHTS)
    onnx.checker.check_model(str(stage / GRAPH))


def _card(model: nn.Module, numbers: Numbers, to: Runtime, base_name: str | None) -> Card:
    base, recipe_yaml = provenance(model, base_name)
    adapters = {
        "in the graph, as branches of two MatMuls": numbers.branches,
        "folded into dense weights": numbers.folded,
    }
    shown = [f"{len(modules)} LoRA modules {how}" for how, modules in adapters.items() if modules]
    return Card(
        title=f"{shown_base(base) or type(model).__name__}, ONNX, {'NVFP4' if numbers.packed else 'dense'} weights",
        summary="A decoder with its cache as one ONNX graph that computes in float32. Packed linears are NVFP4 (4-bit "
        "E2M1, one E4M3 scale per 16 columns, one FP32 scale per matrix) and decoded in the graph.",
        facts={
            "Packed linears": f"{len(numbers.packed)}: {to.shown}",
            "Adapter": "".join(shown) or "none",
            "Inputs": "`input_ids`, `attention_mask` (of past and new tokens), `past_key_values.N.key`/`.value` "
            "(empty at first)",
            "Outputs": "`logits`, `present.N.key`/`.value`",
        },
        usage=to.usage,
        base_name=base,
        relation="quantized",
        library="onnx",
        tags=["nvfp4", "onnx"],
        recipe_yaml=recipe_yaml,
    )
