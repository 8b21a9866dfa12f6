"""y = (x · Pᵀ) · decode_scale on Hopper: weights go from memory to tensor cores without a detour.

The two usual ways lose. Dequantizing W into shared memory for `wgmma` costs a store and a fence per weight and stays at
0.6 of cuBLAS; `mma.sync` fragments halve the tensor core's rate. Here W is the *A operand from registers*, so the tile
computed is yᵀ = W xᵀ: a warp group loads packed bytes (16 a thread and load), turns each word into four register pairs
with 13 integer and 4 multiply instructions, and feeds them to `wgmma` as they are. nvfp4_wgmma_layouts.py says how
every code comes to lie where the instruction reads it; nvfp4_permute.py brings x into the same order.

Three or two roles per CTA, as warp specialization: one or two *consumers* (a warp group each, with its own rows of W
and the same x) and a *producer* that keeps the copy engine (TMA) ahead of them: W a whole ring ahead at the start,
afterwards as far as the ring of x lets it. A consumer decodes plane q + 1 while plane q is in the tensor core: it waits
only for all but the youngest `wgmma` group. (Waiting for all of them, or zeroing the accumulator inside a group's
stage, makes ptxas put a wait behind every single instruction; see docs/kernels.md.)

Work is split stream-K fashion: first `waves` whole tiles for each CTA, then an equal run of k tiles of what remains, so
216 tiles keep 132 multiprocessors busy to the end. A CTA that begins in the middle of a tile leaves a partial sum; the
CTA that began the tile adds the partial sums in fixed order and stores. Runs are therefore equal to the last bit. CTAs
are numbered backwards: an owner only ever waits for CTAs that were launched before it. The counters that it waits on
lie behind the partial sums; the kernel that permutes x sets them to zero.

Epilogue: times decode_scale * 2^8, plus h · Bᵀ of a LoRA branch (nvfp4_wgmma_lora.py), rounded; plus a residual.

What it does not do: other architectures (compute capability 9.0 only), K not a multiple of 256, other activations than
bfloat16. dispatch.py sends those elsewhere.

Shape legend: N output features, K input features, M tokens.
"""

# Gluon compiles these functions from their source: annotations of their arguments other than constexpr are not read.
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportOptionalOperand=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qerl_compile.kernels.gluon_compat import (
    barrier,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from qerl_compile.kernels.nvfp4_arrival import await_x, fence_for_copy_engine
from qerl_compile.kernels.nvfp4_pairs import decode_pairs, scale_pair
from qerl_compile.kernels.nvfp4_persistent import next_slot, place
from qerl_compile.kernels.nvfp4_wgmma_layouts import (
    CODES_SMEM,
    X_SMEM,
    a_operand,
    accumulator,
    half,
    half_blocks,
    partial,
)
from qerl_compile.kernels.nvfp4_wgmma_layouts import (
    codes as codes_layout,
)
from qerl_compile.kernels.nvfp4_wgmma_layouts import (
    scales as scales_layout,
)
from qerl_compile.kernels.nvfp4_wgmma_lora import add_lora

W_SMEM: gl.constexpr = gl.constexpr(CODES_SMEM)
XT_SMEM: gl.constexpr = gl.constexpr(X_SMEM)


@gluon.jit
def _scale_pair(words, BYTE: gl.constexpr):
    """One of the four E4M3 bytes of each word -> bf16x2, byte * 2^118 twice."""
    return gl.inline_asm_elementwise(scale_pair(BYTE, False), "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _half_scales(words, HALF: gl.constexpr):
    """[64, 4] words -> [64, 8] scale pairs of one half of the tile, in the order of its blocks."""
    if HALF == 0:
        pairs = gl.join(_scale_pair(words, 0), _scale_pair(words, 1))
    else:
        pairs = gl.join(_scale_pair(words, 2), _scale_pair(words, 3))
    return pairs.reshape([64, 8])


@gluon.jit
def _plane(codes, scales, HIGH: gl.constexpr, TOKENS: gl.constexpr):
    """codes [64, 64] bytes, scales [64, 8] -> A operand [64, 64], bf16 code * scale * 2^-8, exact."""
    HALF: gl.constexpr = half()
    HALF3: gl.constexpr = half_blocks()
    s = gl.expand_dims(gl.convert_layout(scales, gl.SliceLayout(2, HALF3)), 2)
    s = gl.convert_layout(s, HALF3).broadcast_to([64, 8, 8]).reshape([64, 64])
    p = gl.inline_asm_elementwise(
        decode_pairs(HIGH, "$3", False),
        "=&r,=&r,r,r,r,r,r",
        [gl.convert_layout(codes, HALF), gl.convert_layout(s, HALF)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )
    # rows (hi, g2, g0, g1, h), bytes (t, word, b1, b0) -> rows (hi, h, g2, g1, g0), positions (word, b1, t, b0)
    p = p.reshape([4, 2, 2, 2, 2, 4, 4, 2, 2]).permute([0, 4, 1, 3, 2, 6, 7, 5, 8])
    return gl.convert_layout(p.reshape([64, 64]), a_operand(TOKENS))


@gluon.jit
def _half_codes(w_smem, H: gl.constexpr, J: gl.constexpr):
    """Of the H-th 64 rows, the bytes of planes J and J + 1: 16 of a lane's 32. (The other loads are dead code.)"""
    codes = w_smem.slice(H * 64, 64, 0).load(codes_layout())
    first, second = gl.split(codes.reshape([64, 4, 2, 16]).permute([0, 1, 3, 2]))
    return (first if J == 0 else second).reshape([64, 64])


@gluon.jit
def _tile(
    scales0, scales1, FIRST: gl.constexpr, acc0, acc1, C: gl.constexpr, w_slot, w_phase, x_slot, x_phase,
    x_smem, w_smem, full_x, empty_x, full_w, empty_w,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """acc += one W tile (ROWS x 256) · xᵀ. On return the last group is still in flight. Gives the rings' next slots."""
    mbarrier.wait(full_w.index(w_slot), w_phase)
    for j in gl.static_range(4):
        if j % 2 == 0:
            codes0 = _half_codes(w_smem.index(w_slot * CONSUMERS + C), 0, j)
            if ROWS == 128:
                codes1 = _half_codes(w_smem.index(w_slot * CONSUMERS + C), 1, j)
        a = _plane(codes0, _half_scales(scales0, j // 2), j % 2 == 1, TOKENS)
        if j % GROUP == 0:
            mbarrier.wait(full_x.index(x_slot), x_phase)
        plane_x = x_smem.index(x_slot).slice(j % GROUP * TOKENS, TOKENS, 0).permute((1, 0))
        acc0 = warpgroup_mma(a, plane_x, acc0, is_async=True)
        if not (FIRST and j == 0):
            acc0, acc1 = _wait(1, acc0, acc1, ROWS)
            if j % GROUP == 0:  # the planes before this one are multiplied: give their slot back
                mbarrier.arrive(empty_x.index(gl.where(x_slot == 0, SLOTS_X - 1, x_slot - 1)), count=1)
        if ROWS == 128:
            a = _plane(codes1, _half_scales(scales1, j // 2), j % 2 == 1, TOKENS)
            acc1 = warpgroup_mma(a, plane_x, acc1, is_async=True)
            acc0, acc1 = _wait(1, acc0, acc1, ROWS)
        if j % GROUP == GROUP - 1:
            x_slot, x_phase = next_slot(x_slot, x_phase, SLOTS_X)
    # Only now: the last planes are in the tensor core, so the loads above have arrived in every warp. Given back right
    # after the loads, the slot was overwritten by the copy engine before a slow warp had read it.
    mbarrier.arrive(empty_w.index(w_slot), count=1)
    w_slot, w_phase = next_slot(w_slot, w_phase, SLOTS_W)
    return acc0, acc1, w_slot, w_phase, x_slot, x_phase


@gluon.jit
def _wait(RUNNING: gl.constexpr, acc0, acc1, ROWS: gl.constexpr):
    """Let all groups but the RUNNING youngest end. acc1 is used with 128 rows only."""
    if ROWS == 128:
        acc0, acc1 = warpgroup_mma_wait(RUNNING, deps=[acc0, acc1])
        return warpgroup_mma_init(acc0), warpgroup_mma_init(acc1)
    else:
        return warpgroup_mma_init(warpgroup_mma_wait(RUNNING, deps=[acc0])), acc1


@gluon.jit
def _scale_offsets(row0, tile_k, N, words_per_row):
    SCALES: gl.constexpr = scales_layout()
    row = gl.minimum(row0 + gl.arange(0, 64, gl.SliceLayout(1, SCALES)), N - 1)
    return row[:, None] * words_per_row + gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :] + tile_k * 4


@gluon.jit
def _scale_words(block_ptr, at0, at1, ROWS: gl.constexpr):
    """Of 64 rows, and of the 64 below if the tile has them."""
    words0 = gl.load(block_ptr + at0)
    return words0, gl.load(block_ptr + at1) if ROWS == 128 else words0


@gluon.jit
def _write(
    out, row0, token0, decode, y_ptr, h_ptr, lora_ptr, residual_ptr,
    M, N, stride_y, stride_h, stride_lora, stride_residual,
    TOKENS: gl.constexpr, RANK: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """64 rows of sums -> y."""
    out = out * decode
    if RANK > 0:
        out = add_lora(out, h_ptr, lora_ptr, token0, row0, M, N, stride_h, stride_lora, TOKENS, RANK)
    # rows (hi, h, g2, g1, g0) of the accumulator are rows (hi, g2, g0, g1, h) of W
    y = out.to(gl.bfloat16).reshape([4, 2, 2, 2, 2, TOKENS]).permute([0, 2, 4, 3, 1, 5]).reshape([64, TOKENS])
    Y: gl.constexpr = y.type.layout
    rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, Y))
    tokens = token0 + gl.arange(0, TOKENS, gl.SliceLayout(0, Y))
    inside = (rows < N)[:, None] & (tokens < M)[None, :]
    if RESIDUAL:  # y is rounded first, as where the sum is a kernel of its own
        at = residual_ptr + tokens[None, :] * stride_residual + rows[:, None]
        y = (y.to(gl.float32) + gl.load(at, mask=inside, other=0.0).to(gl.float32)).to(gl.bfloat16)
    gl.store(y_ptr + tokens[None, :] * stride_y + rows[:, None], y, mask=inside)


@gluon.jit
def _consumer(
    C: gl.constexpr, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr,
    h_ptr, lora_ptr, residual_ptr, M, N, k_tiles, m_tiles, groups, waves, units,
    stride_y, stride_h, stride_lora, stride_residual,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr, DEPENDENT: gl.constexpr, RANK: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = accumulator(TOKENS)
    PART: gl.constexpr = partial(TOKENS)
    worker, workers, member = place(groups)
    base = waves * workers  # tiles that are done whole
    block_ptr = block_ptr.to(gl.pointer_type(gl.int32), bitcast=True)  # four scales a word
    flag_ptr = (part_ptr + gl.num_programs(0) * (CONSUMERS * ROWS * TOKENS)).to(gl.pointer_type(gl.int32), bitcast=True)
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    words = k_tiles * 4
    wave = 0
    w_slot, w_phase, x_slot, x_phase = 0, 0, 0, 0
    tile = gl.where(waves > 0, worker, base + unit // k_tiles)
    first_k = gl.where(waves > 0, 0, unit % k_tiles)
    row0 = (tile // m_tiles * CONSUMERS + C) * ROWS
    upcoming0, upcoming1 = _scale_words(
        block_ptr, _scale_offsets(row0, first_k, N, words), _scale_offsets(row0 + 64, first_k, N, words), ROWS
    )
    part = gl.arange(0, 64 * TOKENS, PART).reshape([TOKENS // 8, 64, 8]).permute([1, 0, 2]).reshape([64, TOKENS])
    part = gl.convert_layout(part, ACC)
    while (wave < waves) | (unit < last_unit):
        whole = wave < waves
        n = gl.where(whole, k_tiles, gl.minimum(k_tiles - first_k, last_unit - unit))
        # where the next run starts: its first scales are asked for while this one ends
        next_unit = gl.where(whole, unit, unit + n)
        next_whole = (wave + 1) < waves
        more = next_whole | (next_unit < last_unit)
        next_tile = gl.where(next_whole, (wave + 1) * workers + worker, base + next_unit // k_tiles)
        next_tile = gl.where(more, next_tile, tile)
        next_k = gl.where(next_whole | (more == 0), 0, next_unit % k_tiles)
        row0 = (tile // m_tiles * CONSUMERS + C) * ROWS
        next_row0 = (next_tile // m_tiles * CONSUMERS + C) * ROWS
        here0 = _scale_offsets(row0, first_k, N, words)
        here1 = _scale_offsets(row0 + 64, first_k, N, words)
        there0 = _scale_offsets(next_row0, next_k, N, words)
        there1 = _scale_offsets(next_row0 + 64, next_k, N, words)

        scales0, scales1 = upcoming0, upcoming1
        at0, at1 = gl.where(n > 1, here0 + 4, there0), gl.where(n > 1, here1 + 4, there1)
        upcoming0, upcoming1 = _scale_words(block_ptr, at0, at1, ROWS)
        acc0 = warpgroup_mma_init(gl.zeros([64, TOKENS], gl.float32, layout=ACC))
        acc1 = warpgroup_mma_init(gl.zeros([64, TOKENS], gl.float32, layout=ACC)) if ROWS == 128 else 0
        acc0, acc1, w_slot, w_phase, x_slot, x_phase = _tile(
            scales0, scales1, True, acc0, acc1, C, w_slot, w_phase, x_slot, x_phase, x_smem, w_smem, full_x, empty_x,
            full_w, empty_w, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
        )  # fmt: skip
        for i in range(1, n):
            scales0, scales1 = upcoming0, upcoming1
            ahead = (i + 1) * 4
            at0, at1 = gl.where(i + 1 < n, here0 + ahead, there0), gl.where(i + 1 < n, here1 + ahead, there1)
            upcoming0, upcoming1 = _scale_words(block_ptr, at0, at1, ROWS)
            acc0, acc1, w_slot, w_phase, x_slot, x_phase = _tile(
                scales0, scales1, False, acc0, acc1, C, w_slot, w_phase, x_slot, x_phase, x_smem, w_smem, full_x,
                empty_x, full_w, empty_w, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )  # fmt: skip
        if ROWS == 128:
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        mbarrier.arrive(empty_x.index(gl.where(x_slot == 0, SLOTS_X - 1, x_slot - 1)), count=1)

        flag = flag_ptr + ((tile - base) * groups + member) * CONSUMERS + C
        if first_k > 0:  # the CTA that began this tile will finish it
            at = part_ptr + ((worker * groups + member) * CONSUMERS + C) * (ROWS * TOKENS) + part
            gl.store(at, acc0)
            if ROWS == 128:
                gl.store(at + 64 * TOKENS, acc1)
            barrier()
            gl.atomic_add(flag, 1, sem="release")
        else:
            if n < k_tiles:
                last_worker = ((tile - base + 1) * k_tiles * workers - 1) // units
                helpers = last_worker - worker
                while gl.atomic_add(flag, 0, sem="acquire") < helpers:
                    pass
                barrier()
                for w in range(worker + 1, last_worker + 1):
                    at = part_ptr + ((w * groups + member) * CONSUMERS + C) * (ROWS * TOKENS) + part
                    acc0 += gl.load(at, cache_modifier=".cg")
                    if ROWS == 128:
                        acc1 += gl.load(at + 64 * TOKENS, cache_modifier=".cg")
            if DEPENDENT > 0:
                gdc_wait()  # where the producer went by a count (lead_in.py); over at once where it waited itself
            decode = gl.load(decode_ptr) * 256.0
            token0 = (tile % m_tiles * groups + member) * TOKENS
            _write(
                acc0, row0, token0, decode, y_ptr, h_ptr, lora_ptr, residual_ptr,
                M, N, stride_y, stride_h, stride_lora, stride_residual, TOKENS, RANK, RESIDUAL,
            )  # fmt: skip
            if ROWS == 128:
                _write(
                    acc1, row0 + 64, token0, decode, y_ptr, h_ptr, lora_ptr, residual_ptr,
                    M, N, stride_y, stride_h, stride_lora, stride_residual, TOKENS, RANK, RESIDUAL,
                )  # fmt: skip
        unit = next_unit
        tile = next_tile
        first_k = next_k
        wave += 1


@gluon.jit
def _fetch_w(
    w_desc, w_smem, full_w, empty_w, w_slot, w_phase, row, column,
    ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr,
):  # fmt: skip
    mbarrier.wait(empty_w.index(w_slot), w_phase)
    mbarrier.expect(full_w.index(w_slot), CONSUMERS * ROWS * 128)
    for c in gl.static_range(CONSUMERS):
        tma_load(w_desc, [row + c * ROWS, column], full_w.index(w_slot), w_smem.index(w_slot * CONSUMERS + c))
    return next_slot(w_slot, w_phase, SLOTS_W)


@gluon.jit
def _producer(
    x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, arrival_ptr, arrival_at, arriving,
    k_tiles, m_tiles, groups, waves, units,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Walk the consumers' loop ahead of them. Its inner body is short on purpose: it is what bounds a small tile."""
    worker, workers, member = place(groups)
    base = waves * workers
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    wave = 0
    w_slot, w_phase, x_slot, x_phase = 0, 1, 0, 1  # a fresh ring counts as given back
    fetched = 0  # weight tiles of this run that are on their way already
    if DEPENDENT > 0:
        # W does not depend on the kernel before this one, x does: fill the ring with weights, then wait. Everything
        # that consumers touch besides W and h they touch after x has arrived, so this one wait orders all of it.
        tile = gl.where(waves > 0, worker, base + unit // k_tiles)
        first_k = gl.where(waves > 0, 0, unit % k_tiles)
        n = gl.where(waves > 0, k_tiles, gl.minimum(k_tiles - first_k, last_unit - unit))
        row = tile // m_tiles * (CONSUMERS * ROWS)
        fetched = gl.minimum(n, SLOTS_W)
        for i in range(0, fetched):
            w_slot, w_phase = _fetch_w(
                w_desc, w_smem, full_w, empty_w, w_slot, w_phase, row, (first_k + i) * 128, ROWS, CONSUMERS, SLOTS_W
            )
        await_x(arrival_ptr, arrival_at, arriving)
        fence_for_copy_engine()
        if DEPENDENT == 1:
            gdc_launch_dependents()
    while (wave < waves) | (unit < last_unit):
        whole = wave < waves
        tile = gl.where(whole, wave * workers + worker, base + unit // k_tiles)
        first_k = gl.where(whole, 0, unit % k_tiles)
        n = gl.where(whole, k_tiles, gl.minimum(k_tiles - first_k, last_unit - unit))
        row = tile // m_tiles * (CONSUMERS * ROWS)
        column = first_k * 128
        x_row = ((tile % m_tiles * groups + member) * k_tiles + first_k) * (4 * TOKENS)
        for i in range(0, n):
            if i >= fetched:
                w_slot, w_phase = _fetch_w(
                    w_desc, w_smem, full_w, empty_w, w_slot, w_phase, row, column, ROWS, CONSUMERS, SLOTS_W
                )
            column += 128
            for _g in gl.static_range(4 // GROUP):
                mbarrier.wait(empty_x.index(x_slot), x_phase)
                mbarrier.expect(full_x.index(x_slot), GROUP * TOKENS * 128)
                tma_load(x_desc, [x_row, 0], full_x.index(x_slot), x_smem.index(x_slot))
                x_slot, x_phase = next_slot(x_slot, x_phase, SLOTS_X)
                x_row += GROUP * TOKENS
        fetched = 0
        unit = gl.where(whole, unit, unit + n)
        wave += 1
    if DEPENDENT == 3:
        gdc_launch_dependents()  # nothing is left to load: let the next kernel's launch overlap the last products


@gluon.jit(do_not_specialize=["M", "m_tiles", "groups", "waves", "units", "k_tiles", "arrival_at", "arriving"])
def kernel(
    x_desc, w_desc, block_ptr, decode_ptr, y_ptr, part_ptr, h_ptr, lora_ptr, residual_ptr,
    arrival_ptr, arrival_at, arriving, M, N, k_tiles, m_tiles, groups, waves, units,
    stride_y, stride_h, stride_lora, stride_residual,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, DEPENDENT: gl.constexpr, RANK: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """One CTA of the persistent grid; see the module's docstring. x comes permuted. RANK 0: no LoRA."""
    w_smem = gl.allocate_shared_memory(gl.uint8, [SLOTS_W * CONSUMERS, ROWS, 128], W_SMEM)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS_X, GROUP * TOKENS, 64], XT_SMEM)
    full_w = gl.allocate_shared_memory(gl.int64, [SLOTS_W, 1], mbarrier.MBarrierLayout())
    empty_w = gl.allocate_shared_memory(gl.int64, [SLOTS_W, 1], mbarrier.MBarrierLayout())
    full_x = gl.allocate_shared_memory(gl.int64, [SLOTS_X, 1], mbarrier.MBarrierLayout())
    empty_x = gl.allocate_shared_memory(gl.int64, [SLOTS_X, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS_W):
        mbarrier.init(full_w.index(i), count=1)
        mbarrier.init(empty_w.index(i), count=CONSUMERS)
    for i in gl.static_range(SLOTS_X):
        mbarrier.init(full_x.index(i), count=1)
        mbarrier.init(empty_x.index(i), count=CONSUMERS)
    fence_async_shared()
    # The argument lists are written out: a tuple with layouts in it cannot be given a name in device code.
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consumer, (
                0, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr,
                h_ptr, lora_ptr, residual_ptr, M, N, k_tiles, m_tiles, groups, waves, units,
                stride_y, stride_h, stride_lora, stride_residual,
                TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP, DEPENDENT, RANK, RESIDUAL,
            )),
            (_producer, (
                x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, arrival_ptr, arrival_at, arriving,
                k_tiles, m_tiles, groups, waves, units, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP, DEPENDENT,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (
                0, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr,
                h_ptr, lora_ptr, residual_ptr, M, N, k_tiles, m_tiles, groups, waves, units,
                stride_y, stride_h, stride_lora, stride_residual,
                TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP, DEPENDENT, RANK, RESIDUAL,
            )),
            (_consumer, (
                1, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr,
                h_ptr, lora_ptr, residual_ptr, M, N, k_tiles, m_tiles, groups, waves, units,
                stride_y, stride_h, stride_lora, stride_residual,
                TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP, DEPENDENT, RANK, RESIDUAL,
            )),
            (_producer, (
                x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, arrival_ptr, arrival_at, arriving,
                k_tiles, m_tiles, groups, waves, units, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP, DEPENDENT,
            )),
        ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip
