"""dx = (dy · P) · decode_scale straight from the packed weight that the forward uses: no second copy, no transpose.

The sum runs over N, the packed dimension K is the output's. A [BN, BK] tile of W, decoded row by row as in the forward,
already is the B operand (n down, k across); even and odd columns go to two accumulators that are joined once at the
end. Any architecture, no scratch memory. dispatch.py prefers the two-step path where tokens are many.

Legend: M tokens, N output features of the forward (summed here), K input features.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qerl_compile.kernels.nvfp4_arithmetic import ASM, STANDARD, dot, grouped_tile, planes
from qerl_compile.kernels.nvfp4_workspace import flags, partial_sums
from qerl_compile.kernels.prepared_launch import prepare


@triton.jit(do_not_specialize=["M", "slices"])
def kernel(
    dy_ptr, codes_ptr, block_ptr, decode_ptr, dx_ptr, part_ptr, flag_ptr, M, N, K, slices, stride_dy,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    LAYOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One BM x BK tile of dx over one slice of N."""
    pid_m, pid_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    tokens = pid_m * BM + tl.arange(0, BM)
    row = tl.arange(0, BN)
    byte = pid_k * (BK // 2) + tl.arange(0, BK // 2)
    block = pid_k * (BK // 16) + tl.arange(0, BK // 16)
    n_tiles = tl.cdiv(N, BN)
    per = tl.cdiv(n_tiles, slices)
    begin = tl.program_id(1) * per
    end = tl.minimum(begin + per, n_tiles)
    token_in = tl.minimum(tokens, M - 1).to(tl.int64)[:, None]
    byte_in = byte if EVEN_K else tl.minimum(byte, K // 2 - 1)
    block_in = block if EVEN_K else tl.minimum(block, K // 16 - 1)
    even = tl.zeros((BM, BK // 2), dtype=tl.float32)
    odd = tl.zeros((BM, BK // 2), dtype=tl.float32)
    for nt in range(begin, end):
        n = nt * BN + row
        n64 = n.to(tl.int64)
        codes_at = codes_ptr + n64[:, None] * (K // 2) + byte_in[None, :]
        block_at = block_ptr + n64[:, None] * (K // 16) + block_in[None, :]
        dy_at = dy_ptr + token_in * stride_dy + n[None, :]
        if EVEN_N:
            codes = tl.load(codes_at)
            block_scale = tl.load(block_at)
            dy = tl.load(dy_at)
        else:
            codes = tl.load(codes_at, mask=(n < N)[:, None], other=0)
            block_scale = tl.load(block_at, mask=(n < N)[:, None], other=0)
            dy = tl.load(dy_at, mask=(n < N)[None, :], other=0.0)
        w_even, w_odd = planes(codes, block_scale, BN, BK // 16, LAYOUT, ASM)
        even = dot(dy, w_even, even, ASM)
        odd = dot(dy, w_odd, odd, ASM)
    out = tl.join(even, odd).reshape(BM, BK)
    column = pid_k * BK + tl.arange(0, BK)
    inside = (tokens < M)[:, None] & (column < K)[None, :]
    at = tokens.to(tl.int64)[:, None] * K + column[None, :]
    last = True
    if SPLIT:
        tl.store(part_ptr + tl.program_id(1) * M * K + at, out, mask=inside)
        if ASM:
            tl.debug_barrier()
        ticket = tl.atomic_add(flag_ptr + tl.program_id(0), 1, sem="acq_rel")
        last = ticket == slices - 1
        if last:
            out = tl.zeros((BM, BK), dtype=tl.float32)
            for i in range(slices):
                out += tl.load(part_ptr + i * M * K + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(flag_ptr + tl.program_id(0), 0)
    if last:
        out = out * (tl.load(decode_ptr) * 256.0)
        tl.store(dx_ptr + at, out.to(tl.bfloat16), mask=inside)


def linear_dx(
    dy_MN: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    config: dict[str, int],
    *,
    layout: int = STANDARD,
) -> Tensor:
    """Launch the kernel.

    Args:
        dy_MN: bfloat16 [M, N], rows contiguous.
        codes_NK2: uint8 [N, K/2] in `layout`.
        block_NG: float8_e4m3fn or uint8 [N, K/16].
        decode_scale: float32, one element.
        config: BM, BK, BN, slices, num_warps, num_stages.
        layout: STANDARD or TWIDDLED.

    Returns:
        bfloat16 [M, K].
    """
    m, n = dy_MN.shape
    k = codes_NK2.shape[1] * 2
    bm, bk, bn = config["BM"], config["BK"], config["BN"]
    dx_MK = torch.empty(m, k, dtype=torch.bfloat16, device=dy_MN.device)
    tiles, n_tiles = -(-m // bm) * -(-k // bk), -(-n // bn)
    slices = min(config["slices"], n_tiles)
    slices = -(-n_tiles // -(-n_tiles // slices))  # no empty slice
    part = partial_sums(dy_MN.device, slices * m * k if slices > 1 else 1)
    launch = prepare(
        kernel, BM=bm, BK=bk, BN=bn, GROUP=8, SPLIT=slices > 1, LAYOUT=layout, EVEN_N=n % bn == 0,
        EVEN_K=k % bk == 0, ASM=ASM, num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    launch(
        (tiles, slices), dy_MN, codes_NK2, block_NG.view(torch.uint8), decode_scale, dx_MK, part,
        flags(dy_MN.device, tiles), m, n, k, slices, dy_MN.stride(0),
    )  # fmt: skip
    return dx_MK
