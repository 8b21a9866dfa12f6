"""What an operator of ours allocates and frees again within one call, which no graph shows.

    grouped_quantized_linear      whole stack [E, N, K] in bfloat16 + 3 of y [S, N]
    grouped_quantized_linear_dx   whole stack [E, N, K] in bfloat16 + max(3 of dy [S, N] - dx [S, K], 1 of dy)

That is kernels/grouped_cuda.py, the form for a GPU and bfloat16: the decoded stack, the GEMM's result, and that times
the decode scales in float32, which counts for two, beside the operator's own result. Measured at six numbers of tokens
(benchmarks/results/moe_layer_h100.json): within 0.1 %. In a decode step the stack is all that counts.

Where the operator loops over experts (other dtypes, odd sizes), it decodes into the scratch of ordinary linears, one
expert's matrix at a time; resident.py counts that. That scratch stays, and no call is charged for it.

Shapes: E experts, N output features, K input features, S rows, each a token with one of its experts.
"""

from typing import Any

import torch
from torch import Tensor, fx

from qerl_compile.kernels.grouped import BACKWARD, FORWARD
from qerl_compile.kernels.grouped_cuda import decodes_whole


def scratch_of(node: fx.Node) -> tuple[Tensor, ...]:
    """Return what lives only while a node runs, as tensors without storage; sizes may be symbols.

    Args:
        node: of a graph whose nodes are typed by `meta["val"]`.
    """
    target: Any = node.target
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    if name not in (FORWARD, BACKWARD):
        return ()
    operands: Any = node.args
    given, codes_ENK2 = operands[0].meta["val"], operands[2].meta["val"]
    experts, n, k2 = codes_ENK2.shape
    if not decodes_whole(n, given.dtype):
        return ()
    beside = 3 * n if name == FORWARD else max(3 * n - 2 * k2, n)
    return given.new_empty(experts, n, 2 * k2), given.new_empty(given.shape[0], beside)
