"""The CUDA forms of the `qerl::` operators, and the launcher they share.

Importing this module registers them and costs nothing: Triton and the kernels are imported when an operator first runs
on a GPU. Bfloat16 activations go to the kernels that dispatch.py names; other dtypes are served by the reference
(dequantize in float32), which is right and slow. Every choice depends on shapes alone.

`linear` and `adapted_linear` below are one level under the operators: with a LoRA branch (h · Bᵀ added in fp32 in the
epilogue where the kernel can, else by one `addmm`), as rollouts have it, and with weights in the twiddled layout.
"""

from typing import Any

import torch
from torch import Tensor

from qerl_compile.kernels import dispatch, ops, reference
from qerl_compile.kernels.checks import check_activation, check_dtype, check_packed, check_weight
from qerl_compile.kernels.cuda_device import capability_and_multiprocessors, on_its_device

RANKS = (16, 32, 64, 128)  # of LoRA branches that kernels add in their epilogue


@on_its_device
def linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    h_MR: Tensor | None = None,
    lora_B_NR: Tensor | None = None,
    *,
    twiddled: bool = False,
    choice: dict[str, Any] | None = None,
) -> Tensor:
    """y = (x · Pᵀ) · decode_scale [+ h · Bᵀ] by the kernel that fits the shape.

    Args:
        x_MK: bfloat16 [M, K] on CUDA, M >= 1.
        codes_NK2: uint8 [N, K/2]; neither these nor the scales may be written by the kernel directly before this call
            (nvfp4_hopper.py, dependent launch).
        block_NG: float8_e4m3fn [N, K/16].
        decode_scale: float32, one element.
        h_MR: bfloat16 [M, R], x · Aᵀ · alpha / rank of a LoRA branch.
        lora_B_NR: bfloat16 [N, R].
        twiddled: codes are in the layout of nvfp4_twiddle.py.
        choice: overrides dispatch.py; for tuning and tests.

    Returns:
        bfloat16 [M, N].
    """
    from qerl_compile.kernels import nvfp4_decode, nvfp4_two_step
    from qerl_compile.kernels.nvfp4_arithmetic import STANDARD, TWIDDLED

    x_MK = aligned_rows(x_MK)
    n, k, m = codes_NK2.shape[0], codes_NK2.shape[1] * 2, x_MK.shape[0]
    capability, multiprocessors = capability_and_multiprocessors(x_MK.device.index)
    if choice is None:
        choice = dispatch.choose("forward", n, k, m, capability, multiprocessors)
    # added in the epilogue where the kernel can, else after it
    h, lora = _for_epilogue(h_MR, lora_B_NR)
    if choice["kernel"] in ("hopper", "stream"):
        y_MN = None
        if not twiddled:
            y_MN = _gluon_linear(x_MK, codes_NK2, block_NG, decode_scale, h, lora, None, choice, multiprocessors)
        if y_MN is not None:
            return y_MN if h is h_MR else _add_lora(y_MN, h_MR, lora_B_NR)
        choice = dispatch.portable(n, k, m, multiprocessors)
    layout = TWIDDLED if twiddled else STANDARD
    if choice["kernel"] == "decode":
        y_MN = nvfp4_decode.linear(
            x_MK, codes_NK2, block_NG, decode_scale, choice, layout=layout, h_MR=h, lora_B_NR=lora
        )
        return y_MN if h is h_MR else _add_lora(y_MN, h_MR, lora_B_NR)
    y_MN = nvfp4_two_step.linear(x_MK, codes_NK2, block_NG, decode_scale, layout=layout)
    return _add_lora(y_MN, h_MR, lora_B_NR)


@on_its_device
def adapted_linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    lora_A_RK: Tensor,
    lora_B_NR: Tensor,
    residual_MN: Tensor | None = None,
    *,
    choice: dict[str, Any] | None = None,
) -> Tensor:
    """y = (x · Pᵀ) · decode_scale + (x · Aᵀ) · Bᵀ [+ residual]; with few tokens in two launches (lead_in.py).

    Args:
        x_MK: bfloat16 [M, K] on CUDA, M >= 1.
        codes_NK2: as `linear` has it.
        block_NG: likewise.
        decode_scale: float32, one element.
        lora_A_RK: bfloat16 [R, K], alpha / rank included; like codes not written by the kernel directly before.
        lora_B_NR: bfloat16 [N, R].
        residual_MN: bfloat16 [M, N], added to the rounded y.
        choice: overrides dispatch.py; for tuning and tests.

    Returns:
        bfloat16 [M, N].
    """
    from qerl_compile.kernels.lora_down import lora_down

    x_MK = aligned_rows(x_MK)
    (n, k2), m = codes_NK2.shape, x_MK.shape[0]
    capability, multiprocessors = capability_and_multiprocessors(x_MK.device.index)
    wanted = choice or dispatch.choose("adapted", n, k2 * 2, m, capability, multiprocessors)
    y_MN = None
    if _one_lead_in(x_MK, lora_A_RK, lora_B_NR, wanted):
        within = residual_MN if residual_MN is not None and residual_MN.stride(1) == 1 else None
        y_MN = _gluon_linear(
            x_MK, codes_NK2, block_NG, decode_scale, None, lora_B_NR, lora_A_RK, wanted, multiprocessors, within
        )
        if y_MN is not None and within is not None:
            return y_MN
    if y_MN is None:
        y_MN = linear(x_MK, codes_NK2, block_NG, decode_scale, lora_down(x_MK, lora_A_RK), lora_B_NR, choice=choice)
    return y_MN if residual_MN is None else y_MN.add_(residual_MN)


def _one_lead_in(x_MK: Tensor, a_RK: Tensor, b_NR: Tensor, choice: dict[str, Any]) -> bool:
    """Whether h and x in order can come from one launch, and the GEMM can add h · Bᵀ."""
    from qerl_compile.kernels import lead_in, nvfp4_hopper, nvfp4_stream_launch
    from qerl_compile.kernels.nvfp4_arithmetic import GLUON

    known = choice["kernel"] in ("hopper", "stream") and a_RK.shape[0] in RANKS and b_NR.stride(1) == 1
    if not (GLUON and known and lead_in.supports(x_MK, a_RK)):
        return False
    if choice["kernel"] == "stream":
        return nvfp4_stream_launch.reads_in_order(choice, x_MK.shape[1])
    return nvfp4_hopper.room_for_lora(choice)


def _gluon_linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    h_MR: Tensor | None,
    lora_B_NR: Tensor | None,
    lora_A_RK: Tensor | None,
    choice: dict[str, Any],
    multiprocessors: int,
    residual_MN: Tensor | None = None,
) -> Tensor | None:
    """`linear` by the kernels whose registers we lay out ourselves; None where they cannot take the weight."""
    from qerl_compile.kernels.nvfp4_arithmetic import GLUON

    if not GLUON:
        return None
    from qerl_compile.kernels import nvfp4_hopper, nvfp4_stream_launch

    if not nvfp4_stream_launch.supports(codes_NK2, block_NG):  # both ask the same of a weight
        return None
    if choice["kernel"] == "stream":
        return nvfp4_stream_launch.linear(
            x_MK, codes_NK2, block_NG, decode_scale, choice, h_MR=h_MR, lora_B_NR=lora_B_NR, lora_A_RK=lora_A_RK,
            residual_MN=residual_MN,
        )  # fmt: skip
    in_kernel = nvfp4_hopper.room_for_lora(choice)
    h, lora = (h_MR, lora_B_NR) if in_kernel else (None, None)
    y_MN = nvfp4_hopper.linear(
        x_MK, codes_NK2, block_NG, decode_scale, choice, multiprocessors, h, lora, lora_A_RK, residual_MN
    )
    return y_MN if in_kernel else _add_lora(y_MN, h_MR, lora_B_NR)


@on_its_device
def linear_dx(
    dy_MN: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    *,
    twiddled: bool = False,
    choice: dict[str, Any] | None = None,
) -> Tensor:
    """dx = (dy · P) · decode_scale by the kernel that fits the shape.

    Args:
        dy_MN: bfloat16 [M, N] on CUDA, M >= 1.
        codes_NK2: uint8 [N, K/2].
        block_NG: float8_e4m3fn [N, K/16].
        decode_scale: float32, one element.
        twiddled: codes are in the layout of nvfp4_twiddle.py.
        choice: overrides dispatch.py; for tuning and tests.

    Returns:
        bfloat16 [M, K].
    """
    from qerl_compile.kernels import nvfp4_dx, nvfp4_two_step
    from qerl_compile.kernels.nvfp4_arithmetic import GLUON, STANDARD, TWIDDLED

    dy_MN = aligned_rows(dy_MN)
    layout = TWIDDLED if twiddled else STANDARD
    n, k, m = codes_NK2.shape[0], codes_NK2.shape[1] * 2, dy_MN.shape[0]
    capability, multiprocessors = capability_and_multiprocessors(dy_MN.device.index)
    if choice is None:
        choice = dispatch.choose("dx", n, k, m, capability, multiprocessors)
    if choice["kernel"] == "hopper_dx":
        if GLUON and not twiddled:
            from qerl_compile.kernels import nvfp4_hopper_dx

            if nvfp4_hopper_dx.supports(codes_NK2, block_NG):
                return nvfp4_hopper_dx.linear_dx(dy_MN, codes_NK2, block_NG, decode_scale, choice, multiprocessors)
        choice = dispatch.portable_dx(n, k, m, multiprocessors)
    if choice["kernel"] == "dx":
        return nvfp4_dx.linear_dx(dy_MN, codes_NK2, block_NG, decode_scale, choice, layout=layout)
    return nvfp4_two_step.linear_dx(dy_MN, codes_NK2, block_NG, decode_scale, layout=layout)


def _for_epilogue(h_MR: Tensor | None, lora_B_NR: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The branch as kernels read it: bfloat16, a rank that they know, contiguous rows. Or nothing."""
    if h_MR is None or lora_B_NR is None:
        return None, None
    bf16 = h_MR.dtype is torch.bfloat16 and lora_B_NR.dtype is torch.bfloat16
    fits = bf16 and h_MR.shape[1] in RANKS and h_MR.stride(1) == 1 and lora_B_NR.stride(1) == 1
    return (h_MR, lora_B_NR) if fits else (None, None)


def _add_lora(y_MN: Tensor, h_MR: Tensor | None, lora_B_NR: Tensor | None) -> Tensor:
    return y_MN if h_MR is None or lora_B_NR is None else y_MN.addmm_(h_MR, lora_B_NR.T)


def aligned_rows(x: Tensor) -> Tensor:
    """The same matrix with contiguous, aligned rows that do not overlap: the copy engine takes no row stride of 0."""
    apart = x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0
    aligned = x.stride(1) == 1 and apart and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


@ops.quantized_linear.register_kernel("cuda")
def _quantized_linear(x: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    check_packed("qerl::quantized_linear", codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation("qerl::quantized_linear", "x", x, codes_NK2, codes_NK2.shape[1] * 2)
    n = codes_NK2.shape[0]
    if x.numel() == 0 or n == 0:
        return x.new_zeros(*x.shape[:-1], n)
    if x.dtype != torch.bfloat16:
        return reference.quantized_linear(x, codes_NK2, block_decode_scale_NG, decode_scale)
    x_MK = x.reshape(-1, x.shape[-1])
    codes, block = codes_NK2.contiguous(), block_decode_scale_NG.contiguous()
    choice = None
    if codes is not codes_NK2 or block is not block_decode_scale_NG:
        # The copy is the kernel directly before the product, and dependent launches read weights before that one's end.
        m, (_, multiprocessors) = x_MK.shape[0], capability_and_multiprocessors(x_MK.device.index)
        choice = dispatch.portable(n, codes.shape[1] * 2, m, multiprocessors)
    y_MN = linear(x_MK, codes, block, decode_scale, choice=choice)
    return y_MN.view(*x.shape[:-1], n)


@ops.quantized_linear_dx.register_kernel("cuda")
def _quantized_linear_dx(dy: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    check_packed("qerl::quantized_linear_dx", codes_NK2, block_decode_scale_NG, decode_scale)
    check_activation("qerl::quantized_linear_dx", "dy", dy, codes_NK2, codes_NK2.shape[0])
    k = codes_NK2.shape[1] * 2
    if dy.numel() == 0 or k == 0:
        return dy.new_zeros(*dy.shape[:-1], k)
    if dy.dtype != torch.bfloat16:
        return reference.quantized_linear_dx(dy, codes_NK2, block_decode_scale_NG, decode_scale)
    dy_MN = dy.reshape(-1, dy.shape[-1])
    dx_MK = linear_dx(dy_MN, codes_NK2.contiguous(), block_decode_scale_NG.contiguous(), decode_scale)
    return dx_MK.view(*dy.shape[:-1], k)


@ops.quantize.register_kernel("cuda")
@on_its_device
def _quantize(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from qerl_compile.kernels.nvfp4_quantize import quantize

    check_weight("qerl::quantize", w_NK)
    return quantize(w_NK)


@ops.dequantize.register_kernel("cuda")
@on_its_device
def _dequantize(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    from qerl_compile.kernels.nvfp4_dequantize import dequantize_into

    check_packed("qerl::dequantize", codes_NK2, block_decode_scale_NG, decode_scale)
    check_dtype("qerl::dequantize", dtype)
    if dtype == torch.float64 or codes_NK2.numel() == 0:
        return reference.dequantize(codes_NK2, block_decode_scale_NG, decode_scale, dtype)
    n, k2 = codes_NK2.shape
    w_NK = torch.empty(n, k2 * 2, dtype=dtype, device=codes_NK2.device)
    dequantize_into(w_NK, codes_NK2.contiguous(), block_decode_scale_NG.contiguous(), decode_scale)
    return w_NK
