"""The CUDA forms of the paged operators.

Importing this module registers them and costs nothing: Triton is imported when an operator first runs on a GPU.
Float16, bfloat16 and float32 run in flash_decode.py (float32 with IEEE products); float64 in the reference, which can
not be captured in a CUDA graph. Every choice depends on shapes and strides alone.
"""

import torch
from torch import Tensor

from qerl_compile.kernels import paged_attention as paged
from qerl_compile.kernels.cuda_device import capability_and_multiprocessors, on_its_device


@on_its_device
def decode(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    scaling: float,
    window: int,
    cos_BD: Tensor | None = None,
    sin_BD: Tensor | None = None,
    bias_XD: Tensor | None = None,
) -> Tensor:
    """`qerl::paged_decode` without the operator around it; arguments and result as there, unchecked."""
    from qerl_compile.kernels import flash_decode

    if q_BHD.numel() == 0:
        return torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
    if q_BHD.dtype == torch.float64:
        q_BHD, k_BJD, v_BJD = paged.finished(q_BHD, k_BJD, v_BJD, cos_BD, sin_BD, bias_XD)
        return paged.reference_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, scaling, window)
    capability, multiprocessors = capability_and_multiprocessors(q_BHD.device.index)
    return flash_decode.decode(
        _rows(q_BHD),
        _rows(k_BJD),
        _rows(v_BJD),
        pages_k,
        pages_v,
        table_BP,
        length_B,
        scaling,
        window,
        None if cos_BD is None else _rows(cos_BD),
        None if sin_BD is None else _rows(sin_BD),
        bias_XD,
        multiprocessors=multiprocessors,
        choice={"dependent": capability[0] >= 9},
    )


@on_its_device
def write(k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor) -> None:
    """`qerl::paged_write` without the operator around it; arguments as there, unchecked."""
    from qerl_compile.kernels import flash_decode

    if k_BJTD.numel() > 0:
        flash_decode.write(_rows(k_BJTD), _rows(v_BJTD), pages_k, pages_v, table_BP, length_B)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@paged.paged_decode.register_kernel("cuda")
def _paged_decode(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    scaling: float,
    window: int,
    cos_BD: Tensor | None = None,
    sin_BD: Tensor | None = None,
    bias_XD: Tensor | None = None,
) -> Tensor:
    paged.check_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, window)
    paged.check_before(q_BHD, k_BJD, cos_BD, sin_BD, bias_XD)
    paged.check_rows(paged.DECODE, q_BHD, k_BJD, v_BJD, table_BP, length_B)
    paged.check_rotary_rows(cos_BD, sin_BD, length_B)
    return decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, scaling, window, cos_BD, sin_BD, bias_XD)


@paged.paged_write.register_kernel("cuda")
def _paged_write(
    k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor
) -> None:
    paged.check_write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)
    paged.check_rows(paged.WRITE, k_BJTD, v_BJTD, table_BP, length_B)
    write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)
