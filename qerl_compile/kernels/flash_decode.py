"""Attention of one new token per row over paged keys and values: memory-bound, so split along the sequence.

One program owns a row, a kv head and a stretch of positions. All G query heads of that kv head are the rows of one
matrix (padded to 16), so that keys and values are read once for the group, by `mma` with float32 sums. It walks the
stretch in tiles of TILE positions, loads kept in flight by the software pipeline, with the usual running maximum m, sum
l and weighted values acc, in base 2:

    s = (q . k) scaling log2(e);   m' = max(m, s);   p = 2^(s - m');   l = l 2^(m - m') + sum p;   acc likewise

The new token never goes through memory: program 0 starts with m = its score, l = 1, acc = its value, and stores its k
and v into the page, a position that no program reads. All others start empty.

Splits. Lengths live on the device (they change between replays of a CUDA graph), so the number of stretches is chosen
from shapes alone (`splits`) and a stretch is ceil(tiles of this row / splits) tiles: programs without one end at once.
With more than one, partial (acc, m, l) go to scratch, and the program that draws the last ticket of its row and kv head
adds them in order of position. Which one that is varies, the sum does not: runs are equal to the last bit, and a row
does not depend on its neighbours (but on `splits`, thus on the shape of the batch). Tickets are left at zero.

What comes before attention. With a bias, and with cos and sin, the call brings q, k and v as the projections left them.
Every program adds the bias to its q and rotates it, the one that stores k and v does it to those too, in float32 and
rounded once (`_finished`). A rotation is a second read of the same cache lines with halves swapped.

DEPENDENT (programmatic dependent launch; lead_in.py says what holds for all that are). A program waits before it
touches memory, and before any return, so that a kernel that has ended has waited. It lets the next kernel start when
its loop is done and not before: a waiting CTA would take room from one that still loads keys (an H100, trigger at the
start: 0.7 µs less at one row, 1.5 more at eight ragged ones of 7B). Asking for keys of earlier steps while it waits
(prefetch into L2) gained nothing on an H200: 32B, 8 rows -0.1 %, 16 rows +0.4 % of a step.

Pages. Where a page is a whole number of tiles, a tile has one page number, read one tile ahead. Else every position
looks its page up, which is slower and right for any page size.

Legend: J kv heads, G query heads of each, D head dimension; GP = G padded for `mma`, GS = G and DP = D padded to a
power of two.
"""

# ruff: noqa: ANN001, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qerl_compile.kernels.nvfp4_arithmetic import ASM
from qerl_compile.kernels.nvfp4_workspace import flags
from qerl_compile.kernels.prepared_launch import prepare

TILE_BYTES = 1 << 15  # of K and V in one tile: 64 positions of 128 bf16
PROGRAMS_PER_SM = 3  # asked of a launch, by splitting; measured on an H100: 8 cost 6 to 20 % at 64 rows
MOST_SPLITS = 64


@triton.jit
def _finished(x_at, bias_at, cos, sin, d, inside, D: tl.constexpr, BIAS: tl.constexpr, ROTARY: tl.constexpr):
    """x + bias, then x cos + (-x[D/2:], x[:D/2]) sin, in the dtype of x; the pointers are those of column 0."""
    x = tl.load(x_at + d, mask=inside, other=0.0)
    y = x.to(tl.float32)
    if BIAS:
        y += tl.load(bias_at + d, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        swapped = tl.where(d < D // 2, d + D // 2, d - D // 2)
        turned = tl.load(x_at + swapped, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            turned += tl.load(bias_at + swapped, mask=inside, other=0.0).to(tl.float32)
        y = y * cos + tl.where(d < D // 2, -turned, turned) * sin
    return y.to(x.dtype)


@triton.jit
def _add_stretches(
    part_ptr, y_ptr, pair, programs, used, rows,
    G: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """y of one kv head of one row, from its `used` partial results in order of position."""
    AT_ONCE: tl.constexpr = 8  # loads in flight; one after the other each would wait for L2
    g, d, s = tl.arange(0, GS), tl.arange(0, DP), tl.arange(0, SP)
    ml_at, first = part_ptr + rows * D, pair * programs
    row_SG = (first + s[:, None]) * G + g[None, :]
    in_SG = (s < used)[:, None] & (g < G)[None, :]
    m_SG = tl.load(ml_at + row_SG * 2, mask=in_SG, other=float("-inf"), cache_modifier=".cg")
    l_SG = tl.load(ml_at + row_SG * 2 + 1, mask=in_SG, other=0.0, cache_modifier=".cg")
    m_G = tl.max(m_SG, 0)
    l_G = tl.sum(l_SG * tl.exp2(m_SG - m_G[None, :]), 0)
    y_GD = tl.zeros((GS, DP), tl.float32)
    for start in range(0, used, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            stretch_G = tl.zeros_like(g) + (start + i)
            row_G, in_G = (first + stretch_G) * G + g, (stretch_G < used) & (g < G)
            weight_G = tl.exp2(tl.load(ml_at + row_G * 2, mask=in_G, other=float("-inf"), cache_modifier=".cg") - m_G)
            at_GD, in_GD = part_ptr + row_G[:, None] * D + d[None, :], in_G[:, None] & (d < D)[None, :]
            y_GD += weight_G[:, None] * tl.load(at_GD, mask=in_GD, other=0.0, cache_modifier=".cg")
    y_at = y_ptr + (pair * G + g[:, None]) * D + d[None, :]
    y = (y_GD / l_G[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_at, y, mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["stride_table"])
def _decode(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, bias_ptr,
    pages_k_ptr, pages_v_ptr, table_ptr, length_ptr, y_ptr, part_ptr, ticket_ptr,
    stride_qb, stride_qh, stride_kb, stride_kj, stride_vb, stride_vj, stride_cos, stride_sin,
    stride_page_k, stride_page_v, stride_table,
    G: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, SP: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    ROTARY: tl.constexpr, DEPENDENT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One stretch of one kv head of one row; SCALE = scaling log2(e); SP = stretches, padded to one of
    three sizes, each of which is a form to compile."""
    if DEPENDENT:
        gdc_wait()  # before any return: a kernel that ends has waited
    b, j, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads_kv, programs = tl.num_programs(1), tl.num_programs(2)
    g, d, tile = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, TILE)
    head_in, d_in = g < G, d < D
    last = tl.load(length_ptr + b) - 1  # the new token's position
    y_at = y_ptr + (b * heads_kv + j) * (G * D) + g[:, None] * D + d[None, :]
    y_in = head_in[:, None] & d_in[None, :]
    if last < 0:
        if split == 0:
            tl.store(y_at, tl.zeros((GP, DP), y_ptr.dtype.element_ty), mask=y_in)
        return
    first = tl.maximum(last + 1 - WINDOW, 0) if WINDOW else 0
    # positions before the new one, in tiles that start at multiples of TILE
    tile_0, tile_n = first // TILE, tl.cdiv(last, TILE)
    per = tl.maximum(tl.cdiv(tile_n - tile_0, programs), 1)
    begin = tile_0 + split * per
    end = tl.minimum(begin + per, tile_n)
    if split > 0 and begin >= end:
        return
    cos, sin = 0.0, 0.0
    if ROTARY:
        cos = tl.load(cos_ptr + b * stride_cos + d, mask=d_in, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * stride_sin + d, mask=d_in, other=0.0).to(tl.float32)
    head = (j * G + g)[:, None]
    q_at = q_ptr + b * stride_qb + head * stride_qh
    q = _finished(q_at, bias_ptr + head * D, cos, sin, d[None, :], y_in, D, BIAS, ROTARY)
    m = tl.full((GP,), float("-inf"), tl.float32)
    l = tl.zeros((GP,), tl.float32)  # noqa: E741
    acc = tl.zeros((GP, DP), tl.float32)
    table_at = table_ptr + b * stride_table
    inside_j = j.to(tl.int64) * (PAGE * D)
    if split == 0:
        new_k, bias_k = k_ptr + b * stride_kb + j * stride_kj, bias_ptr + (heads_kv * G + j) * D
        new_v, bias_v = v_ptr + b * stride_vb + j * stride_vj, bias_ptr + (heads_kv * (G + 1) + j) * D
        k_new = _finished(new_k, bias_k, cos, sin, d, d_in, D, BIAS, ROTARY)
        v_new = _finished(new_v, bias_v, cos, sin, d, d_in, D, BIAS, False)
        page = tl.load(table_at + last // PAGE).to(tl.int64)
        at = inside_j + (last % PAGE) * D + d
        tl.store(pages_k_ptr + page * stride_page_k + at, k_new, mask=d_in)
        tl.store(pages_v_ptr + page * stride_page_v + at, v_new, mask=d_in)
        m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * SCALE
        l += 1.0  # noqa: E741
        acc += v_new.to(tl.float32)[None, :]
    WHOLE: tl.constexpr = PAGE % TILE == 0
    ahead = tl.load(table_at + begin * TILE // PAGE, mask=begin < end, other=0)
    for i in range(begin, end):
        position = i * TILE + tile
        seen = position < last
        if WINDOW:
            seen = seen & (position >= first)
        if WHOLE:
            page = ahead.to(tl.int64)
            ahead = tl.load(table_at + (i + 1) * TILE // PAGE, mask=i + 1 < end, other=0)
            at_k = page * stride_page_k + inside_j + (i * TILE % PAGE) * D
            at_v = page * stride_page_v + inside_j + (i * TILE % PAGE) * D
            k_at = pages_k_ptr + at_k + tile[None, :] * D + d[:, None]
            v_at = pages_v_ptr + at_v + tile[:, None] * D + d[None, :]
        else:
            page = tl.load(table_at + position // PAGE, mask=seen, other=0).to(tl.int64)
            offset = inside_j + (position % PAGE) * D
            k_at = pages_k_ptr + (page * stride_page_k + offset)[None, :] + d[:, None]
            v_at = pages_v_ptr + (page * stride_page_v + offset)[:, None] + d[None, :]
        k = tl.load(k_at, mask=seen[None, :] & d_in[:, None], other=0.0)
        v = tl.load(v_at, mask=seen[:, None] & d_in[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * SCALE
        s = tl.where(seen[None, :], s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))  # finite: every tile of a stretch has a position that is seen
        p = tl.exp2(s - m_next[:, None])
        keep = tl.exp2(m - m_next)
        l = l * keep + tl.sum(p, 1)  # noqa: E741
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
        m = m_next
    if DEPENDENT:
        gdc_launch_dependents()  # all keys and values are here: what is launched now takes room from nobody
    if SP == 1:
        tl.store(y_at, (acc / l[:, None]).to(y_ptr.dtype.element_ty), mask=y_in)
    else:
        pair = b * heads_kv + j
        rows = tl.num_programs(0).to(tl.int64) * heads_kv * programs * G
        row = (pair * programs + split) * G + g
        tl.store(part_ptr + row[:, None] * D + d[None, :], acc, mask=y_in)
        tl.store(part_ptr + rows * D + row * 2, m, mask=head_in)
        tl.store(part_ptr + rows * D + row * 2 + 1, l, mask=head_in)
        if ASM:
            tl.debug_barrier()
        used = tl.maximum(tl.cdiv(tile_n - tile_0, per), 1)  # programs with a stretch; the first without one too
        if tl.atomic_add(ticket_ptr + pair, 1, sem="acq_rel") == used - 1:
            tl.store(ticket_ptr + pair, 0)
            _add_stretches(part_ptr, y_ptr, pair, programs, used, rows, G, GS, D, DP, SP)


@triton.jit(do_not_specialize=["stride_table", "stride_kb", "stride_vb"])
def _write(
    k_ptr, v_ptr, pages_k_ptr, pages_v_ptr, table_ptr, length_ptr,
    stride_kb, stride_kj, stride_kt, stride_vb, stride_vj, stride_vt, stride_page_k, stride_page_v, stride_table,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE positions of one kv head of one row, from a right-padded batch into pages."""
    b, j = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    position, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, DP)
    live = position < tl.load(length_ptr + b)
    inside = live[:, None] & (d < D)[None, :]
    page = tl.load(table_ptr + b * stride_table + position // PAGE, mask=live, other=0).to(tl.int64)
    at = j * (PAGE * D) + (position % PAGE) * D
    t = position.to(tl.int64)
    k = tl.load(k_ptr + b * stride_kb + j * stride_kj + t[:, None] * stride_kt + d[None, :], mask=inside)
    v = tl.load(v_ptr + b * stride_vb + j * stride_vj + t[:, None] * stride_vt + d[None, :], mask=inside)
    tl.store(pages_k_ptr + (page * stride_page_k + at)[:, None] + d[None, :], k, mask=inside)
    tl.store(pages_v_ptr + (page * stride_page_v + at)[:, None] + d[None, :], v, mask=inside)


def splits(rows: int, heads_kv: int, positions: int, tile: int, multiprocessors: int) -> int:
    """Into how many stretches each row is cut.

    Args:
        rows: of the batch.
        heads_kv: kv heads.
        positions: that a row may read at most: P * PAGE, or the window and a tile more if that is less.
        tile: positions of a tile.
        multiprocessors: of the device.
    """
    wanted = PROGRAMS_PER_SM * multiprocessors // (rows * heads_kv)
    return max(1, min(wanted, -(-positions // tile), MOST_SPLITS))


def config(d: int, page: int, itemsize: int) -> dict[str, Any]:
    """Tile size and launch options for head dimension `d`.

    Args:
        d: head dimension.
        page: positions of a page.
        itemsize: bytes of an element.
    """
    most = TILE_BYTES // (2 * triton.next_power_of_2(d) * itemsize)
    tile = max(16, min(most, 128))
    if page >= 32 and page % min(tile, page) == 0:
        tile = min(tile, page)
    # float32 is multiplied without matrix instructions, which on four warps takes more registers than there are
    return {"TILE": tile, "num_warps": 8 if itemsize == 4 else 4, "num_stages": 3, "dependent": False}


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
    *,
    multiprocessors: int,
    choice: dict[str, Any] | None = None,
) -> Tensor:
    """Launch the kernel.

    Args:
        q_BHD: float16, bfloat16 or float32 [B, H, D], D contiguous, B >= 1.
        k_BJD: [B, J, D], D contiguous.
        v_BJD: [B, J, D], D contiguous.
        pages_k: [pages, J, PAGE, D], pages contiguous.
        pages_v: as pages_k.
        table_BP: int32 [B, P].
        length_B: int32 [B].
        scaling: multiplies q . k.
        window: positions seen, 0 for all.
        cos_BD: [B or 1, D] in the dtype of q, D contiguous and even: rotates q and k; None if they are.
        sin_BD: as cos_BD.
        bias_XD: [H + 2 J, D] in the dtype of q, contiguous: added to q, k and v; None if it is.
        multiprocessors: of the device.
        choice: overrides `config` and, by "splits", the number of stretches; for tuning and tests.

    Returns:
        [B, H, D], contiguous.
    """
    rows, heads, d = q_BHD.shape
    _, heads_kv, page, _ = pages_k.shape
    chosen = config(d, page, q_BHD.element_size()) | (choice or {})
    tile, dependent = chosen["TILE"], chosen["dependent"]
    positions = table_BP.shape[1] * page
    # a window that starts within a tile touches one tile more
    positions = min(positions, window + tile) if window else positions
    count = chosen.get("splits") or splits(rows, heads_kv, positions, tile, multiprocessors)
    group = heads // heads_kv
    padded = triton.next_power_of_2(d)
    y_BHD = torch.empty(rows, heads, d, dtype=q_BHD.dtype, device=q_BHD.device)
    rotary = cos_BD is not None and sin_BD is not None
    cos, sin = (cos_BD, sin_BD) if rotary else (q_BHD, q_BHD)
    bias = q_BHD if bias_XD is None else bias_XD
    options = {"launch_pdl": True} if dependent else {}
    launch = prepare(
        _decode, G=group, GP=max(16, triton.next_power_of_2(group)), GS=triton.next_power_of_2(group), D=d, DP=padded,
        PAGE=page, TILE=tile, SP=next(p for p in (1, 8, MOST_SPLITS) if count <= p), WINDOW=window,
        SCALE=scaling * math.log2(math.e), BIAS=bias_XD is not None, ROTARY=rotary, DEPENDENT=dependent, ASM=ASM,
        num_warps=chosen["num_warps"], num_stages=chosen["num_stages"], **options,
    )  # fmt: skip
    strides = (
        q_BHD.stride(0), q_BHD.stride(1), k_BJD.stride(0), k_BJD.stride(1), v_BJD.stride(0), v_BJD.stride(1),
        _row_stride(cos), _row_stride(sin), pages_k.stride(0), pages_v.stride(0), table_BP.stride(0),
    )  # fmt: skip
    arguments = (q_BHD, k_BJD, v_BJD, cos, sin, bias, pages_k, pages_v, table_BP, length_B, y_BHD)
    part, tickets = y_BHD, length_B
    if count > 1:
        # The allocator's own and not nvfp4_workspace's: that would need its lock, which costs as much.
        part = torch.empty(rows * heads * count * (d + 2), dtype=torch.float32, device=q_BHD.device)
        tickets = flags(q_BHD.device, rows * heads_kv)
    launch((rows, heads_kv, count), *arguments, part, tickets, *strides)
    return y_BHD


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else 0


def write(k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor) -> None:
    """Launch the kernel of `qerl::paged_write`.

    Args:
        k_BJTD: [B, J, T, D], D contiguous, B and T >= 1.
        v_BJTD: [B, J, T, D], D contiguous.
        pages_k: [pages, J, PAGE, D], pages contiguous.
        pages_v: as pages_k.
        table_BP: int32 [B, P].
        length_B: int32 [B].
    """
    rows, heads_kv, positions, d = k_BJTD.shape
    padded = triton.next_power_of_2(d)
    tile = max(1, 4096 // padded)  # four 16-byte pieces of K and of V a thread in bf16
    launch = prepare(_write, D=d, DP=padded, PAGE=pages_k.shape[2], TILE=tile, num_warps=4)
    launch(
        (-(-positions // tile), heads_kv, rows), k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B,
        *k_BJTD.stride()[:3], *v_BJTD.stride()[:3], pages_k.stride(0), pages_v.stride(0), table_BP.stride(0),
    )  # fmt: skip
