"""The CUDA forms of the grouped operators: decode the whole stack, then torch's grouped GEMM.

    scratch = P of all experts, exact in bfloat16        [E, N, K], freed when the call returns
    y       = grouped_mm(x, scratchᵀ, offsets) · decode of each row's expert

Nothing depends on values that lie on the device, so a CUDA graph can hold the call: which expert a row belongs to is
found there (`searchsorted`), and the grouped GEMM reads the offsets itself. The loop of grouped.py, which reads them on
the host, serves what torch's kernel does not take: other dtypes than bfloat16, and feature counts that are no multiple
of eight. It refuses to be captured, in words.

Two roundings to bfloat16 instead of one: the GEMM rounds its sum, and the product with `decode` is rounded again. The
scratch is 2 bytes for each weight of one stack, 805 MB for the gate and up projections of a layer of Qwen3-30B-A3B
(128 x 1536 x 2048).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qerl_compile.errors import GraphError
from qerl_compile.kernels import grouped, ops
from qerl_compile.kernels.cuda import aligned_rows
from qerl_compile.kernels.cuda_device import on_its_device

ALIGNED = 8
"""Rows of a bfloat16 matrix start at multiples of 16 bytes, or torch's grouped GEMM does not take it."""


@grouped.grouped_quantized_linear.register_kernel("cuda")
@on_its_device
def _linear(
    x_SK: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_decode_scale_ENG: Tensor, decode_scale_EP: Tensor
) -> Tensor:
    packed = codes_ENK2, block_decode_scale_ENG, decode_scale_EP
    grouped.check_grouped(grouped.FORWARD, "x", x_SK, offsets_E, *packed)
    if x_SK.numel() == 0:
        return x_SK.new_zeros(x_SK.shape[0], codes_ENK2.shape[1])
    return (two_step if _takes_grouped_gemm(x_SK, codes_ENK2) else grouped.loop)(x_SK, offsets_E, *packed)


@grouped.grouped_quantized_linear_dx.register_kernel("cuda")
@on_its_device
def _linear_dx(
    dy_SN: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_decode_scale_ENG: Tensor, decode_scale_EP: Tensor
) -> Tensor:
    packed = codes_ENK2, block_decode_scale_ENG, decode_scale_EP
    grouped.check_grouped(grouped.BACKWARD, "dy", dy_SN, offsets_E, *packed)
    if dy_SN.numel() == 0:
        return dy_SN.new_zeros(dy_SN.shape[0], codes_ENK2.shape[2] * 2)
    return (two_step_dx if _takes_grouped_gemm(dy_SN, codes_ENK2) else grouped.loop_dx)(dy_SN, offsets_E, *packed)


def two_step(x_SK: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_ENG: Tensor, decode_EP: Tensor) -> Tensor:
    """y [S, N] in bfloat16; arguments as of the operator. Runs on any device whose torch has the grouped GEMM."""
    products_ENK = _products(codes_ENK2, block_ENG)
    y_SN = F.grouped_mm(aligned_rows(x_SK), products_ENK.transpose(-2, -1), offs=offsets_E)
    return _decoded(y_SN, offsets_E, decode_EP)


def two_step_dx(dy_SN: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_ENG: Tensor, decode_EP: Tensor) -> Tensor:
    """dx [S, K] in bfloat16; arguments as of the operator."""
    products_ENK = _products(codes_ENK2, block_ENG)
    dx_SK = F.grouped_mm(aligned_rows(_decoded(dy_SN, offsets_E, decode_EP)), products_ENK, offs=offsets_E)
    # torch leaves rows that belong to no expert unwritten
    return dx_SK.masked_fill_((_rows(dy_SN) >= offsets_E[-1])[:, None], 0.0)


def _products(codes_ENK2: Tensor, block_ENG: Tensor) -> Tensor:
    """P of all experts, bfloat16 [E, N, K]."""
    experts, n, k2 = codes_ENK2.shape
    one = torch.ones(1, device=codes_ENK2.device)
    stacked_NK = ops.dequantize(codes_ENK2.flatten(0, 1), block_ENG.flatten(0, 1), one, torch.bfloat16)
    return stacked_NK.view(experts, n, k2 * 2)


def _decoded(y_SN: Tensor, offsets_E: Tensor, decode_EP: Tensor) -> Tensor:
    """y times the decode scale of each row's expert and each column's part; zero in rows that belong to none."""
    experts, parts = decode_EP.shape
    rows_S = _rows(y_SN)
    expert_S = torch.searchsorted(offsets_E, rows_S, right=True, out_int32=True).clamp_(max=experts - 1)
    y_SPN = y_SN.view(y_SN.shape[0], parts, -1)
    decoded_SN = (y_SPN * decode_EP[expert_S, :, None]).to(y_SN.dtype).flatten(1)
    return decoded_SN.masked_fill_((rows_S >= offsets_E[-1])[:, None], 0.0)


def _rows(y_SN: Tensor) -> Tensor:
    return torch.arange(y_SN.shape[0], dtype=torch.int32, device=y_SN.device)


def decodes_whole(n: int, dtype: torch.dtype) -> bool:
    """Whether a stack of matrices with n output features is decoded at once for activations of this dtype."""
    return dtype == torch.bfloat16 and n % ALIGNED == 0


def _takes_grouped_gemm(x: Tensor, codes_ENK2: Tensor) -> bool:
    """Whether torch's grouped GEMM multiplies with this stack; the loop, its substitute, must not be captured.

    Raises:
        GraphError: it does not, and a CUDA graph is being captured.
    """
    n = codes_ENK2.shape[1]
    if decodes_whole(n, x.dtype):
        return True
    if torch.cuda.is_current_stream_capturing():
        raise GraphError(
            where=grouped.FORWARD,
            expected=f"bfloat16 activations and output features that are a multiple of {ALIGNED} in a CUDA graph",
            got=f"{str(x.dtype).removeprefix('torch.')} and {n} features",
            do="Load the model in bfloat16, or leave its experts dense.",
        )
    return False
