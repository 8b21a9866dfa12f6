"""Packed NVFP4 to a dense weight in one pass at memory speed: reads 0.5625, writes 2 bytes per weight in bfloat16.

code * scale is exact; times decode_scale in fp32; one rounding to the output dtype, which is formats/nvfp4.py's
arithmetic to the bit. Used by `qerl::dequantize` and by the two-step path, whose cuBLAS product needs decode_scale
inside the weight (the one place where it is not applied after the sum).
"""

# ruff: noqa: ANN001, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qerl_compile.kernels.nvfp4_arithmetic import ASM, STANDARD, planes
from qerl_compile.kernels.prepared_launch import prepare

ROWS, COLUMNS = 16, 512


@triton.jit
def _kernel(
    codes_ptr, block_ptr, decode_ptr, out_ptr, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    block = tl.program_id(0) * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok = (row < N)[:, None]
    row = row.to(tl.int64)[:, None]
    codes = tl.load(codes_ptr + row * (K // 2) + byte[None, :], mask=row_ok & (byte < K // 2)[None, :], other=0)
    block_scale = tl.load(
        block_ptr + row * (K // 16) + block[None, :], mask=row_ok & (block < K // 16)[None, :], other=0
    )
    even, odd = planes(codes, block_scale, ROWS, COLUMNS // 16, LAYOUT, ASM)
    # 2^8 goes to the product, where it is exact; decode_scale * 2^8 might overflow or leave the subnormals
    decode = tl.load(decode_ptr)
    even = (even.to(tl.float32) * 256.0) * decode
    odd = (odd.to(tl.float32) * 256.0) * decode
    out = tl.join(even.to(out_ptr.dtype.element_ty), odd.to(out_ptr.dtype.element_ty)).reshape(ROWS, COLUMNS)
    tl.store(out_ptr + row * K + column[None, :], out, mask=row_ok & (column < K)[None, :])


def dequantize_into(
    out_NK: Tensor, codes_NK2: Tensor, block_NG: Tensor, decode_scale: Tensor, *, layout: int = STANDARD
) -> None:
    """out = P · decode_scale.

    Args:
        out_NK: bfloat16, float16 or float32 [N, K], contiguous.
        codes_NK2: uint8 [N, K/2] in `layout`, contiguous.
        block_NG: float8_e4m3fn or uint8 [N, K/16], contiguous.
        decode_scale: float32, one element.
        layout: STANDARD or TWIDDLED.
    """
    n, k = out_NK.shape
    launch = prepare(_kernel, ROWS=ROWS, COLUMNS=COLUMNS, LAYOUT=layout, ASM=ASM, num_warps=8)
    grid = -(-k // COLUMNS), -(-n // ROWS)
    launch(grid, codes_NK2, block_NG.view(torch.uint8), decode_scale, out_NK, n, k)
