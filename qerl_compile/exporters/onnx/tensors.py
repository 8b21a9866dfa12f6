"""Torch tensors as ONNX initializers, without copies of the weights.

An initializer of a weight is lazy: its bytes are fetched, from whatever device, when the file is written, one tensor at
a time. numpy has no bfloat16, float8 or 4-bit numbers, so bytes are handed over with the type said beside them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir


def lazily(
    graph: Any, name: str, read: Callable[[], Tensor], data_type: "ir.DataType", shape: Sequence[int]
) -> "ir.Value":
    """Register an initializer whose bytes are read when the file is written.

    Args:
        graph: an `onnx_ir.Graph`.
        name: of the initializer.
        read: returns the tensor, on any device; its bytes are those of the initializer.
        data_type: what the bytes mean; two elements a byte for 4-bit types.
        shape: in elements of `data_type`.
    """
    import onnx_ir as ir

    def bytes_of() -> Any:
        array = read().detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if data_type.bitwidth < 8:
            return ir.PackedTensor(array, data_type, shape=shape, name=name)
        return ir.Tensor(array.view(data_type.numpy()).reshape(shape), dtype=data_type, name=name)

    return _register(graph, ir.LazyTensor(bytes_of, dtype=data_type, shape=ir.Shape(shape), name=name))


def inline(graph: Any, name: str, tensor: Tensor) -> "ir.Value":
    """Register a small initializer at once, or return the one that has this name already."""
    import onnx_ir as ir

    if name in graph.initializers:
        return graph.initializers[name]
    return _register(graph, ir.tensor(tensor.detach().cpu().numpy(), name=name))


def _register(graph: Any, tensor: Any) -> "ir.Value":
    import onnx_ir as ir

    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
