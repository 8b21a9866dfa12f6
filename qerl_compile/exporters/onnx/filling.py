"""Give the weights of a traced graph (tracing.py) their numbers: initializers, and nodes where those are not float32.

    packed       codes, scales → decoding nodes (packed_nodes.py) → what read the weight
    16-bit       initializer → Cast → what read the weight; Gather → Cast where it is only looked up
    the rest     initializer → what read the weight

Nodes go right before the first that reads their result, so that a runtime that follows the file's order never holds
more than one decoded weight.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qerl_compile.exporters.onnx.packed_nodes import Runtime
from qerl_compile.exporters.onnx.tensors import lazily
from qerl_compile.exporters.onnx.weights import Numbers, dense_number

if TYPE_CHECKING:
    import onnx_ir as ir


def fill(ir_model: Any, weights: Mapping[str, "ir.Value"], model: nn.Module, numbers: Numbers, to: Runtime) -> None:
    """Turn the graph inputs that are weights into initializers.

    Args:
        ir_model: as `trace` returned it; changed in place.
        weights: the graph inputs that are weights, by checkpoint name.
        model: the transformed model.
        numbers: what `read_numbers(model)` found.
        to: how packed weights are written.
    """
    graph = ir_model.graph
    place = {node: index for index, node in enumerate(graph)}
    for name, value in weights.items():
        graph.inputs.remove(value)
        users = sorted({usage.node for usage in value.uses()}, key=place.__getitem__)
        if not users:
            continue
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in numbers.packed:
            _insert(graph, to.decode(graph, path, numbers.packed[path]), name, before=users[0], instead_of=value)
        else:
            _fill_dense(graph, name, value, users, model, numbers)


def _fill_dense(graph: Any, name: str, value: Any, users: Sequence[Any], model: nn.Module, numbers: Numbers) -> None:
    import onnx_ir as ir

    read, dtype = dense_number(model, numbers, name)
    data_type = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}[dtype]
    value.name = f"{name}.float32"  # frees the name for the initializer
    stored = lazily(graph, name, read, ir.DataType[data_type], value.shape.numpy())
    if dtype == torch.float32:
        _redirect(value, stored)
        return
    rest = [node for node in users if not _looks_up(node, value)]
    for node in users:
        if node not in rest:
            _look_up_then_cast(graph, node, stored)
    if rest:
        _insert(graph, [ir.node("Cast", [stored], {"to": ir.DataType.FLOAT})], name, before=rest[0], instead_of=value)


def _looks_up(node: Any, table: Any) -> bool:
    """Whether a node reads rows of a table and nothing else of it."""
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and node.inputs[0] is table and (axis is None or axis.as_int() == 0)


def _look_up_then_cast(graph: Any, gather: Any, table: Any) -> None:
    import onnx_ir as ir

    rows = gather.outputs[0]
    gather.replace_input_with(0, table)
    cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT})
    cast.outputs[0].name = f"{rows.name}.float32"
    cast.outputs[0].type = rows.type
    rows.type = ir.TensorType(table.dtype)
    _redirect(rows, cast.outputs[0], but=cast)
    graph.insert_after(gather, cast)


def _insert(graph: Any, nodes: Sequence[Any], name: str, *, before: Any, instead_of: Any) -> None:
    """Insert nodes whose last output takes over all users of a value."""
    *inner, last = [node.outputs[0] for node in nodes]
    for number, value in enumerate(inner):
        value.name = f"{name}.step{number}"
    last.name = f"{name}.decoded"
    _redirect(instead_of, last)
    graph.insert_before(before, nodes)


def _redirect(old: Any, new: Any, *, but: Any = None) -> None:
    for node, index in tuple(old.uses()):
        if node is not but:
            node.replace_input_with(index, new)
