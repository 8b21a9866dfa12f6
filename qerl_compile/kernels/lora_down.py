"""h = x · Aᵀ for few tokens: the first product of a LoRA branch in a rollout, in one launch.

About 1 MB is read, so nothing here is bandwidth: the time is a launch, one round of loads and one reduction. cuBLAS
takes 5 µs on an H100 and a second kernel of 2 µs for its split-K sum, four times a layer; this one, in a graph, at
ranks 32 to 128: 2.3 to 4.2 µs with one token, 2.9 to 4.9 with 8, 3.8 to 4.9 with 16, 4.3 to 7.3 with 64. Therefore

- a CTA asks for its whole piece of x and A at once, in 16-byte loads, and only then multiplies. With dots the piece is
  two steps and the loop's pipeline has a stage more (num_stages = STEPS + 1): that makes the loads asynchronous copies,
  all begun before the first is awaited. In straight code Triton waits for A before it asks for x. Above 64 tokens there
  is bandwidth to wait for, and an ordinary pipeline;
- K is cut over CTAs until the chip is busy, and over the warps of a CTA, whose sums meet in shared memory;
- where K is cut over CTAs (SLICES > 1) partial sums go to scratch, and the CTA that draws the last ticket of its tile
  adds them in slice order. Which one that is varies, the sum does not: runs are equal to the last bit.

Three forms of the product, chosen by GROUPS:

    0    multiply and add in fp32, for up to eight tokens: every thread has columns of its own, so that x and A
         go straight from memory to registers. A row of A fills a CTA, all of K fits in it, and no ticket is needed.
    1    one tl.dot; for tiles of 64 tokens, where the instruction is `wgmma` on four warps
    G    a batch of G dots, warp g having columns [g, g + 1) KS / G: for tiles of 16 or 32 tokens, which are too small
         to be cut over warps in any other way. G is the number of warps.

Where the packed GEMM wants x in another order and tokens are few, tiles of h are programs of lead_in.py's launch.

DEPENDENT (programmatic dependent launch): a CTA may start while the kernel before it still runs. It waits with x,
scratch and tickets, and in one step (STEPS = 1) not with A, which that kernel must then not have written.

`config` is the one place where a form is chosen. Other dtypes, strides and sizes go to torch's linear.

Legend: M tokens, K input features, R rank; BM x BR the tile of a CTA, KS columns at once, STEPS times, of one slice.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qerl_compile.kernels.cuda_device import on_its_device
from qerl_compile.kernels.nvfp4_arithmetic import ASM, dot
from qerl_compile.kernels.nvfp4_workspace import flags, partial_sums
from qerl_compile.kernels.prepared_launch import prepare

FEW_TOKENS = 64
MOST_TOKENS, MOST_COLUMNS = 256, 4096  # above 64 tokens more columns are torch's: 15 µs v 8 at 256 tokens, K = 27648
MOST_RANK = 256
MOST_LOADED = 3 << 15  # elements of x and A that 16 warps hold in registers without spilling


@triton.jit
def tile_of_h(
    x_ptr, a_ptr, h_ptr, part_ptr, flag_ptr, M, R, K, stride_x, stride_a, pid_r, pid_k, pid_m,
    BM: tl.constexpr, BR: tl.constexpr, KS: tl.constexpr, STEPS: tl.constexpr, SLICES: tl.constexpr,
    GROUPS: tl.constexpr, EVEN_K: tl.constexpr, DEPENDENT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One BM x BR tile of one slice of K; BR divides R, 16 divides K."""
    WIDTH: tl.constexpr = KS // max(GROUPS, 1)
    m, r, k = tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, WIDTH)
    token, row = pid_m * BM + m, pid_r * BR + r
    begin = pid_k * (KS * STEPS)
    if GROUPS == 0:
        k, x_row, a_row = k[None, None, :], token[:, None, None], row[None, :, None]
        acc = tl.zeros((BM, BR, KS), tl.float32)
    elif GROUPS == 1:
        k, x_row, a_row = k[None, :], token[:, None], row[:, None]
        acc = tl.zeros((BM, BR), tl.float32)
    else:
        group = tl.arange(0, GROUPS)[:, None, None] * WIDTH
        k, x_row, a_row = group + k[None, None, :], token[None, :, None], row[None, :, None]
        acc = tl.zeros((GROUPS, BM, BR), tl.float32)
    if DEPENDENT and STEPS > 1:
        gdc_wait()
    for step in range(STEPS):
        column = begin + step * KS + k
        if EVEN_K:
            a = tl.load(a_ptr + a_row * stride_a + column)
        else:
            a = tl.load(a_ptr + a_row * stride_a + column, mask=column < K, other=0.0)
        if DEPENDENT and STEPS == 1:
            gdc_wait()
        x_in = x_row < M if EVEN_K else (x_row < M) & (column < K)
        x = tl.load(x_ptr + x_row * stride_x + column, mask=x_in, other=0.0)
        if GROUPS == 0:
            acc += x.to(tl.float32) * a.to(tl.float32)
        elif GROUPS == 1:
            acc = dot(x, tl.trans(a), acc, ASM)
        else:
            acc = dot(x, tl.trans(a, 0, 2, 1), acc, ASM)
    if GROUPS == 0:
        acc = tl.sum(acc, 2)
    elif GROUPS > 1:
        acc = tl.sum(acc, 0)
    last = True
    if SLICES > 1:
        tile = pid_m * (R // BR) + pid_r
        part_at = part_ptr + tile * (SLICES * BM * BR) + m[:, None] * BR + r[None, :]
        tl.store(part_at + pid_k * (BM * BR), acc)
        if ASM:
            tl.debug_barrier()
        last = tl.atomic_add(flag_ptr + tile, 1, sem="acq_rel") == SLICES - 1
        if last:
            acc = tl.zeros((BM, BR), tl.float32)
            for i in tl.static_range(SLICES):
                acc += tl.load(part_at + i * (BM * BR), cache_modifier=".cg")
            tl.store(flag_ptr + tile, 0)
    if last:
        tl.store(h_ptr + token[:, None] * R + row[None, :], acc.to(h_ptr.dtype.element_ty), mask=(token < M)[:, None])


@triton.jit(do_not_specialize=["M"])
def kernel(
    x_ptr, a_ptr, h_ptr, part_ptr, flag_ptr, M, R, K, stride_x, stride_a,
    BM: tl.constexpr, BR: tl.constexpr, KS: tl.constexpr, STEPS: tl.constexpr, SLICES: tl.constexpr,
    GROUPS: tl.constexpr, EVEN_K: tl.constexpr, DEPENDENT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """All tiles of h: programs are (R / BR, SLICES, M / BM)."""
    if DEPENDENT:
        gdc_launch_dependents()
    tile_of_h(
        x_ptr, a_ptr, h_ptr, part_ptr, flag_ptr, M, R, K, stride_x, stride_a,
        tl.program_id(0), tl.program_id(1), tl.program_id(2), BM, BR, KS, STEPS, SLICES, GROUPS, EVEN_K, DEPENDENT, ASM,
    )  # fmt: skip


def config(m: int, k: int) -> dict[str, Any]:
    """Tile and launch options.

    Args:
        m: tokens.
        k: input features.

    Returns:
        BM, BR, KS, STEPS, GROUPS, num_warps, num_stages, DEPENDENT.
    """
    bm, whole = triton.next_power_of_2(m), triton.next_power_of_2(k)
    loaded = (bm + 1) * whole
    if m <= 8 and loaded <= MOST_LOADED:
        warps = max(4, min(triton.next_power_of_2(-(-loaded // 5120)), 16))  # 80 registers of loads a thread
        form = {"BM": bm, "BR": 1, "KS": whole, "STEPS": 1, "GROUPS": 0, "num_warps": warps, "num_stages": 2}
    elif m <= 32:
        form = {"BM": max(16, bm), "BR": 16, "KS": 256, "STEPS": 2, "GROUPS": 4, "num_warps": 4, "num_stages": 3}
    elif m <= 64:
        form = {"BM": 64, "BR": 16, "KS": 128, "STEPS": 4, "GROUPS": 1, "num_warps": 4, "num_stages": 5}
    else:
        form = {"BM": 64, "BR": 32, "KS": 128, "STEPS": 4, "GROUPS": 1, "num_warps": 4, "num_stages": 3}
    return form | {"DEPENDENT": False}


@on_its_device
def launch(x_MK: Tensor, a_RK: Tensor, chosen: dict[str, Any]) -> Tensor:
    """Launch the kernel.

    Args:
        x_MK: bfloat16 [M, K], columns contiguous, M >= 1, 16 divides K; float16 and float32 too under the interpreter.
        a_RK: [R, K], columns contiguous, 16 divides R.
        chosen: as from `config`; BR is halved until it divides R.

    Returns:
        [M, R], contiguous.
    """
    m, k = x_MK.shape
    r = a_RK.shape[0]
    bm, br, ks, steps = chosen["BM"], min(chosen["BR"], r & -r), chosen["KS"], chosen["STEPS"]
    slices, tiles_r, tiles_m = -(-k // (ks * steps)), r // br, -(-m // bm)
    h_MR = torch.empty(m, r, dtype=x_MK.dtype, device=x_MK.device)
    part, flag = h_MR, h_MR
    if slices > 1:
        part = partial_sums(x_MK.device, tiles_r * tiles_m * slices * bm * br)
        flag = flags(x_MK.device, tiles_r * tiles_m)
    options = {"launch_pdl": True} if chosen["DEPENDENT"] else {}
    prepare(
        kernel, BM=bm, BR=br, KS=ks, STEPS=steps, SLICES=slices, GROUPS=chosen["GROUPS"],
        EVEN_K=k % (ks * steps) == 0, DEPENDENT=chosen["DEPENDENT"], ASM=ASM, num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"], **options,
    )((tiles_r, slices, tiles_m), x_MK, a_RK, h_MR, part, flag, m, r, k, x_MK.stride(0), a_RK.stride(0))  # fmt: skip
    return h_MR


def lora_down(x_MK: Tensor, a_RK: Tensor, choice: dict[str, Any] | None = None) -> Tensor:
    """h = x · Aᵀ, by this kernel where it fits and by torch elsewhere.

    Args:
        x_MK: [M, K]; rows may be slices of longer ones.
        a_RK: [R, K] in the dtype of x, on its device.
        choice: overrides `config`; for tuning and tests.

    Returns:
        [M, R] in the dtype of x, contiguous.
    """
    m, k = x_MK.shape
    r = a_RK.shape[0]
    few = 0 < m <= FEW_TOKENS or (0 < m <= MOST_TOKENS and k <= MOST_COLUMNS)
    fits = x_MK.dtype == a_RK.dtype == torch.bfloat16 and few and 0 < r <= MOST_RANK and k > 0
    if not (fits and not x_MK.is_cpu and k % 16 == r % 16 == 0 and x_MK.stride(1) == a_RK.stride(1) == 1):
        return F.linear(x_MK, a_RK)
    return launch(x_MK, a_RK, config(m, k) | (choice or {}))
