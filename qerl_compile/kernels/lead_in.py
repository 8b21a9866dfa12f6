"""What comes before the packed GEMM of a linear with an adapter, in one launch: h = x · Aᵀ, and x in the GEMM's order.

Both read x, neither reads the other, and each is a launch of a microsecond or two that moves next to nothing
(lora_down.py; nvfp4_fragments.py, nvfp4_permute.py). Four times a layer that was 5 % of a decode step. Here the first
programs of a launch reorder x and the others are the tiles of h: the code is that of those modules, what is here is the
division of programs, scratch that does not overlap, and when to wait.

- Programs that reorder come first: they are short, and where tiles of h fill the chip (32B, q/k/v, 8 tokens: 128 tiles
  of 16 warps on 132 multiprocessors) those that find no room start when these end.
- The GEMM's counters are cleared here while tiles of h write partial sums. So these lie behind the counters, in the
  same piece of scratch: `offset`.

Programmatic dependent launch (nvfp4_hopper.py says what it is). Two switches, as the GEMM's config has them:
    triggers   the GEMM may start at once, and wait for what it needs of this kernel
    waits      this kernel may itself start before the one before it has ended. It reads A before it waits (where it
               does so in one step) and all else after. It writes only after: x in order, h, partial sums, tickets and
               counters are stored by programs that have waited.

**The GEMM begins when x is in order, not when h is there.** It needs h only at its end, but its own wait is for the end
of this kernel, and h takes two to three times as long as x (4 to 10 µs a linear on an H200 at 32B). So programs that
reorder count themselves when they are done (`arrivals` in nvfp4_workspace.py), the GEMM goes on when it has seen all of
them, and executes its wait before it reads h. That is worth 0.8 % of a step of 8 or 16 rows and nothing at 2: where
tiles of h are, a second CTA of the GEMM has no room until they end. Why it is safe:
- Nobody waits for something that cannot start. A GEMM's CTA starts after every program of this kernel has.
- Nothing is seen too early. A program stores x and clears counters, meets at a barrier, and counts itself with release;
  the GEMM reads the word with acquire (and a proxy fence where the copy engine reads x).
- The word is zero before. Calls use two words in turn; program 0 clears the other one before it counts itself, and a
  GEMM triggers what follows only after it has seen the count. So nothing of a later call runs before its word is zero.
- A replayed graph has no host that could start from zero: its first call does not go by the word (`early`).

Every program waits, so this kernel does not end before the one before it has, nor that one's stores are visible; and so
on back to the last ordinary launch. What is read before waiting must therefore not have been written by that ordinary
launch or after it. A is not: `refresh_stacked_adapters` (stacked_adapters.py) writes it between rollouts, and every
forward begins with ordinary launches (embedding, norms).

What it does not do: more than MOST_TOKENS tokens, where x is megabytes and the pass over it a kernel that wants all of
a multiprocessor; x as it lies in memory (`NATURAL`), which needs no pass.

Legend as in lora_down.py.
"""

# ruff: noqa: ANN001, ANN201
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qerl_compile.kernels import lora_down, nvfp4_fragments, nvfp4_permute
from qerl_compile.kernels.nvfp4_arithmetic import ASM
from qerl_compile.kernels.nvfp4_workspace import arrivals, flags
from qerl_compile.kernels.prepared_launch import prepare

MOST_TOKENS = 16


@triton.jit(do_not_specialize=["M", "counter_at", "counters", "pieces", "arrival_at"])
def kernel(
    x_ptr, a_ptr, h_ptr, part_ptr, flag_ptr, out_ptr, counter_ptr, arrival_ptr,
    M, R, K, stride_x, stride_a, counter_at, counters, pieces, arrival_at,
    BM: tl.constexpr, BR: tl.constexpr, KS: tl.constexpr, STEPS: tl.constexpr, SLICES: tl.constexpr,
    GROUPS: tl.constexpr, EVEN_K: tl.constexpr, FRAGMENTS: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    CLEAR: tl.constexpr, WAITS: tl.constexpr, TRIGGERS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`pieces` programs reorder x, R / BR SLICES make h; M <= BM."""
    if TRIGGERS:
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program < pieces:
        if WAITS:
            gdc_wait()
        if FRAGMENTS:
            nvfp4_fragments.reorder(
                x_ptr, out_ptr, counter_ptr, K, stride_x, M, counter_at, counters, program, pieces,
                TOKENS, LANES, CLEAR,
            )  # fmt: skip
        else:
            nvfp4_permute.reorder(
                x_ptr, out_ptr, counter_ptr, K, stride_x, counter_at, counters, program % M, program // M,
                program, pieces, TOKENS, LANES, CLEAR,
            )  # fmt: skip
        if program == 0:
            tl.store(arrival_ptr + (1 - arrival_at), 0)
        if ASM:
            tl.debug_barrier()
        tl.atomic_add(arrival_ptr + arrival_at, 1, sem="release")
        return
    tile = program - pieces
    lora_down.tile_of_h(
        x_ptr, a_ptr, h_ptr, part_ptr, flag_ptr, M, R, K, stride_x, stride_a, tile // SLICES, tile % SLICES, 0,
        BM, BR, KS, STEPS, SLICES, GROUPS, EVEN_K, WAITS, ASM,
    )  # fmt: skip


class Order(NamedTuple):
    """How the GEMM wants x.

    Attributes:
        fragments: as nvfp4_fragments.py has it, or else as nvfp4_permute.py.
        tokens: of a tile.
        out: where to write it.
        counter_at: index of the GEMM's counters in its scratch.
        counters: how many to set to zero.
    """

    fragments: bool
    tokens: int
    out: Tensor
    counter_at: int
    counters: int


class LeadIn(NamedTuple):
    """What the GEMM gets.

    Attributes:
        h_MR: bfloat16 [M, R], contiguous.
        arrivals: int32, where programs that reorder count themselves: in element `at`.
        at: 0 or 1.
        arriving: how many of them; 0 where the GEMM must wait for the end of this kernel.
    """

    h_MR: Tensor
    arrivals: Tensor
    at: int
    arriving: int


def supports(x_MK: Tensor, a_RK: Tensor) -> bool:
    """Whether x and A are what this kernel takes: few tokens, bfloat16, 16-byte pieces."""
    m, k = x_MK.shape
    r = a_RK.shape[0]
    few = 0 < m <= MOST_TOKENS and 0 < r <= lora_down.MOST_RANK
    return few and a_RK.dtype == x_MK.dtype == torch.bfloat16 and k % 256 == r % 16 == 0 and a_RK.stride(1) == 1


def sums(m: int, r: int, k: int) -> int:
    """Words of partial sums that h takes."""
    form = lora_down.config(m, k)
    slices = -(-k // (form["KS"] * form["STEPS"]))
    return r * slices * form["BM"] if slices > 1 else 0


def lanes(fragments: bool, warps: int) -> int:
    """How many lanes of `reorder` a program takes: 64 bytes a thread, so that few programs do it."""
    return (64 if fragments else 128) * warps


def behind(used: int) -> int:
    """Where partial sums of h begin in scratch of which the GEMM uses so many words."""
    return -(-used // 32) * 32


def launch(
    x_MK: Tensor, a_RK: Tensor, order: Order, scratch: Tensor | None, offset: int, *, waits: bool, triggers: bool
) -> LeadIn:
    """Launch the kernel.

    Args:
        x_MK: bfloat16 [M, K], rows contiguous and 16-byte aligned, 1 <= M <= MOST_TOKENS, 256 divides K.
        a_RK: bfloat16 [R, K], rows contiguous, 16 divides R.
        order: what becomes of x.
        scratch: float32, the GEMM's with its counters, and `sums` words from `offset` on; None where nobody needs any.
        offset: see `behind`.
        waits: launch as a programmatic dependent (Hopper and newer).
        triggers: let the GEMM start at once, if that is one.

    Returns:
        h, and when x is in order.
    """
    m, k = x_MK.shape
    r = a_RK.shape[0]
    form = lora_down.config(m, k)
    warps, piece = form["num_warps"], form["KS"] * form["STEPS"]
    br, slices = min(form["BR"], r & -r), -(-k // piece)
    h_MR = torch.empty(m, r, dtype=x_MK.dtype, device=x_MK.device)
    part, flag = h_MR, h_MR
    if slices > 1 and scratch is not None:
        part, flag = scratch[offset:], flags(x_MK.device, r // br)
    width = lanes(order.fragments, warps)
    fragments = nvfp4_fragments.programs_for(order.tokens, k, width)
    pieces = fragments if order.fragments else m * -(-k // (8 * width))
    arrival = arrivals(x_MK.device)
    options: dict[str, Any] = {"launch_pdl": True} if waits else {}
    prepare(
        kernel, BM=form["BM"], BR=br, KS=form["KS"], STEPS=form["STEPS"], SLICES=slices, GROUPS=form["GROUPS"],
        EVEN_K=k % piece == 0, FRAGMENTS=order.fragments, TOKENS=order.tokens, LANES=width, CLEAR=order.counters > 0,
        WAITS=waits, TRIGGERS=triggers, ASM=ASM, num_warps=warps, num_stages=form["num_stages"], **options,
    )(
        (pieces + r // br * slices,), x_MK, a_RK, h_MR, part, flag, order.out, scratch if order.counters else None,
        arrival.words, m, r, k, x_MK.stride(0), a_RK.stride(0), order.counter_at, order.counters, pieces, arrival.at,
    )  # fmt: skip
    arrival.launched()
    return LeadIn(h_MR, arrival.words, arrival.at, pieces if arrival.early and triggers else 0)
