"""dx = (dy · P) · decode_scale on Hopper, from the packed weight of the forward: no second copy, no transposed copy.

The scheme is that of nvfp4_wgmma.py with the weight's other side summed: the tile computed is dxᵀ = Wᵀ dyᵀ, W is the
A operand from registers, dy is B from shared memory. `ldmatrix.trans` hands every thread pairs (n, n + 1) of codes, so
decoding costs 17 instructions for 8 weights and no shuffles (nvfp4_wgmma_dx_layouts.py says why), and since positions
are rows n in their own order, dy goes in unpermuted: a call is one launch.

What differs from the forward is the scales. A thread there has 16 weights under one scale, here 4, and the scales it
needs are single bytes of 16 rows: loading and decoding them would cost about one instruction a weight. So a role of its
own decodes every scale once, and lays it in shared memory where a thread finds its sixteen with two vector loads.

Four roles per CTA: two *consumers* (a warp group each, 128 columns each, same dy), a *scale role* of two warps, and a
*producer* that keeps the copy engine ahead. One ring of slots carries everything; a slot holds STEPS x 64 rows of W,
their scales (as they came and decoded) and the same columns of dy. Three barriers per slot: `full` (copied), `ready`
(scales decoded), `empty` (multiplied). A consumer has two accumulators, for codes 0, 1 and 2, 3 of every four columns:
while one group of `wgmma` runs, the next A operand is decoded, and it waits only for all but the youngest group.

What balances. Per 64 rows and 256 columns the tensor core needs 8 * tokens cycles, decoding 2.75 instructions a weight,
350 issue slots of each scheduler, and the memory some 540 cycles (9 KiB at 4 TB/s over 132 multiprocessors). So 64
tokens sit where all three meet, and from 128 on the tensor core is what is busy. 128 tokens are the most that two
accumulators leave registers for.

Work is split as in the forward: whole tiles first, then equal runs of the rest; who begins a tile adds what the
others leave, in fixed order, so runs are equal to the last bit, and it waits only for CTAs launched before it. With
several tiles of tokens CTAs form `groups`, each with its own tiles of tokens: neighbours, one of each group, walk the
same weights at the same time, and memory is read once where it would be read once per tile of tokens.

What it does not do: other architectures, K not a multiple of 256 (scales come in 16-byte rows), N not a multiple of 8
(rows of dy), other gradients than bfloat16. Rows beyond N and tokens beyond M are filled with zeros by the copy engine.

Shape legend: N output features of the forward (summed here), K input features (columns of W and dx), M tokens.
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
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from qerl_compile.kernels.nvfp4_pairs import decode_pairs
from qerl_compile.kernels.nvfp4_persistent import next_slot, place
from qerl_compile.kernels.nvfp4_wgmma_dx_layouts import (
    CODES_SMEM,
    DY_SMEM,
    RAW_SMEM,
    SCALES_SMEM,
    a_operand,
    accumulator,
    block_units,
    columns_first,
    raw_scales,
)
from qerl_compile.kernels.nvfp4_wgmma_dx_layouts import (
    codes as codes_layout,
)
from qerl_compile.kernels.nvfp4_wgmma_dx_layouts import (
    scales as scales_layout,
)

W_SMEM: gl.constexpr = gl.constexpr(CODES_SMEM)
DYT_SMEM: gl.constexpr = gl.constexpr(DY_SMEM)
BYTES_SMEM: gl.constexpr = gl.constexpr(RAW_SMEM)
S_SMEM: gl.constexpr = gl.constexpr(SCALES_SMEM)


@gluon.jit
def _plane(codes, scales, HIGH: gl.constexpr, TOKENS: gl.constexpr):
    """Codes 2 HIGH and 2 HIGH + 1 of every unit -> A operand [64 columns, 64 n], bf16 code * scale * 2^-8, exact."""
    even, odd = gl.inline_asm_elementwise(
        decode_pairs(HIGH, "$3", False),
        "=&r,=&r,r,r",
        [codes, scales],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    # n, unit (w, g), code h -> row (w, h, g), n
    p = gl.join(even, odd).reshape([64, 4, 8, 2]).permute([1, 3, 2, 0]).reshape([64, 64])
    return gl.convert_layout(p, a_operand(TOKENS), assert_trivial=True)


@gluon.jit
def _scales(s_smem):
    """The scales of a tile, spread over its codes: bf16 [64 n, 32 units], scale * 2^118."""
    SPREAD: gl.constexpr = block_units()
    s = s_smem.load(scales_layout()).reshape([8, 4, 8, 2]).permute([2, 1, 3, 0]).reshape([64, 8])
    s = gl.convert_layout(s, gl.SliceLayout(2, SPREAD), assert_trivial=True)
    s = gl.expand_dims(s, 2).broadcast_to([64, 8, 4]).reshape([64, 32])
    return gl.convert_layout(s, codes_layout(), assert_trivial=True)


@gluon.jit
def _tile(
    FIRST: gl.constexpr, acc0, acc1, C: gl.constexpr, slot, phase, w_smem, s_smem, dy_smem, full, ready, empty,
    TOKENS: gl.constexpr, SLOTS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """acc0, acc1 += one slot (STEPS times 64 x 128 of W, transposed) · dyᵀ. The last group is still in flight."""
    mbarrier.wait(full.index(slot), phase)
    mbarrier.wait(ready.index(slot), phase)
    for j in gl.static_range(STEPS):
        codes = w_smem.index(slot).slice(j * 64, 64, 0).slice(C * 32, 32, 1).load(codes_layout())
        scales = _scales(s_smem.index(slot * STEPS + j).slice(C * 8, 8, 0))
        dy = dy_smem.index(slot * STEPS + j).permute((1, 0))
        acc0 = warpgroup_mma(_plane(codes, scales, False, TOKENS), dy, acc0, is_async=True)
        if not (FIRST and j == 0):
            acc0, acc1 = warpgroup_mma_wait(1, deps=[acc0, acc1])
            acc0, acc1 = warpgroup_mma_init(acc0), warpgroup_mma_init(acc1)
            if j == 0:  # the slot before this one is multiplied, in every warp: give it back
                mbarrier.arrive(empty.index(gl.where(slot == 0, SLOTS - 1, slot - 1)), count=1)
        acc1 = warpgroup_mma(_plane(codes, scales, True, TOKENS), dy, acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(1, deps=[acc0, acc1])
        acc0, acc1 = warpgroup_mma_init(acc0), warpgroup_mma_init(acc1)
    slot, phase = next_slot(slot, phase, SLOTS)
    return acc0, acc1, slot, phase


@gluon.jit
def _flat(acc, TOKENS: gl.constexpr):
    """An accumulator as it lies between CTAs, in the order that gives a thread 16 neighbouring bytes."""
    # row (w, h, g), token (i, t, b) -> (i, w, g, t, h, b)
    return acc.reshape([4, 2, 8, TOKENS // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([64 * TOKENS])


@gluon.jit
def _output(flat0, flat1, decode, TOKENS: gl.constexpr):
    """Two flat accumulators -> bf16 [128 columns, TOKENS]."""
    out = gl.join((flat0 * decode).to(gl.bfloat16), (flat1 * decode).to(gl.bfloat16))
    # (i, w, g, t, h, b), accumulator p -> column (w, g, p, h), token (i, t, b)
    out = out.reshape([TOKENS // 8, 4, 8, 4, 2, 2, 2]).permute([1, 2, 6, 4, 0, 3, 5]).reshape([128, TOKENS])
    return gl.convert_layout(out, columns_first(TOKENS), assert_trivial=True)


@gluon.jit
def _consumer(
    C: gl.constexpr, w_smem, s_smem, dy_smem, full, ready, empty, decode_ptr, dx_ptr, part_ptr, flag_ptr,
    M, n_tiles, m_tiles, groups, waves, units, stride_dx,
    TOKENS: gl.constexpr, SLOTS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = accumulator(TOKENS)
    worker, workers, member = place(groups)
    base = waves * workers  # tiles that are done whole
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    wave = 0
    slot, phase = 0, 0
    while (wave < waves) | (unit < last_unit):
        whole = wave < waves
        tile = gl.where(whole, wave * workers + worker, base + unit // n_tiles)
        first_n = gl.where(whole, 0, unit % n_tiles)
        n = gl.where(whole, n_tiles, gl.minimum(n_tiles - first_n, last_unit - unit))
        acc0 = warpgroup_mma_init(gl.zeros([64, TOKENS], gl.float32, layout=ACC))
        acc1 = warpgroup_mma_init(gl.zeros([64, TOKENS], gl.float32, layout=ACC))
        acc0, acc1, slot, phase = _tile(
            True, acc0, acc1, C, slot, phase, w_smem, s_smem, dy_smem, full, ready, empty, TOKENS, SLOTS, STEPS,
        )  # fmt: skip
        for _ in range(1, n):
            acc0, acc1, slot, phase = _tile(
                False, acc0, acc1, C, slot, phase, w_smem, s_smem, dy_smem, full, ready, empty, TOKENS, SLOTS, STEPS,
            )  # fmt: skip
        out0, out1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        mbarrier.arrive(empty.index(gl.where(slot == 0, SLOTS - 1, slot - 1)), count=1)

        out0, out1 = _flat(out0, TOKENS), _flat(out1, TOKENS)
        part = part_ptr + gl.arange(0, 64 * TOKENS, out0.type.layout)
        flag = flag_ptr + ((tile - base) * groups + member) * 2 + C
        if first_n > 0:  # the CTA that began this tile will finish it
            at = ((worker * groups + member) * 2 + C) * (128 * TOKENS)
            gl.store(part + at, out0)
            gl.store(part + at + 64 * TOKENS, out1)
            barrier()
            gl.atomic_add(flag, 1, sem="release")
        else:
            if n < n_tiles:
                last_worker = ((tile - base + 1) * n_tiles * workers - 1) // units
                helpers = last_worker - worker
                while gl.atomic_add(flag, 0, sem="acquire") < helpers:
                    pass
                barrier()
                for w in range(worker + 1, last_worker + 1):
                    at = ((w * groups + member) * 2 + C) * (128 * TOKENS)
                    out0 += gl.load(part + at, cache_modifier=".cg")
                    out1 += gl.load(part + at + 64 * TOKENS, cache_modifier=".cg")
                gl.store(flag, 0)
            out = _output(out0, out1, gl.load(decode_ptr) * 256.0, TOKENS)
            OUT: gl.constexpr = out.type.layout
            columns = (tile // m_tiles * 2 + C) * 128 + gl.arange(0, 128, gl.SliceLayout(1, OUT))
            tokens = (tile % m_tiles * groups + member) * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
            gl.store(dx_ptr + tokens[None, :] * stride_dx + columns[:, None], out, mask=(tokens < M)[None, :])
        unit = gl.where(whole, unit, unit + n)
        wave += 1


@gluon.jit
def _spread(raw_smem):
    """Block scales of 64 rows as they came -> bf16 [16 blocks, t, (s, h, b)], scale * 2^118.

    As in nvfp4_pairs.py, but two rows' bytes make a pair. The sign bit of a byte is clear, so PRMT's sign replication
    (selector + 8) gives the zeros between two bytes.
    """
    b0, b1, b2, b3 = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 c, t;
        mov.b32 c, 0x7B007B00;
        prmt.b32 t, $4, $5, 0xC480;
        shl.b32 t, t, 4;
        mul.rn.bf16x2 t, t, c;
        mul.rn.bf16x2 $0, t, c;
        prmt.b32 t, $4, $5, 0xD591;
        shl.b32 t, t, 4;
        mul.rn.bf16x2 t, t, c;
        mul.rn.bf16x2 $1, t, c;
        prmt.b32 t, $4, $5, 0xE6A2;
        shl.b32 t, t, 4;
        mul.rn.bf16x2 t, t, c;
        mul.rn.bf16x2 $2, t, c;
        prmt.b32 t, $4, $5, 0xF7B3;
        shl.b32 t, t, 4;
        mul.rn.bf16x2 t, t, c;
        mul.rn.bf16x2 $3, t, c;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r",
        [raw_smem.load(raw_scales())],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    # n (s, h, t, b), word, byte (high, low) -> block (word, high, low), t, (s, h, b)
    s = gl.join(gl.join(b0, b2), gl.join(b1, b3)).reshape([4, 2, 4, 2, 4, 2, 2])
    return s.permute([4, 5, 6, 2, 0, 1, 3]).reshape([16, 4, 16])


@gluon.jit
def _scale_role(raw_smem, s_smem, full, ready, n_tiles, groups, waves, units, SLOTS: gl.constexpr, STEPS: gl.constexpr):
    """Decode every slot's block scales once for both consumers, between the copy engine and them."""
    worker, workers, _ = place(groups)
    steps = waves * n_tiles + ((worker + 1) * units) // workers - (worker * units) // workers
    slot, phase = 0, 0
    for _ in range(steps):
        mbarrier.wait(full.index(slot), phase)
        for j in gl.static_range(STEPS):
            s_smem.index(slot * STEPS + j).store(_spread(raw_smem.index(slot).slice(j * 64, 64, 0)))
        mbarrier.arrive(ready.index(slot), count=1)
        slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def _producer(
    dy_desc, w_desc, raw_desc, dy_smem, w_smem, raw_smem, full, empty, n_tiles, m_tiles, groups, waves, units,
    TOKENS: gl.constexpr, SLOTS: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Walk the consumers' loop ahead of them. Its inner body is short on purpose: it is what bounds a small tile."""
    worker, workers, member = place(groups)
    base = waves * workers
    unit = (worker * units) // workers
    last_unit = ((worker + 1) * units) // workers
    wave = 0
    slot, phase = 0, 1  # a fresh ring counts as given back
    while (wave < waves) | (unit < last_unit):
        whole = wave < waves
        tile = gl.where(whole, wave * workers + worker, base + unit // n_tiles)
        first_n = gl.where(whole, 0, unit % n_tiles)
        n = gl.where(whole, n_tiles, gl.minimum(n_tiles - first_n, last_unit - unit))
        column = tile // m_tiles
        token = (tile % m_tiles * groups + member) * TOKENS
        row = first_n * (64 * STEPS)
        for _ in range(n):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), STEPS * (64 * 128 + 64 * 16 + TOKENS * 128))
            tma_load(w_desc, [row, column * 64], full.index(slot), w_smem.index(slot))
            tma_load(raw_desc, [row, column * 4], full.index(slot), raw_smem.index(slot))
            for j in gl.static_range(STEPS):
                tma_load(dy_desc, [token, row + j * 64], full.index(slot), dy_smem.index(slot * STEPS + j))
            slot, phase = next_slot(slot, phase, SLOTS)
            row += 64 * STEPS
        unit = gl.where(whole, unit, unit + n)
        wave += 1


@gluon.jit(do_not_specialize=["M", "m_tiles", "n_tiles", "groups", "waves", "units"])
def kernel(
    dy_desc, w_desc, raw_desc, decode_ptr, dx_ptr, part_ptr, flag_ptr,
    M, n_tiles, m_tiles, groups, waves, units, stride_dx,
    TOKENS: gl.constexpr, SLOTS: gl.constexpr, STEPS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One CTA of the persistent grid; see the module's docstring."""
    w_smem = gl.allocate_shared_memory(gl.int16, [SLOTS, 64 * STEPS, 64], W_SMEM)
    raw_smem = gl.allocate_shared_memory(gl.int32, [SLOTS, 64 * STEPS, 4], BYTES_SMEM)
    s_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * STEPS, 16, 4, 16], S_SMEM)
    dy_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * STEPS, TOKENS, 64], DYT_SMEM)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (
            0, w_smem, s_smem, dy_smem, full, ready, empty, decode_ptr, dx_ptr, part_ptr, flag_ptr,
            M, n_tiles, m_tiles, groups, waves, units, stride_dx, TOKENS, SLOTS, STEPS,
        )),
        (_consumer, (
            1, w_smem, s_smem, dy_smem, full, ready, empty, decode_ptr, dx_ptr, part_ptr, flag_ptr,
            M, n_tiles, m_tiles, groups, waves, units, stride_dx, TOKENS, SLOTS, STEPS,
        )),
        (_scale_role, (raw_smem, s_smem, full, ready, n_tiles, groups, waves, units, SLOTS, STEPS)),
        (_producer, (
            dy_desc, w_desc, raw_desc, dy_smem, w_smem, raw_smem, full, empty, n_tiles, m_tiles, groups, waves, units,
            TOKENS, SLOTS, STEPS,
        )),
    ], [4, 2, 1], [CONSUMER_REGISTERS, 32, 32])  # fmt: skip
