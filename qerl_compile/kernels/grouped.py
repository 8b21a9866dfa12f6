"""Products with many packed matrices at once, each row with the matrix of its expert.

    grouped_quantized_linear(x, offsets, codes, block, decode)       y[s]  = (x[s] · P[e]ᵀ) · decode[e]
    grouped_quantized_linear_dx(dy, offsets, codes, block, decode)   dx[s] = (dy[s] · decode[e]) · P[e]

A mixture of experts sorts its (token, expert) pairs by expert, so the rows of expert e are the slice
`offsets[e - 1] : offsets[e]`. P[e] is the matrix of exact products of e's codes and block scales, as in ops.py.

An expert's matrix may be several that were laid into one: gate and up projections, whose rows halve it. Files keep them
apart and may give them unequal scales, so `decode` is [E, P], one number for each of P equal parts of the rows. Where a
model's own quantizer made them they are equal, and P is 1.

What is fast and what is not. This is a reference: right everywhere, fast nowhere.
- Without a GPU, and on one in other dtypes than bfloat16: one `qerl::quantized_linear` per expert that has rows and per
  part, in a loop, after the offsets were read from the device. Experts without rows cost nothing.
- In bfloat16 on CUDA (grouped_cuda.py): the whole stack is decoded into a bfloat16 scratch that lives as long as the
  call, and torch's grouped GEMM multiplies with it. Nothing is read from the device, so CUDA graphs can hold it, and
  its cost is that of decoding all experts whether they have rows or not: fair for the many tokens of a training step,
  far from the memory bound for the few of a decode step. A kernel that decodes as it multiplies would be the fast form.

Gradients reach the activation alone; only the packed tensors are saved for backward.

Shape legend: S rows (token-expert pairs), E experts, N output features, K input features, P parts of N.
"""

from typing import Any

import torch
from torch import Tensor

from qerl_compile.errors import FormatError
from qerl_compile.kernels.checks import check_activation, check_packed, describe
from qerl_compile.kernels.ops import quantized_linear as linear
from qerl_compile.kernels.ops import quantized_linear_dx as linear_dx

FORWARD, BACKWARD = "qerl::grouped_quantized_linear", "qerl::grouped_quantized_linear_dx"


@torch.library.custom_op(FORWARD, mutates_args=())
def grouped_quantized_linear(
    x_SK: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_decode_scale_ENG: Tensor, decode_scale_EP: Tensor
) -> Tensor:
    """Multiply each row with the packed matrix of its expert.

    Args:
        x_SK: float16, bfloat16, float32 or float64 [S, K], sorted by expert.
        offsets_E: int32 [E], where the rows of each expert end; rows from the last on belong to none and give zeros.
        codes_ENK2: uint8 [E, N, K/2], two E2M1 codes per byte, even column in the low nibble.
        block_decode_scale_ENG: float8_e4m3fn [E, N, K/16].
        decode_scale_EP: float32 [E, P], multiplies; N a multiple of P.

    Returns:
        [S, N], dtype of x, contiguous.

    Raises:
        FormatError: a dtype, shape or device does not fit the others.
    """
    check_grouped(FORWARD, "x", x_SK, offsets_E, codes_ENK2, block_decode_scale_ENG, decode_scale_EP)
    return loop(x_SK, offsets_E, codes_ENK2, block_decode_scale_ENG, decode_scale_EP)


@torch.library.custom_op(BACKWARD, mutates_args=())
def grouped_quantized_linear_dx(
    dy_SN: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_decode_scale_ENG: Tensor, decode_scale_EP: Tensor
) -> Tensor:
    """Gradient of `grouped_quantized_linear` in its activation.

    Args:
        dy_SN: float16, bfloat16, float32 or float64 [S, N].
        offsets_E: as there, like all that follow.
        codes_ENK2: uint8 [E, N, K/2].
        block_decode_scale_ENG: float8_e4m3fn [E, N, K/16].
        decode_scale_EP: float32 [E, P], multiplies.

    Returns:
        [S, K], dtype of dy, contiguous.

    Raises:
        FormatError: a dtype, shape or device does not fit the others.
    """
    check_grouped(BACKWARD, "dy", dy_SN, offsets_E, codes_ENK2, block_decode_scale_ENG, decode_scale_EP)
    return loop_dx(dy_SN, offsets_E, codes_ENK2, block_decode_scale_ENG, decode_scale_EP)


def loop(x_SK: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_ENG: Tensor, decode_EP: Tensor) -> Tensor:
    """y [S, N], one `qerl::quantized_linear` per expert that has rows and per part; reads the offsets."""
    y_SN = x_SK.new_zeros(x_SK.shape[0], codes_ENK2.shape[1])
    for expert, rows in _used(offsets_E):
        for part, decode in _parts(decode_EP[expert], codes_ENK2.shape[1]):
            y_SN[rows, part] = linear(x_SK[rows], codes_ENK2[expert, part], block_ENG[expert, part], decode)
    return y_SN


def loop_dx(dy_SN: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_ENG: Tensor, decode_EP: Tensor) -> Tensor:
    """dx [S, K], likewise; the parts of an expert add up."""
    dx_SK = dy_SN.new_zeros(dy_SN.shape[0], codes_ENK2.shape[2] * 2)
    for expert, rows in _used(offsets_E):
        for part, decode in _parts(decode_EP[expert], codes_ENK2.shape[1]):
            dx_SK[rows] += linear_dx(dy_SN[rows, part], codes_ENK2[expert, part], block_ENG[expert, part], decode)
    return dx_SK


def _used(offsets_E: Tensor) -> list[tuple[int, slice]]:
    """Return (expert, its rows) of every expert that has rows."""
    ends = offsets_E.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]


def _parts(decode_scale_P: Tensor, rows: int) -> list[tuple[slice, Tensor]]:
    """Return (rows of an expert's matrix, their decode scale) of every part."""
    step = rows // decode_scale_P.shape[0]
    return [(slice(p * step, (p + 1) * step), decode) for p, decode in enumerate(decode_scale_P.unbind())]


def check_grouped(
    where: str, name: str, x: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_ENG: Tensor, decode_EP: Tensor
) -> None:
    """Refuse operands that do not describe E packed matrices and the rows of their experts.

    Raises:
        FormatError: naming the first tensor that does not fit.
    """
    if codes_ENK2.dim() != 3 or block_ENG.dim() != 3 or codes_ENK2.shape[0] != block_ENG.shape[0]:
        raise FormatError(
            where=where,
            expected="codes uint8 [E, N, K/2] and block scales float8_e4m3fn [E, N, K/16]",
            got=f"{describe(codes_ENK2)} and {describe(block_ENG)}",
            do="Pass the stacks that passes/experts.py attaches.",
        )
    experts, rows = codes_ENK2.shape[:2]
    fits = decode_EP.dim() == 2 and decode_EP.shape[0] == experts and decode_EP.shape[1] > 0
    if decode_EP.dtype != torch.float32 or not fits or rows % decode_EP.shape[1]:
        raise FormatError(
            where=where,
            expected=f"decode_scale float32 [{experts}, P] with P a divisor of {rows}",
            got=describe(decode_EP),
            do="Pass one multiplier for each expert and part.",
        )
    if offsets_E.dtype != torch.int32 or tuple(offsets_E.shape) != (experts,) or offsets_E.device != codes_ENK2.device:
        raise FormatError(
            where=where,
            expected=f"offsets int32 [{experts}] on {codes_ENK2.device}",
            got=f"{describe(offsets_E)} on {offsets_E.device}",
            do="Pass the ends of the experts' rows: cumsum of the rows per expert.",
        )
    check_packed(where, codes_ENK2[0], block_ENG[0], decode_EP[0, :1])
    check_activation(where, name, x, codes_ENK2, rows if name == "dy" else codes_ENK2.shape[2] * 2)
    if x.dim() != 2:
        raise FormatError(where=where, expected=f"{name} [S, features]", got=describe(x), do="Flatten it to rows.")


@grouped_quantized_linear.register_fake
def _(
    x_SK: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_decode_scale_ENG: Tensor, decode_scale_EP: Tensor
) -> Tensor:
    check_grouped(FORWARD, "x", x_SK, offsets_E, codes_ENK2, block_decode_scale_ENG, decode_scale_EP)
    return x_SK.new_empty(x_SK.shape[0], codes_ENK2.shape[1])


@grouped_quantized_linear_dx.register_fake
def _(
    dy_SN: Tensor, offsets_E: Tensor, codes_ENK2: Tensor, block_decode_scale_ENG: Tensor, decode_scale_EP: Tensor
) -> Tensor:
    check_grouped(BACKWARD, "dy", dy_SN, offsets_E, codes_ENK2, block_decode_scale_ENG, decode_scale_EP)
    return dy_SN.new_empty(dy_SN.shape[0], codes_ENK2.shape[2] * 2)


def _save_packed(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dy_SN: Tensor) -> tuple[Tensor, None, None, None, None]:
    return grouped_quantized_linear_dx(dy_SN, *ctx.saved_tensors), None, None, None, None


def _dx_backward(ctx: Any, ddx_SK: Tensor) -> tuple[Tensor, None, None, None, None]:
    return grouped_quantized_linear(ddx_SK, *ctx.saved_tensors), None, None, None, None


grouped_quantized_linear.register_autograd(_backward, setup_context=_save_packed)
grouped_quantized_linear_dx.register_autograd(_dx_backward, setup_context=_save_packed)
