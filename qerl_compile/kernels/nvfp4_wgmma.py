"""y = (x · Pᵀ) · decode_scale on Hopper: weights go from memory to tensor cores without a detour.

The two usual ways lose. Dequantizing W into shared memory for `wgmma` costs a store and a fence per weight and stays at
0.6 of cuBLAS; `mma.sync` fragments halve the tensor core's rate. Here W is the *A operand from registers*, so the tile
computed is yᵀ = W xᵀ: a warp group loads packed bytes (16 a thread and load), turns each word into four register pairs
with 13 integer and 4 multiply instructions, and feeds them to `wgmma` as they are. nvfp4_wgmma_layouts.py says how
every code comes to lie where the instruction reads it; nvfp4_permute.py brings x into the same order.

Three or two roles per CTA, as warp specialization: one or two *consumers* (a warp group each, with its own rows of W
and the same x) and a *producer* that keeps the copy engine (TMA) ahead of them, W further ahead than x because W comes
from DRAM and x from L2. A consumer decodes plane q + 1 while plane q is in the tensor core: it waits only for all but
the youngest `wgmma` group. (Waiting for all of them, or zeroing the accumulator inside a group's stage, makes ptxas put
a wait behind every single instruction; see docs/kernels.md.)

Work is split stream-K fashion: first `waves` whole tiles for each CTA, then an equal run of k tiles of what remains, so
216 tiles keep 132 multiprocessors busy to the end. A CTA that begins in the middle of a tile leaves a partial sum; the
CTA that began the tile adds the partial sums in fixed order and stores. Runs are therefore equal to the last bit. CTAs
are numbered backwards: an owner only ever waits for CTAs that were launched before it.

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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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

W_SMEM: gl.constexpr = gl.constexpr(CODES_SMEM)
XT_SMEM: gl.constexpr = gl.constexpr(X_SMEM)


@gluon.jit
def _scale_pair(words, BYTE: gl.constexpr):
    """One of the four E4M3 bytes of each word -> bf16x2, byte * 2^118 twice.

    An E4M3 byte shifted left by 4 reads as byte * 2^-120 in bfloat16, subnormals included; 2 * 119 - 120 = 118.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 c, t;
        mov.b32 c, 0x7B007B00;
        prmt.b32 t, $1, 0, """
        + BYTE
        + """;
        shl.b32 t, t, 4;
        mul.rn.bf16x2 t, t, c;
        mul.rn.bf16x2 $0, t, c;
        }
        """,
        "=r,r",
        [words],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _half_scales(words, HALF: gl.constexpr, ROWS: gl.constexpr):
    """[ROWS, 4] words -> [ROWS, 8] scale pairs of one half of the tile, in the order of its blocks."""
    if HALF == 0:
        pairs = gl.join(_scale_pair(words, "0x4040"), _scale_pair(words, "0x4141"))
    else:
        pairs = gl.join(_scale_pair(words, "0x4242"), _scale_pair(words, "0x4343"))
    return pairs.reshape([ROWS, 8])


@gluon.jit
def _plane(codes, scales, HIGH: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr):
    """codes [ROWS, 64] bytes, scales [ROWS, 8] -> A operand [ROWS, 64], bf16 code * scale * 2^-8, exact.

    Per word, two masks (0x000F000F, 0x00F000F0) pick two pairs of nibbles s|ee|m; a product with 2^12 + 2^6 or
    2^8 + 2^2 puts the sign at bit 15 and ee|m at bits 8..6, which reads as value * 2^-126 in bfloat16.
    """
    HALF: gl.constexpr = half(ROWS)
    HALF3: gl.constexpr = half_blocks(ROWS)
    s = gl.expand_dims(gl.convert_layout(scales, gl.SliceLayout(2, HALF3)), 2)
    s = gl.convert_layout(s, HALF3).broadcast_to([ROWS, 8, 8]).reshape([ROWS, 64])
    START: gl.constexpr = "shr.u32 v, $2, 8;" if HIGH else "mov.b32 v, $2;"
    p = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, v;
        """
        + START
        + """
        and.b32 a, v, 0x000F000F;
        mul.lo.u32 a, a, 0x1040;
        and.b32 a, a, 0x81C081C0;
        mul.rn.bf16x2 $0, a, $3;
        and.b32 a, v, 0x00F000F0;
        mul.lo.u32 a, a, 0x0104;
        and.b32 a, a, 0x81C081C0;
        mul.rn.bf16x2 $1, a, $3;
        }
        """,
        "=&r,=&r,r,r,r,r,r",
        [gl.convert_layout(codes, HALF), gl.convert_layout(s, HALF)],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )
    # rows (hi, g2, g0, g1, h), bytes (t, word, b1, b0) -> rows (hi, h, g2, g1, g0), positions (word, b1, t, b0)
    p = p.reshape([ROWS // 16, 2, 2, 2, 2, 4, 4, 2, 2]).permute([0, 4, 1, 3, 2, 6, 7, 5, 8])
    return gl.convert_layout(p.reshape([ROWS, 64]), a_operand(TOKENS))


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one in a ring, and the parity of its barrier. A division here would cost more than a copy."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _tile(
    scales, FIRST: gl.constexpr, acc, C: gl.constexpr, w_slot, w_phase, x_slot, x_phase,
    x_smem, w_smem, full_x, empty_x, full_w, empty_w,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """acc += one W tile (ROWS x 256) · xᵀ. On return the last plane is still in flight. Gives the rings' next slots."""
    mbarrier.wait(full_w.index(w_slot), w_phase)
    codes = w_smem.index(w_slot * CONSUMERS + C).load(codes_layout(ROWS))
    w0, w1 = gl.split(codes.reshape([ROWS, 4, 2, 16]).permute([0, 1, 3, 2]))
    for j in gl.static_range(4):
        if j < 2:
            a = _plane(w0.reshape([ROWS, 64]), _half_scales(scales, 0, ROWS), j == 1, TOKENS, ROWS)
        else:
            a = _plane(w1.reshape([ROWS, 64]), _half_scales(scales, 1, ROWS), j == 3, TOKENS, ROWS)
        if j % GROUP == 0:
            mbarrier.wait(full_x.index(x_slot), x_phase)
        plane_x = x_smem.index(x_slot).slice(j % GROUP * TOKENS, TOKENS, 0)
        acc = warpgroup_mma(a, plane_x.permute((1, 0)), acc, is_async=True)
        if not (FIRST and j == 0):
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            if j % GROUP == 0:  # the planes before this one are multiplied: give their slot back
                mbarrier.arrive(empty_x.index(gl.where(x_slot == 0, SLOTS_X - 1, x_slot - 1)), count=1)
        if j % GROUP == GROUP - 1:
            x_slot, x_phase = _next(x_slot, x_phase, SLOTS_X)
    # Only now: the last planes are in the tensor core, so the loads above have arrived in every warp. Given back right
    # after the loads, the slot was overwritten by the copy engine before a slow warp had read it.
    mbarrier.arrive(empty_w.index(w_slot), count=1)
    w_slot, w_phase = _next(w_slot, w_phase, SLOTS_W)
    return acc, w_slot, w_phase, x_slot, x_phase


@gluon.jit
def _scale_offsets(row0, tile_k, N, words_per_row, ROWS: gl.constexpr):
    SCALES: gl.constexpr = scales_layout(ROWS)
    row = gl.minimum(row0 + gl.arange(0, ROWS, gl.SliceLayout(1, SCALES)), N - 1)
    return row[:, None] * words_per_row + gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :] + tile_k * 4


@gluon.jit
def _consumer(
    C: gl.constexpr, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
    M, N, k_tiles, m_tiles, waves, units, stride_y,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = accumulator(TOKENS)
    PART: gl.constexpr = partial(TOKENS, ROWS)
    workers = gl.num_programs(0)
    worker = workers - 1 - gl.program_id(0)
    base = waves * workers  # tiles that are done whole
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    words = k_tiles * 4
    wave = 0
    w_slot, w_phase, x_slot, x_phase = 0, 0, 0, 0
    tile = gl.where(waves > 0, worker, base + unit // k_tiles)
    first_k = gl.where(waves > 0, 0, unit % k_tiles)
    row0 = (tile // m_tiles * CONSUMERS + C) * ROWS
    upcoming = gl.load(block_ptr + _scale_offsets(row0, first_k, N, words, ROWS))
    part = gl.arange(0, ROWS * TOKENS, PART).reshape([TOKENS // 8, ROWS, 8]).permute([1, 0, 2]).reshape([ROWS, TOKENS])
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
        here = _scale_offsets((tile // m_tiles * CONSUMERS + C) * ROWS, first_k, N, words, ROWS)
        there = _scale_offsets((next_tile // m_tiles * CONSUMERS + C) * ROWS, next_k, N, words, ROWS)

        scales = upcoming
        upcoming = gl.load(block_ptr + gl.where(n > 1, here + 4, there))
        acc = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, layout=ACC))
        acc, w_slot, w_phase, x_slot, x_phase = _tile(
            scales, True, acc, C, w_slot, w_phase, x_slot, x_phase, x_smem, w_smem, full_x, empty_x, full_w, empty_w,
            TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
        )  # fmt: skip
        for i in range(1, n):
            scales = upcoming
            upcoming = gl.load(block_ptr + gl.where(i + 1 < n, here + (i + 1) * 4, there))
            acc, w_slot, w_phase, x_slot, x_phase = _tile(
                scales, False, acc, C, w_slot, w_phase, x_slot, x_phase, x_smem, w_smem, full_x, empty_x, full_w,
                empty_w, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )  # fmt: skip
        out = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty_x.index(gl.where(x_slot == 0, SLOTS_X - 1, x_slot - 1)), count=1)

        if first_k > 0:  # the CTA that began this tile will finish it
            gl.store(part_ptr + (worker * CONSUMERS + C) * (ROWS * TOKENS) + part, out)
            gl.thread_barrier()
            gl.atomic_add(flag_ptr + tile * CONSUMERS + C, 1, sem="release")
        else:
            if n < k_tiles:
                last_worker = ((tile - base + 1) * k_tiles * workers - 1) // units
                helpers = last_worker - worker
                while gl.atomic_add(flag_ptr + tile * CONSUMERS + C, 0, sem="acquire") < helpers:
                    pass
                gl.thread_barrier()
                for w in range(worker + 1, last_worker + 1):
                    at = (w * CONSUMERS + C) * (ROWS * TOKENS)
                    out += gl.load(part_ptr + at + part, cache_modifier=".cg")
                gl.store(flag_ptr + tile * CONSUMERS + C, 0)
            out = out * (gl.load(decode_ptr) * 256.0)
            # rows (hi, h, g2, g1, g0) of the accumulator are rows (hi, g2, g0, g1, h) of W
            y = out.to(gl.bfloat16).reshape([ROWS // 16, 2, 2, 2, 2, TOKENS]).permute([0, 2, 4, 3, 1, 5])
            y = y.reshape([ROWS, TOKENS])
            Y: gl.constexpr = y.type.layout
            rows = (tile // m_tiles * CONSUMERS + C) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, Y))
            tokens = (tile % m_tiles) * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, Y))
            inside = (rows < N)[:, None] & (tokens < M)[None, :]
            gl.store(y_ptr + tokens[None, :] * stride_y + rows[:, None], y, mask=inside)
        unit = next_unit
        tile = next_tile
        first_k = next_k
        wave += 1


@gluon.jit
def _producer(
    x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, k_tiles, m_tiles, waves, units,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Walk the consumers' loop ahead of them. Its inner body is short on purpose: it is what bounds a small tile."""
    workers = gl.num_programs(0)
    worker = workers - 1 - gl.program_id(0)
    base = waves * workers
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    wave = 0
    w_slot, w_phase, x_slot, x_phase = 0, 1, 0, 1  # a fresh ring counts as given back
    early = True
    while (wave < waves) | (unit < last_unit):
        whole = wave < waves
        tile = gl.where(whole, wave * workers + worker, base + unit // k_tiles)
        first_k = gl.where(whole, 0, unit % k_tiles)
        n = gl.where(whole, k_tiles, gl.minimum(k_tiles - first_k, last_unit - unit))
        row = tile // m_tiles * (CONSUMERS * ROWS)
        column = first_k * 128
        x_row = (tile % m_tiles * k_tiles + first_k) * (4 * TOKENS)
        for _ in range(n):
            mbarrier.wait(empty_w.index(w_slot), w_phase)
            mbarrier.expect(full_w.index(w_slot), CONSUMERS * ROWS * 128)
            for c in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    w_desc, [row + c * ROWS, column], full_w.index(w_slot), w_smem.index(w_slot * CONSUMERS + c)
                )
            w_slot, w_phase = _next(w_slot, w_phase, SLOTS_W)
            column += 128
            if early:  # W does not depend on the kernel before this one; x does
                gdc_wait()
                early = False
            for _g in gl.static_range(4 // GROUP):
                mbarrier.wait(empty_x.index(x_slot), x_phase)
                mbarrier.expect(full_x.index(x_slot), GROUP * TOKENS * 128)
                tma.async_copy_global_to_shared(x_desc, [x_row, 0], full_x.index(x_slot), x_smem.index(x_slot))
                x_slot, x_phase = _next(x_slot, x_phase, SLOTS_X)
                x_row += GROUP * TOKENS
        unit = gl.where(whole, unit, unit + n)
        wave += 1


@gluon.jit(do_not_specialize=["M", "m_tiles", "waves", "units", "k_tiles"])
def kernel(
    x_desc, w_desc, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr, M, N, k_tiles, m_tiles, waves, units, stride_y,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One CTA of the persistent grid; see the module's docstring. x comes permuted (nvfp4_permute.py)."""
    gdc_launch_dependents()
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
                0, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
                M, N, k_tiles, m_tiles, waves, units, stride_y, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )),
            (_producer, (
                x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, k_tiles, m_tiles, waves, units,
                TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (
                0, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
                M, N, k_tiles, m_tiles, waves, units, stride_y, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )),
            (_consumer, (
                1, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
                M, N, k_tiles, m_tiles, waves, units, stride_y, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )),
            (_producer, (
                x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, k_tiles, m_tiles, waves, units,
                TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )),
        ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip
