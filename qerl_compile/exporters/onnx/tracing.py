"""From the twin (twin.py) to an ONNX graph whose weights are still inputs, under their checkpoint names.

torch.export captures, torch.onnx translates, onnxscript's optimizer folds constants. While it folds, weights are graph
*inputs*: an initializer that is small enough would be folded into what reads it, and one that is fake cannot be read.
`weights.py` gives them their values afterwards.

Names are those that other exporters use (optimum, onnxruntime-genai), so that programs written for their files find
`input_ids`, `attention_mask`, `past_key_values.0.key`, … and `logits`, `present.0.key`, …

Shapes of intermediate values are dropped, and so is torch's metadata: the first are inferred by whoever reads the
file, the second holds stack traces with paths of this machine.
"""

from typing import TYPE_CHECKING, Any

import torch

from qerl_compile.exporters.onnx.twin import PREFIX, Twin

if TYPE_CHECKING:
    import onnx_ir as ir

_AXES = {
    "input_ids": {0: "batch", 1: "sequence"},
    "attention_mask": {0: "batch", 1: "total_sequence"},
    "past_key_values": {0: "batch", 2: "past_sequence"},
    "logits": {0: "batch", 1: "sequence"},
    "present": {0: "batch", 2: "total_sequence"},
}


def trace(twin: Twin, opset: int) -> tuple["ir.Model", dict[str, "ir.Value"]]:
    """Translate the twin.

    Args:
        twin: what to translate.
        opset: version of the ONNX operators.

    Returns:
        The model, and its weights by checkpoint name: float32 values that are graph inputs for now.
    """
    import onnx_ir as ir
    import onnxscript.optimizer

    program = _capture(twin)
    model: Any = _translate(program, opset, layers=len(twin.example[2]))
    tensors = (twin.module.named_parameters, twin.module.named_buffers)  # every name: one tensor may have several
    held = {name for named in tensors for name, _ in named(remove_duplicate=False)}
    constants: Any = program.constants
    weights: dict[str, Any] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in constants and name not in held:
            # A number that forward() makes. The program has it; torch's decompositions, under fake weights, lose it.
            value.const_value = ir.tensor(constants[name].numpy(), name=name)
        elif name in held:
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
            weights[name.removeprefix(PREFIX)] = value
    onnxscript.optimizer.optimize(model)
    _forget(model)
    _name_axes(model.graph)
    return model, weights


def _capture(twin: Twin) -> torch.export.ExportedProgram:
    any_size = torch.export.Dim.DYNAMIC
    rows = {0: any_size, 1: any_size}
    pairs = [({0: any_size, 2: any_size},) * 2] * len(twin.example[2])
    with torch.no_grad():
        return torch.export.export(twin.module, twin.example, dynamic_shapes=(rows, rows, pairs), strict=False)


def _translate(program: torch.export.ExportedProgram, opset: int, *, layers: int) -> Any:
    pairs = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    translated: Any = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        optimize=False,
        verbose=False,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{pair}" for pair in pairs)],
        output_names=["logits", *(f"present.{pair}" for pair in pairs)],
    )
    return translated.model


def _forget(model: Any) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _name_axes(graph: Any) -> None:
    """Give the free axes of inputs and outputs names that a reader understands; torch's are s26, s54 + s70, …"""
    import onnx_ir as ir

    for value in (*graph.inputs, *graph.outputs):
        axes = _AXES.get(value.name.partition(".")[0])
        if axes is not None and value.shape is not None:
            sizes = [axes.get(axis, size) for axis, size in enumerate(value.shape)]
            value.shape = ir.Shape(sizes)
