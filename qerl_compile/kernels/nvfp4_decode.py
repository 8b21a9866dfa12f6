"""y = (x · Pᵀ) · decode_scale for few tokens (M <= 64), on any architecture: memory-bound, so split over K.

One CTA owns BN rows of W and one slice of K. It streams packed bytes and activations through a software pipeline,
decodes to registers (nvfp4_arithmetic.py) and multiplies even and odd columns in two dot products. With SWAP, W is the
A operand of `mma.m16n8k16`, so that eight tokens fill an instruction; two warps then keep Triton on `mma.sync`, whose
operands come from registers (with four it would pick `wgmma` and move W through shared memory).

Slices of K store partial sums; the CTA that draws the last ticket of its tile adds them in slice order. Which CTA that
is varies, the sum does not: runs are equal to the last bit.

Epilogue: times decode_scale * 2^8, plus h · Bᵀ of a LoRA branch if given (h already carries alpha / rank).

Legend: M tokens, N output features, K input features, R rank.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qerl_compile.kernels.nvfp4_arithmetic import ASM, STANDARD, dot, planes, split_pairs
from qerl_compile.kernels.nvfp4_workspace import flags, partial_sums
from qerl_compile.kernels.prepared_launch import prepare


@triton.jit(do_not_specialize=["M", "slices"])
def kernel(
    x_ptr, codes_ptr, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr, h_ptr, lora_ptr,
    M, N, K, slices, stride_x, stride_y, stride_h, stride_lora,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    LAYOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, RANK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One BM x BN tile of one slice of K; x as int32 words, RANK 0 without LoRA."""
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(1)
    pid_m = tl.program_id(2)
    rows = pid_n * BN + tl.arange(0, BN)
    tokens = pid_m * BM + tl.arange(0, BM)
    byte = tl.arange(0, BK // 2)
    block = tl.arange(0, BK // 16)
    m_ok = tokens < M
    rows_in = rows if EVEN_N else tl.minimum(rows, N - 1)  # clamping keeps masks off the weight stream
    codes_at = codes_ptr + rows_in.to(tl.int64)[:, None] * (K // 2) + byte[None, :]
    block_at = block_ptr + rows_in.to(tl.int64)[:, None] * (K // 16) + block[None, :]
    x_at = x_ptr + tokens[:, None] * stride_x + byte[None, :]
    k_tiles = tl.cdiv(K, BK)
    per = tl.cdiv(k_tiles, slices)
    begin = pid_k * per
    end = tl.minimum(begin + per, k_tiles)
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.float32)
    for kt in range(begin, end):
        if EVEN_K:
            codes = tl.load(codes_at + kt * (BK // 2))
            block_scale = tl.load(block_at + kt * (BK // 16))
            x = tl.load(x_at + kt * (BK // 2), mask=m_ok[:, None], other=0)
        else:
            byte_ok = (kt * (BK // 2) + byte < K // 2)[None, :]
            codes = tl.load(codes_at + kt * (BK // 2), mask=byte_ok, other=0)
            block_scale = tl.load(
                block_at + kt * (BK // 16), mask=(kt * (BK // 16) + block < K // 16)[None, :], other=0
            )
            x = tl.load(x_at + kt * (BK // 2), mask=m_ok[:, None] & byte_ok, other=0)
        w_even, w_odd = planes(codes, block_scale, BN, BK // 16, LAYOUT, ASM)
        x_even, x_odd = split_pairs(x)
        if SWAP:
            acc = dot(w_even, tl.trans(x_even), acc, ASM)
            acc = dot(w_odd, tl.trans(x_odd), acc, ASM)
        else:
            acc = dot(x_even, tl.trans(w_even), acc, ASM)
            acc = dot(x_odd, tl.trans(w_odd), acc, ASM)
    if SWAP:
        acc = tl.trans(acc)
    inside = m_ok[:, None] & (rows < N)[None, :]
    last = True
    if SPLIT:
        tile = pid_m * tl.num_programs(0) + pid_n
        part_at = part_ptr + tokens[:, None] * N + rows[None, :]
        tl.store(part_at + pid_k * M * N, acc, mask=inside)
        if ASM:
            tl.debug_barrier()
        ticket = tl.atomic_add(flag_ptr + tile, 1, sem="acq_rel")
        last = ticket == slices - 1
        if last:
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for i in range(slices):
                acc += tl.load(part_at + i * M * N, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(flag_ptr + tile, 0)
    if last:
        acc = acc * (tl.load(decode_ptr) * 256.0)
        if RANK > 0:
            r = tl.arange(0, RANK)
            h = tl.load(h_ptr + tokens[:, None] * stride_h + r[None, :], mask=m_ok[:, None], other=0.0)
            lora = tl.load(lora_ptr + rows_in[:, None] * stride_lora + r[None, :])
            if SWAP:
                acc += tl.trans(dot(lora, tl.trans(h), tl.zeros((BN, BM), dtype=tl.float32), ASM))
            else:
                acc += dot(h, tl.trans(lora), tl.zeros((BM, BN), dtype=tl.float32), ASM)
        tl.store(y_ptr + tokens[:, None] * stride_y + rows[None, :], acc.to(tl.bfloat16), mask=inside)


def linear(
    x_MK: Tensor,
    codes_NK2: Tensor,
    block_NG: Tensor,
    decode_scale: Tensor,
    config: dict[str, int],
    *,
    layout: int = STANDARD,
    h_MR: Tensor | None = None,
    lora_B_NR: Tensor | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 4-byte aligned.
        codes_NK2: uint8 [N, K/2] in `layout`.
        block_NG: float8_e4m3fn or uint8 [N, K/16].
        decode_scale: float32, one element.
        config: BM, BN, BK, SWAP, slices, num_warps, num_stages.
        layout: STANDARD or TWIDDLED.
        h_MR: bfloat16 [M, R], R a power of two of at least 16.
        lora_B_NR: bfloat16 [N, R].

    Returns:
        bfloat16 [M, N].
    """
    m, k = x_MK.shape
    n = codes_NK2.shape[0]
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    y_MN = torch.empty(m, n, dtype=torch.bfloat16, device=x_MK.device)
    words = x_MK.view(torch.int32)
    tiles_n, tiles_m, k_tiles = -(-n // bn), -(-m // bm), -(-k // bk)
    slices = min(config["slices"], k_tiles)
    slices = -(-k_tiles // -(-k_tiles // slices))  # no empty slice
    part = partial_sums(x_MK.device, slices * m * n if slices > 1 else 1)
    flag = flags(x_MK.device, tiles_n * tiles_m)
    h, lora = (x_MK, x_MK) if h_MR is None or lora_B_NR is None else (h_MR, lora_B_NR)
    launch = prepare(
        kernel, BM=bm, BN=bn, BK=bk, SPLIT=slices > 1, SWAP=config["SWAP"], LAYOUT=layout,
        EVEN_N=n % bn == 0, EVEN_K=k % bk == 0, RANK=0 if h_MR is None else h_MR.shape[1], ASM=ASM,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    launch(
        (tiles_n, slices, tiles_m), words, codes_NK2, block_NG.view(torch.uint8), decode_scale, y_MN, part, flag, h,
        lora, m, n, k, slices, words.stride(0), y_MN.stride(0), h.stride(0), lora.stride(0),
    )  # fmt: skip
    return y_MN
