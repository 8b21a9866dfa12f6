"""How a packed weight is written into a graph: its bytes as initializers, and the nodes that decode them.

    standard     w = DequantizeLinear(codes: FLOAT4E2M1 [N, K], scales, axis=1, block_size=16)          opset 23
                     scales = DequantizeLinear(block: FLOAT8E4M3FN [N, K/16], decode_scale: FLOAT [])

This is the pattern that TensorRT and ModelOpt use. Two nodes, because DequantizeLinear takes no FP8 scales. The codes
are those of the checkpoint, byte for byte: both formats put the first element into the low nibble.

    onnxruntime  w = Reshape(values [N, K/16, 16] * scales [N, K/16, 1])
                     values = Reshape(Gather(pairs: FLOAT [256, 2], Cast(codes: UINT8 [N, K/2])))

onnxruntime's CPU provider has no kernel for FLOAT4E2M1 DequantizeLinear (1.32), but it has one for FP8 (opset 21). A
byte selects a row of a table that all weights share: the two numbers its nibbles stand for.

By default onnxruntime computes constant nodes once, when it opens the file, so weights lie in memory in float32 and a
step costs what a dense one costs. With `disabled_optimizers=["ConstantFolding"]` they stay packed and are decoded in
each step (benchmarks/results/onnx_smollm2.md has both). `com.microsoft.GatherBlockQuantized` is a shorter way to write
this, in a file of the same size. It is never folded and decodes more slowly: SmolLM2 made 0.7 tokens per CPU second
with it, 1.6 with the packed table and 7.8 with the folded one.

Both decode in float32 to the numbers of formats/nvfp4.py: `dequantize(packed, torch.float32)`, but for one rounding:
the two scales are multiplied first here, and the code after.

Shape legend: N output features, K input features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qerl_compile.exporters.onnx.tensors import inline, lazily
from qerl_compile.formats import e2m1
from qerl_compile.formats.packed_nvfp4 import BLOCK, PackedNVFP4

if TYPE_CHECKING:
    import onnx_ir as ir

PAIRS = "e2m1_pairs"


@dataclass(frozen=True)
class Runtime:
    """What a file is written for.

    Attributes:
        opset: version of the ONNX operators.
        ir_version: version of the file format; 4-bit floats came with 11.
        decode: (graph, module path, packed weight) -> the nodes that decode it; the last one's output is the weight.
        shown: what the card says of the packed weights.
        usage: what the card says of opening the file.
    """

    opset: int
    ir_version: int
    decode: Callable[[Any, str, PackedNVFP4], "list[ir.Node]"]
    shown: str
    usage: str


def _standard(graph: Any, path: str, packed: PackedNVFP4) -> "list[ir.Node]":
    import onnx_ir as ir

    scales = _block_scales(graph, path, packed)
    codes = lazily(graph, f"{path}.weight_packed", lambda: packed.codes_NK2, ir.DataType.FLOAT4E2M1, packed.shape)
    weight = ir.node("DequantizeLinear", [codes, scales.outputs[0]], {"axis": 1, "block_size": BLOCK})
    return [scales, weight]


def _onnxruntime(graph: Any, path: str, packed: PackedNVFP4) -> "list[ir.Node]":
    import onnx_ir as ir

    rows, columns = packed.shape
    if PAIRS not in graph.initializers:
        every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
        inline(graph, PAIRS, e2m1.decode(every_byte, torch.float32))
    codes = lazily(graph, f"{path}.weight_packed", lambda: packed.codes_NK2, ir.DataType.UINT8, packed.codes_NK2.shape)
    last_axis = inline(graph, "last_axis", torch.tensor([-1]))
    in_blocks = inline(graph, f"in_blocks_{rows}_{columns}", torch.tensor([rows, columns // BLOCK, BLOCK]))
    whole = inline(graph, f"whole_{rows}_{columns}", torch.tensor([rows, columns]))
    index = ir.node("Cast", [codes], {"to": ir.DataType.INT32})
    values = ir.node("Gather", [graph.initializers[PAIRS], index.outputs[0]], {"axis": 0})
    blocks = ir.node("Reshape", [values.outputs[0], in_blocks])
    scales = _block_scales(graph, path, packed)
    per_block = ir.node("Unsqueeze", [scales.outputs[0], last_axis])
    product = ir.node("Mul", [blocks.outputs[0], per_block.outputs[0]])
    weight = ir.node("Reshape", [product.outputs[0], whole])
    return [index, values, blocks, scales, per_block, product, weight]


def _block_scales(graph: Any, path: str, packed: PackedNVFP4) -> "ir.Node":
    """The E4M3 block scales times the matrix scale: float32 [N, K/16]."""
    import onnx_ir as ir

    block_NG = packed.block_decode_scale_NG
    block = lazily(graph, f"{path}.weight_scale", lambda: block_NG, ir.DataType.FLOAT8E4M3FN, block_NG.shape)
    decode_scale = inline(graph, f"{path}.decode_scale", packed.decode_scale.reshape(()))
    return ir.node("DequantizeLinear", [block, decode_scale])


RUNTIMES = {
    "standard": Runtime(
        opset=23,
        ir_version=11,
        decode=_standard,
        shown="FLOAT4E2M1 with E4M3 block scales, two DequantizeLinear each (opset 23)",
        usage="python -c \"import onnx; onnx.checker.check_model('THIS_DIRECTORY/model.onnx')\"",
    ),
    "onnxruntime": Runtime(
        opset=21,
        ir_version=10,
        decode=_onnxruntime,
        shown="bytes with E4M3 block scales, decoded by a table (opset 21)",
        usage='python -c "import onnxruntime as o; '
        "print([i.name for i in o.InferenceSession('THIS_DIRECTORY/model.onnx').get_inputs()])\"",
    ),
}
