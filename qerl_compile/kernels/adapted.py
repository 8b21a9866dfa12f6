"""Linears with their adapter in one operator, for graphs that only generate.

    adapted_linear(x, codes, block, decode, A, B)   y = (x · Pᵀ) · decode + (x · Aᵀ) · Bᵀ [+ residual]
    adapted_dense_linear(x, w, bias, A, B)          y = x · Wᵀ + bias     + (x · Aᵀ) · Bᵀ

A and B are *stacked*: where q/k/v are one GEMM, A holds the rows of all three adapters (alpha / rank folded in) and B
is block-diagonal, so that the three products with A are one, and the three with B are one (passes/adapt.py).

Why operators and not the nodes `linear, linear, linear, add` that a training graph has. In the packed case the GEMM
adds h · Bᵀ in its epilogue, before the one rounding to bf16; no graph compiler can fuse that into an opaque kernel. In
the dense case Inductor calls `addmm` out of place, which first copies the [M, N] summand: here h · Bᵀ is added in place
to a result that nobody else has seen, one launch less.

Why no gradients: a backward would need the members' own factors and not the stacked copies, whose gradient nobody
reads. A call that would have to record one raises instead of detaching.

Shape legend: M rows (all leading dimensions of x), N output features, K input features, R rank of the stacked adapter.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qerl_compile.errors import FormatError, GraphError
from qerl_compile.kernels import cpu, ops
from qerl_compile.kernels.checks import check_activation, check_packed, describe


@torch.library.custom_op("qerl::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    codes_NK2: Tensor,
    block_decode_scale_NG: Tensor,
    decode_scale: Tensor,
    stacked_A_RK: Tensor,
    stacked_B_NR: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer with a packed weight and a low-rank branch: y = (x · Pᵀ) · decode_scale + (x · Aᵀ) · Bᵀ + residual.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; any strides; the batch may be empty.
        codes_NK2: uint8 [N, K/2], two E2M1 codes per byte, even column in the low nibble.
        block_decode_scale_NG: float8_e4m3fn [N, K/16].
        decode_scale: float32, 0-dim or [1], multiplies.
        stacked_A_RK: [R, K] in the dtype of x, alpha / rank included.
        stacked_B_NR: [N, R] in the dtype of x.
        residual: [..., N] in the dtype of x, added to y when y has that dtype, as a sum of its own would be; or None.

    Returns:
        [..., N], dtype of x, contiguous; never with a gradient.

    Raises:
        FormatError: a dtype, shape or device does not fit the others.
        GraphError: gradients are enabled and an argument requires one.
    """
    _check_adapted(x, codes_NK2, block_decode_scale_NG, decode_scale, stacked_A_RK, stacked_B_NR, residual)
    y = ops.quantized_linear(x, codes_NK2, block_decode_scale_NG, decode_scale)
    return _add_residual(_add_branch(x, y, stacked_A_RK, stacked_B_NR), residual)


@torch.library.custom_op("qerl::adapted_dense_linear", mutates_args=())
def adapted_dense_linear(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, stacked_A_RK: Tensor, stacked_B_NR: Tensor
) -> Tensor:
    """Linear layer with a dense weight and a low-rank branch: y = x · Wᵀ + bias + (x · Aᵀ) · Bᵀ.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; any strides; the batch may be empty.
        weight_NK: [N, K] in the dtype of x.
        bias_N: [N] in the dtype of x, or None.
        stacked_A_RK: [R, K] in the dtype of x, alpha / rank included.
        stacked_B_NR: [N, R] in the dtype of x.

    Returns:
        [..., N], dtype of x, contiguous; never with a gradient.

    Raises:
        FormatError: a dtype, shape or device does not fit the others.
        GraphError: gradients are enabled and an argument requires one.
    """
    _check_adapted_dense(x, weight_NK, bias_N, stacked_A_RK, stacked_B_NR)
    y_MN = F.linear(x.reshape(-1, x.shape[-1]), weight_NK, bias_N)
    return _add_branch(x, y_MN.view(*x.shape[:-1], y_MN.shape[1]), stacked_A_RK, stacked_B_NR)


@adapted_linear.register_fake
def _(
    x: Tensor,
    codes_NK2: Tensor,
    block_decode_scale_NG: Tensor,
    decode_scale: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    _check_adapted(x, codes_NK2, block_decode_scale_NG, decode_scale, a_RK, b_NR, residual)
    return x.new_empty(*x.shape[:-1], codes_NK2.shape[0])


@adapted_dense_linear.register_fake
def _(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_RK: Tensor, b_NR: Tensor) -> Tensor:
    _check_adapted_dense(x, weight_NK, bias_N, a_RK, b_NR)
    return x.new_empty(*x.shape[:-1], weight_NK.shape[0])


@adapted_linear.register_kernel("cpu")
def _adapted_linear_cpu(
    x: Tensor,
    codes_NK2: Tensor,
    block_decode_scale_NG: Tensor,
    decode_scale: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Without going through the inner operator, whose dispatch takes 22 µs of 150 at one row of SmolLM2's q/k/v."""
    _check_adapted(x, codes_NK2, block_decode_scale_NG, decode_scale, a_RK, b_NR, residual)
    y = cpu.linear(x, codes_NK2, block_decode_scale_NG, decode_scale)
    return _add_residual(_add_branch(x, y, a_RK, b_NR), residual)


@adapted_linear.register_kernel("cuda")
def _adapted_linear_cuda(
    x: Tensor,
    codes_NK2: Tensor,
    block_decode_scale_NG: Tensor,
    decode_scale: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    from qerl_compile.kernels import cuda

    _check_adapted(x, codes_NK2, block_decode_scale_NG, decode_scale, a_RK, b_NR, residual)
    in_place = codes_NK2.is_contiguous() and block_decode_scale_NG.is_contiguous()
    if x.dtype != torch.bfloat16 or x.numel() == 0 or not codes_NK2.numel() or not in_place:
        y = ops.quantized_linear(x, codes_NK2, block_decode_scale_NG, decode_scale)
        return _add_residual(_add_branch(x, y, a_RK, b_NR), residual)
    x_MK = x.reshape(-1, x.shape[-1])
    residual_MN = None if residual is None else residual.reshape(-1, codes_NK2.shape[0])
    y_MN = cuda.adapted_linear(x_MK, codes_NK2, block_decode_scale_NG, decode_scale, a_RK, b_NR, residual_MN)
    return y_MN.view(*x.shape[:-1], codes_NK2.shape[0])


def _add_branch(x: Tensor, y: Tensor, a_RK: Tensor, b_NR: Tensor) -> Tensor:
    """Add (x · Aᵀ) · Bᵀ to a contiguous y that nothing else holds, and return it."""
    h_MR = F.linear(x.reshape(-1, x.shape[-1]), a_RK)
    y.view(-1, y.shape[-1]).addmm_(h_MR, b_NR.T)
    return y


def _add_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y.add_(residual)


def _check_adapted(
    x: Tensor,
    codes_NK2: Tensor,
    block_decode_scale_NG: Tensor,
    decode_scale: Tensor,
    a_RK: Tensor,
    b_NR: Tensor,
    residual: Tensor | None,
) -> None:
    where = "qerl::adapted_linear"
    check_packed(where, codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation(where, "x", x, codes_NK2, codes_NK2.shape[1] * 2)
    n = codes_NK2.shape[0]
    check_stacked(where, x, n, a_RK, b_NR)
    if residual is None:
        return
    fits = residual.shape == (*x.shape[:-1], n) and residual.dtype == x.dtype and residual.device == x.device
    if not fits:
        raise FormatError(
            where=where,
            expected=f"residual {[*x.shape[:-1], n]} in the dtype of x, {x.dtype}, on {x.device}",
            got=f"{describe(residual)} on {residual.device}",
            do="Pass the tensor that this layer's result is added to, or None.",
        )


def _check_adapted_dense(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_RK: Tensor, b_NR: Tensor) -> None:
    where = "qerl::adapted_dense_linear"
    check_activation(where, "x", x, weight_NK, weight_NK.shape[-1])
    if weight_NK.dim() != 2 or weight_NK.dtype != x.dtype:
        raise FormatError(
            where=where,
            expected=f"weight_NK [N, {x.shape[-1]}] in the dtype of x, {x.dtype}",
            got=describe(weight_NK),
            do="Pass the dense weight of this layer.",
        )
    n = weight_NK.shape[0]
    if bias_N is not None and (bias_N.dim() != 1 or bias_N.shape[0] != n or bias_N.dtype != x.dtype):
        raise FormatError(
            where=where,
            expected=f"bias_N [{n}] in the dtype of x, {x.dtype}, or None",
            got=describe(bias_N),
            do="Pass the bias that belongs to this weight.",
        )
    check_stacked(where, x, n, a_RK, b_NR)


def check_stacked(where: str, x: Tensor, n: int, a_RK: Tensor, b_NR: Tensor) -> None:
    """Refuse adapter factors that do not lead from x [..., K] to y [..., n].

    Args:
        where: operator name for the message.
        x: the activation, checked already.
        n: output features of the layer.
        a_RK: must be [R, K] in the dtype and on the device of x.
        b_NR: must be [n, R] likewise.

    Raises:
        FormatError: naming the first factor that does not fit.
    """
    k = x.shape[-1]
    if a_RK.dim() != 2 or a_RK.shape[1] != k or a_RK.dtype != x.dtype or a_RK.device != x.device:
        raise FormatError(
            where=where,
            expected=f"stacked_A_RK [R, {k}] in the dtype of x, {x.dtype}, on {x.device}",
            got=f"{describe(a_RK)} on {a_RK.device}",
            do="Pass the stacked copies that refresh_stacked_adapters makes, not the float32 masters.",
        )
    if b_NR.shape != (n, a_RK.shape[0]) or b_NR.dtype != x.dtype or b_NR.device != x.device:
        raise FormatError(
            where=where,
            expected=f"stacked_B_NR [{n}, {a_RK.shape[0]}] in the dtype of x, {x.dtype}, on {x.device}",
            got=f"{describe(b_NR)} on {b_NR.device}",
            do="Pass the stacked B that belongs to this A and this layer.",
        )


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    raise GraphError(
        where="qerl::adapted_linear",
        expected="a call under torch.no_grad(), since this operator is for rollouts and has no backward",
        got="an argument that requires a gradient",
        do="Wrap the rollout in torch.no_grad(); training graphs use the branches of passes/lora.py.",
    )


def _no_backward(ctx: Any, *grads: Tensor) -> None:
    """Never reached: `_refuse_gradient` has raised in the forward."""


for _operator in (adapted_linear, adapted_dense_linear):
    _operator.register_autograd(_no_backward, setup_context=_refuse_gradient)
