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
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false

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
def _plane(codes, scales, HIGH: gl.constexpr, ROWS: gl.constexpr, HALF: gl.constexpr, HALF3: gl.constexpr, A_DOT: gl.constexpr):  # noqa: E501
    """codes [ROWS, 64] bytes, scales [ROWS, 8] -> A operand [ROWS, 64], bf16 code * scale * 2^-8, exact.

    Per word, two masks (0x000F000F, 0x00F000F0) pick two pairs of nibbles s|ee|m; a product with 2^12 + 2^6 or
    2^8 + 2^2 puts the sign at bit 15 and ee|m at bits 8..6, which reads as value * 2^-126 in bfloat16.
    """
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
    return gl.convert_layout(p.reshape([ROWS, 64]), A_DOT)


@gluon.jit
def _wait_x(q, full_x, SLOTS_X: gl.constexpr, GROUP: gl.constexpr):
    g = q // GROUP
    mbarrier.wait(full_x.index(g % (SLOTS_X // GROUP)), (g // (SLOTS_X // GROUP)) & 1)


@gluon.jit
def _release_x(q, empty_x, SLOTS_X: gl.constexpr, GROUP: gl.constexpr):
    """Every plane before q has been multiplied: give back the group of x that ends there."""
    mbarrier.arrive(empty_x.index((q // GROUP - 1) % (SLOTS_X // GROUP)), count=1)


@gluon.jit
def _tile(
    it, scales, FIRST: gl.constexpr, acc, C: gl.constexpr, x_smem, w_smem, full_x, empty_x, full_w, empty_w,
    CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
    A_DOT: gl.constexpr, CODES: gl.constexpr, HALF: gl.constexpr, HALF3: gl.constexpr,
):  # fmt: skip
    """acc += W tile `it` (ROWS x 256) · xᵀ; on return the last plane is still in flight, unless it is the only one."""
    slot = it % SLOTS_W
    mbarrier.wait(full_w.index(slot), (it // SLOTS_W) & 1)
    codes = w_smem.index(slot * CONSUMERS + C).load(CODES)
    mbarrier.arrive(empty_w.index(slot), count=1)
    w0, w1 = gl.split(codes.reshape([ROWS, 4, 2, 16]).permute([0, 1, 3, 2]))
    for j in gl.static_range(4):
        if j < 2:
            a = _plane(w0.reshape([ROWS, 64]), _half_scales(scales, 0, ROWS), j == 1, ROWS, HALF, HALF3, A_DOT)
        else:
            a = _plane(w1.reshape([ROWS, 64]), _half_scales(scales, 1, ROWS), j == 3, ROWS, HALF, HALF3, A_DOT)
        q = it * 4 + j
        if j % GROUP == 0:
            _wait_x(q, full_x, SLOTS_X, GROUP)
        acc = warpgroup_mma(a, x_smem.index(q % SLOTS_X).permute((1, 0)), acc, is_async=True)
        if not (FIRST and j == 0):
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            if j % GROUP == 0:
                _release_x(q, empty_x, SLOTS_X, GROUP)
    return acc


@gluon.jit
def _scale_offsets(row0, tile_k, N, words_per_row, ROWS: gl.constexpr, SCALES: gl.constexpr):
    row = gl.minimum(row0 + gl.arange(0, ROWS, gl.SliceLayout(1, SCALES)), N - 1)
    return row[:, None] * words_per_row + gl.arange(0, 4, gl.SliceLayout(0, SCALES))[None, :] + tile_k * 4


@gluon.jit
def _consumer(
    C: gl.constexpr, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
    M, N, k_tiles, m_tiles, waves, units, stride_y,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr, ACC: gl.constexpr, A_DOT: gl.constexpr, CODES: gl.constexpr, SCALES: gl.constexpr,
    HALF: gl.constexpr, HALF3: gl.constexpr,
):  # fmt: skip
    workers = gl.num_programs(0)
    worker = workers - 1 - gl.program_id(0)
    base = waves * workers  # tiles that are done whole
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    words = k_tiles * 4
    wave = 0
    it = 0
    tile = gl.where(waves > 0, worker, base + unit // k_tiles)
    first_k = gl.where(waves > 0, 0, unit % k_tiles)
    row0 = (tile // m_tiles * CONSUMERS + C) * ROWS
    upcoming = gl.load(block_ptr + _scale_offsets(row0, first_k, N, words, ROWS, SCALES))
    # partial sums lie as [TOKENS / 8, ROWS, 8]: 256 contiguous bytes per warp and access
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    col = gl.arange(0, TOKENS, gl.SliceLayout(0, ACC))
    part = row[:, None] * 8 + (col & 7)[None, :] + ((col >> 3) * (ROWS * 8))[None, :]
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
        here = _scale_offsets((tile // m_tiles * CONSUMERS + C) * ROWS, first_k, N, words, ROWS, SCALES)
        there = _scale_offsets((next_tile // m_tiles * CONSUMERS + C) * ROWS, next_k, N, words, ROWS, SCALES)

        scales = upcoming
        upcoming = gl.load(block_ptr + gl.where(n > 1, here + 4, there))
        acc = warpgroup_mma_init(gl.zeros([ROWS, TOKENS], gl.float32, layout=ACC))
        acc = _tile(
            it, scales, True, acc, C, x_smem, w_smem, full_x, empty_x, full_w, empty_w, CONSUMERS, SLOTS_W, SLOTS_X,
            GROUP, ROWS, A_DOT, CODES, HALF, HALF3,
        )  # fmt: skip
        for i in range(1, n):
            scales = upcoming
            upcoming = gl.load(block_ptr + gl.where(i + 1 < n, here + (i + 1) * 4, there))
            acc = _tile(
                it + i, scales, False, acc, C, x_smem, w_smem, full_x, empty_x, full_w, empty_w, CONSUMERS, SLOTS_W,
                SLOTS_X, GROUP, ROWS, A_DOT, CODES, HALF, HALF3,
            )  # fmt: skip
        out = warpgroup_mma_wait(0, deps=[acc])
        it += n
        _release_x(it * 4, empty_x, SLOTS_X, GROUP)

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
def _advance(tile, k, wave, waves, k_tiles, workers, worker, shared_tile, shared_k):
    """The k tile after (tile, k) in the order of the consumers' loop."""
    done = k + 1 == k_tiles
    whole = wave < waves
    wave = gl.where(whole & done, wave + 1, wave)
    enters_shared = whole & done & (wave >= waves)
    tile = gl.where(done, gl.where(wave < waves, wave * workers + worker, tile + 1), tile)
    k = gl.where(done, 0, k + 1)
    return gl.where(enters_shared, shared_tile, tile), gl.where(enters_shared, shared_k, k), wave


@gluon.jit
def _producer(
    x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, k_tiles, m_tiles, waves, units,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    workers = gl.num_programs(0)
    worker = workers - 1 - gl.program_id(0)
    unit = (worker * units) // workers
    total = waves * k_tiles + ((worker + 1) * units) // workers - unit
    shared_tile = waves * workers + unit // k_tiles
    shared_k = unit % k_tiles
    tile = gl.where(waves > 0, worker, shared_tile)
    k = gl.where(waves > 0, 0, shared_k)
    wave = 0
    ahead_tile, ahead_k, ahead_wave = tile, k, wave
    AHEAD: gl.constexpr = SLOTS_W - 1
    SLOTS_G: gl.constexpr = SLOTS_X // GROUP
    for step in range(0, total + AHEAD):
        if step < total:
            slot = step % SLOTS_W
            mbarrier.wait(empty_w.index(slot), ((step // SLOTS_W) & 1) ^ 1)
            mbarrier.expect(full_w.index(slot), CONSUMERS * ROWS * 128)
            for c in gl.static_range(CONSUMERS):
                row = (ahead_tile // m_tiles * CONSUMERS + c) * ROWS
                tma.async_copy_global_to_shared(
                    w_desc, [row, ahead_k * 128], full_w.index(slot), w_smem.index(slot * CONSUMERS + c)
                )
            ahead_tile, ahead_k, ahead_wave = _advance(
                ahead_tile, ahead_k, ahead_wave, waves, k_tiles, workers, worker, shared_tile, shared_k
            )
        if step == AHEAD:
            gdc_wait()  # W does not depend on the kernel before this one; x does
        if step >= AHEAD:
            it = step - AHEAD
            for j in gl.static_range(4):
                q = it * 4 + j
                g = q // GROUP
                if j % GROUP == 0:
                    mbarrier.wait(empty_x.index(g % SLOTS_G), ((g // SLOTS_G) & 1) ^ 1)
                    mbarrier.expect(full_x.index(g % SLOTS_G), TOKENS * 128 * GROUP)
                tma.async_copy_global_to_shared(
                    x_desc, [(tile % m_tiles) * TOKENS, k * 256 + j * 64], full_x.index(g % SLOTS_G),
                    x_smem.index(q % SLOTS_X),
                )  # fmt: skip
            tile, k, wave = _advance(tile, k, wave, waves, k_tiles, workers, worker, shared_tile, shared_k)


@gluon.jit(do_not_specialize=["M", "m_tiles", "waves", "units", "k_tiles"])
def kernel(
    x_desc, w_desc, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr, M, N, k_tiles, m_tiles, waves, units, stride_y,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS_W: gl.constexpr, SLOTS_X: gl.constexpr,
    GROUP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, ACC: gl.constexpr, A_DOT: gl.constexpr,
    CODES: gl.constexpr, SCALES: gl.constexpr, HALF: gl.constexpr, HALF3: gl.constexpr, CODES_SMEM: gl.constexpr,
    X_SMEM: gl.constexpr,
):  # fmt: skip
    """One CTA of the persistent grid; see the module's docstring. x comes permuted (nvfp4_permute.py)."""
    gdc_launch_dependents()
    w_smem = gl.allocate_shared_memory(gl.uint8, [SLOTS_W * CONSUMERS, ROWS, 128], CODES_SMEM)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS_X, TOKENS, 64], X_SMEM)
    SLOTS_G: gl.constexpr = SLOTS_X // GROUP
    full_w = gl.allocate_shared_memory(gl.int64, [SLOTS_W, 1], mbarrier.MBarrierLayout())
    empty_w = gl.allocate_shared_memory(gl.int64, [SLOTS_W, 1], mbarrier.MBarrierLayout())
    full_x = gl.allocate_shared_memory(gl.int64, [SLOTS_G, 1], mbarrier.MBarrierLayout())
    empty_x = gl.allocate_shared_memory(gl.int64, [SLOTS_G, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS_W):
        mbarrier.init(full_w.index(i), count=1)
        mbarrier.init(empty_w.index(i), count=CONSUMERS)
    for i in gl.static_range(SLOTS_G):
        mbarrier.init(full_x.index(i), count=1)
        mbarrier.init(empty_x.index(i), count=CONSUMERS)
    fence_async_shared()
    # The argument lists are written out: a tuple with layouts in it cannot be given a name in device code.
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consumer, (
                0, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
                M, N, k_tiles, m_tiles, waves, units, stride_y, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
                ACC, A_DOT, CODES, SCALES, HALF, HALF3,
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
                ACC, A_DOT, CODES, SCALES, HALF, HALF3,
            )),
            (_consumer, (
                1, x_smem, w_smem, full_x, empty_x, full_w, empty_w, block_ptr, decode_ptr, y_ptr, part_ptr, flag_ptr,
                M, N, k_tiles, m_tiles, waves, units, stride_y, TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
                ACC, A_DOT, CODES, SCALES, HALF, HALF3,
            )),
            (_producer, (
                x_desc, w_desc, x_smem, w_smem, full_x, empty_x, full_w, empty_w, k_tiles, m_tiles, waves, units,
                TOKENS, ROWS, CONSUMERS, SLOTS_W, SLOTS_X, GROUP,
            )),
        ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip
