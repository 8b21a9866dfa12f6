"""The `qerl::` dialect: the five operators that a rewritten graph is made of.

    quantized_linear(x, codes, block, decode)      y  = (x · Pᵀ) · decode
    quantized_linear_dx(dy, codes, block, decode)  dx = (dy · P) · decode
    quantize(w)                                    compressed-tensors' NVFP4 arithmetic (formats/nvfp4.py)
    dequantize(codes, block, decode, dtype)        w  = P · decode
    fake_quantized_linear(x, w)                    y  = x · dequantize(quantize(w))ᵀ, straight-through gradient to w

where P[n, k] = e2m1(code[n, k]) · e4m3(block[n, k // 16]).

Why custom operators and not plain functions: Dynamo, AOTAutograd and Inductor then see one opaque node with a known
shape, so a graph pass can place it, a golden file can show it, and the kernel under it is chosen by device when it
runs. All are functional (`mutates_args=()`): a mutating operator would bring auto_functionalized nodes into every
graph.

Why `decode` is multiplied after the sum: P has at most 6 significant bits, so it is exact in bf16, fp16, fp32 and
fp64. The one rounding that a dequantized bf16 weight suffers disappears, and every kernel at every M works on the
same weight values.

Gradients.
- quantized_linear and quantized_linear_dx are each other's derivative in the activation; the packed tensors get none.
  Only the packed tensors are saved for backward: no copy, no dequantized weight.
- quantize and dequantize are constants to autograd (their outputs never require grad).
- fake_quantized_linear is for the bare `torch.compile(backend="qerl")` where the user keeps an ordinary weight: dx
  comes from the quantized weight (the one the forward used), dw = dyᵀ · x as if the rounding were the identity
  (straight-through). It saves x and w, as F.linear does, and quantizes w again in backward instead of keeping the
  packed form.

Kernels. The body of each operator here is kernels/reference.py and serves every device that has nothing better. A
device's module puts its own in place with `op.register_kernel("cpu")` or `("cuda")`; such a kernel replaces the whole
body, so its first lines are the same `check_*` calls.

Shape legend: N output features, K input features, K2 = K/2 bytes, G = K/16 blocks.
"""

from typing import Any

import torch
from torch import Tensor

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import reference
from qerl_compile.kernels.checks import check_activation, check_dtype, check_packed, check_weight


@torch.library.custom_op("qerl::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """Linear layer whose weight stays packed: y = (x · Pᵀ) · decode_scale.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64; any strides; the batch may be empty.
        codes_NK2: uint8 [N, K/2], two E2M1 codes per byte, even column in the low nibble.
        block_decode_scale_NG: float8_e4m3fn [N, K/16].
        decode_scale: float32, 0-dim or [1], multiplies.

    Returns:
        [..., N], dtype of x, contiguous.

    Raises:
        FormatError: a dtype, shape or device does not fit the others.
    """
    check_packed("qerl::quantized_linear", codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation("qerl::quantized_linear", "x", x, codes_NK2, codes_NK2.shape[1] * 2)
    return reference.quantized_linear(x, codes_NK2, block_decode_scale_NG, decode_scale)


@torch.library.custom_op("qerl::quantized_linear_dx", mutates_args=())
def quantized_linear_dx(dy: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """Gradient of `quantized_linear` in its activation: dx = (dy · P) · decode_scale.

    Args:
        dy: [..., N], float16, bfloat16, float32 or float64; any strides; the batch may be empty.
        codes_NK2: uint8 [N, K/2], two E2M1 codes per byte, even column in the low nibble.
        block_decode_scale_NG: float8_e4m3fn [N, K/16].
        decode_scale: float32, 0-dim or [1], multiplies.

    Returns:
        [..., K], dtype of dy, contiguous.

    Raises:
        FormatError: a dtype, shape or device does not fit the others.
    """
    check_packed("qerl::quantized_linear_dx", codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation("qerl::quantized_linear_dx", "dy", dy, codes_NK2, codes_NK2.shape[0])
    return reference.quantized_linear_dx(dy, codes_NK2, block_decode_scale_NG, decode_scale)


@torch.library.custom_op("qerl::quantize", mutates_args=())
def quantize(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight to NVFP4 with compressed-tensors' arithmetic (formats/nvfp4.py states it).

    Args:
        w_NK: [N, K], float16, bfloat16 or float32, K a multiple of 16, finite.

    Returns:
        codes uint8 [N, K/2], block decode scales float8_e4m3fn [N, K/16], global scale float32 [1]. The global scale is
        the *divisor* of compressed-tensors; decode_scale = 1 / global_scale.

    Raises:
        FormatError: not a matrix, K not a multiple of 16, or NaN/Inf in the weight.
    """
    check_weight("qerl::quantize", w_NK)
    packed = nvfp4.quantize(w_NK)
    return packed.codes_NK2, packed.block_decode_scale_NG, packed.global_scale


@torch.library.custom_op("qerl::dequantize", mutates_args=())
def dequantize(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight matrix P · decode_scale, rounded once to `dtype`.

    Args:
        codes_NK2: uint8 [N, K/2], two E2M1 codes per byte, even column in the low nibble.
        block_decode_scale_NG: float8_e4m3fn [N, K/16].
        decode_scale: float32, 0-dim or [1], multiplies.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        [N, K] in `dtype`, contiguous.

    Raises:
        FormatError: a dtype or shape does not fit the others.
    """
    check_packed("qerl::dequantize", codes_NK2, block_decode_scale_NG, decode_scale)
    check_dtype("qerl::dequantize", dtype)
    return reference.dequantize(codes_NK2, block_decode_scale_NG, decode_scale, dtype)


@torch.library.custom_op("qerl::fake_quantized_linear", mutates_args=())
def fake_quantized_linear(x: Tensor, w_NK: Tensor) -> Tensor:
    """Linear layer with a weight that is quantized on the fly; gradients reach x and, straight-through, w.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64.
        w_NK: [N, K], float16, bfloat16 or float32, K a multiple of 16, finite.

    Returns:
        [..., N], dtype of x, contiguous.

    Raises:
        FormatError: as `quantize` and `quantized_linear`.
    """
    codes_NK2, block_decode_scale_NG, global_scale = quantize(w_NK)
    return quantized_linear(x, codes_NK2, block_decode_scale_NG, global_scale.reciprocal())


@quantized_linear.register_fake
def _(x: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    check_packed("qerl::quantized_linear", codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation("qerl::quantized_linear", "x", x, codes_NK2, codes_NK2.shape[1] * 2)
    return x.new_empty(*x.shape[:-1], codes_NK2.shape[0])


@quantized_linear_dx.register_fake
def _(dy: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    check_packed("qerl::quantized_linear_dx", codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation("qerl::quantized_linear_dx", "dy", dy, codes_NK2, codes_NK2.shape[0])
    return dy.new_empty(*dy.shape[:-1], codes_NK2.shape[1] * 2)


@quantize.register_fake
def _(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_weight("qerl::quantize", w_NK)
    n, k = w_NK.shape
    return (
        w_NK.new_empty(n, k // 2, dtype=torch.uint8),
        w_NK.new_empty(n, k // 16, dtype=torch.float8_e4m3fn),
        w_NK.new_empty(1, dtype=torch.float32),
    )


@dequantize.register_fake
def _(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_packed("qerl::dequantize", codes_NK2, block_decode_scale_NG, decode_scale)
    check_dtype("qerl::dequantize", dtype)
    return codes_NK2.new_empty(codes_NK2.shape[0], codes_NK2.shape[1] * 2, dtype=dtype)


@fake_quantized_linear.register_fake
def _(x: Tensor, w_NK: Tensor) -> Tensor:
    check_weight("qerl::fake_quantized_linear", w_NK)
    check_activation("qerl::fake_quantized_linear", "x", x, w_NK, w_NK.shape[1])
    return x.new_empty(*x.shape[:-1], w_NK.shape[0])


def _save_packed(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return quantized_linear_dx(dy, *ctx.saved_tensors), None, None, None


def _linear_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None, None]:
    return quantized_linear(ddx, *ctx.saved_tensors), None, None, None


def _quantize_is_constant(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _dequantize_is_constant(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _save_x_and_w(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, w_NK = inputs
    ctx.save_for_backward(*((x, w_NK) if w_NK.requires_grad else (w_NK,)))


def _fake_quantized_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    *x, w_NK = ctx.saved_tensors
    dx = dw_NK = None
    if ctx.needs_input_grad[0]:
        codes_NK2, block_decode_scale_NG, global_scale = quantize(w_NK.detach())
        dx = quantized_linear_dx(dy, codes_NK2, block_decode_scale_NG, global_scale.reciprocal())
    if ctx.needs_input_grad[1]:
        dw_NK = (dy.reshape(-1, dy.shape[-1]).T @ x[0].reshape(-1, x[0].shape[-1])).to(w_NK.dtype)
    return dx, dw_NK


quantized_linear.register_autograd(_linear_backward, setup_context=_save_packed)
quantized_linear_dx.register_autograd(_linear_dx_backward, setup_context=_save_packed)
quantize.register_autograd(lambda ctx, *grads: None, setup_context=_quantize_is_constant)
dequantize.register_autograd(lambda ctx, grad: (None, None, None, None), setup_context=_dequantize_is_constant)
fake_quantized_linear.register_autograd(_fake_quantized_backward, setup_context=_save_x_and_w)
