"""y = (x · Pᵀ) · decode_scale for few tokens: every weight goes from memory to registers to the tensor core, once.

At up to 16 tokens the weights' bytes are the whole cost, and what keeps a kernel from streaming them at memory speed is
everything else: shared-memory rings, barriers, hand-over between specialized warps, sums shared between CTAs. Here is
none of that. A warp loads 16 bytes a lane straight into registers, a tile ahead, decodes them and multiplies with
`mma.m16n8k16`, whose operands are registers. The warps of a CTA take turns along K, for the same rows, and meet once at
the end. CTAs are small and many per multiprocessor: one starts while another ends. That wins where fixed costs weigh,
on small layers and one token; nvfp4_wgmma.py keeps more bytes in flight and wins on large ones.

Who holds what. As in nvfp4_wgmma_layouts.py, columns are renamed until nothing has to move between lanes: of every 256
columns, lane t of a quad takes the 64 from 64 t on (32 bytes of codes, four whole scale blocks = one word), and nibbles
i and i + 4 of a word form a register pair. x comes in the same order, laid out so that one 16-byte load gives a lane
its operand of two instructions (nvfp4_fragments.py).

K can also be shared between CTAs (SLICES > 1, for weights with few rows): partial sums go to memory and the CTA that
draws the last ticket adds them in slice order, so runs are equal to the last bit. The pass over x clears the tickets.

LoRA's h · Bᵀ is one more product after the scaling, by the first warp of the CTA that stores. A residual is added there
too: as a kernel of its own that sum would be a launch.

What it does not do: K not a multiple of 256, other activations than bfloat16; dispatch.py sends those elsewhere.

Legend: W warps along K, R rows of a CTA (16 or 32), T tokens (8, 16 or 32), N output features, K input features.
"""

# Gluon compiles these functions from their source: annotations of their arguments other than constexpr are not read.
# ruff: noqa: ANN001, ANN201, ANN202, D103
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qerl_compile.kernels.gluon_compat import barrier, gdc_launch_dependents, gdc_wait, mma_v2
from qerl_compile.kernels.nvfp4_arrival import await_x
from qerl_compile.kernels.nvfp4_pairs import decode_pairs, scale_pair

TILE_K = 256


@gluon.constexpr_function
def _warps(warps: int, rank: int) -> list[list[int]]:
    """Warps lie along the first dimension, the stretch of K."""
    return [[1 << i, *[0] * (rank - 1)] for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def _more_rows(rows: int, rank: int) -> list[list[int]]:
    return [[0, 16, *[0] * (rank - 2)]] if rows == 32 else []


@gluon.constexpr_function
def mma(warps: int):
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def codes_layout(warps: int, rows: int):
    """[W, R, 32 words]: 16 contiguous bytes per load; rows 2r and 2r + 1 to one lane."""
    register = [[0, 0, 1], [0, 0, 2], [0, 1, 0], *_more_rows(rows, 3), [0, 0, 4]]
    lane = [[0, 0, 8], [0, 0, 16], [0, 2, 0], [0, 4, 0], [0, 8, 0]]
    return gl.DistributedLinearLayout(register, lane, _warps(warps, 3), [], [warps, rows, 32])


@gluon.constexpr_function
def half_layout(warps: int, rows: int):
    """Half a tile, each word repeated for the four register values made of its codes: [W, R, 16 words, 4]."""
    register = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], *_more_rows(rows, 4)]
    lane = [[0, 0, 4, 0], [0, 0, 8, 0], [0, 2, 0, 0], [0, 4, 0, 0], [0, 8, 0, 0]]
    return gl.DistributedLinearLayout(register, lane, _warps(warps, 4), [], [warps, rows, 16, 4])


@gluon.constexpr_function
def half_blocks_layout(warps: int, rows: int):
    """The same with the words as (scale block, word of the block)."""
    register = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0],
                *_more_rows(rows, 5)]  # fmt: skip
    lane = [[0, 0, 2, 0, 0], [0, 0, 4, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0], [0, 8, 0, 0, 0]]
    return gl.DistributedLinearLayout(register, lane, _warps(warps, 5), [], [warps, rows, 8, 2, 4])


@gluon.constexpr_function
def scales_layout(warps: int, rows: int):
    """[W, R, 4 words]: the four scale bytes of a lane's row."""
    register = [[0, 1, 0], *_more_rows(rows, 3)]
    lane = [[0, 0, 1], [0, 0, 2], [0, 2, 0], [0, 4, 0], [0, 8, 0]]
    return gl.DistributedLinearLayout(register, lane, _warps(warps, 3), [], [warps, rows, 4])


@gluon.constexpr_function
def x_layout(warps: int, tokens: int):
    """[W, 64 T] of one plane: 16 contiguous bytes per lane and two instructions."""
    register = [[0, 1], [0, 2], [0, 4], *([0, 256 << i] for i in range((tokens // 4).bit_length() - 1))]
    lane = [[0, 8 << i] for i in range(5)]
    return gl.DistributedLinearLayout(register, lane, _warps(warps, 2), [], [warps, 64 * tokens])


@gluon.constexpr_function
def natural_x_layout(warps: int, tokens: int):
    """[W, T, 256 columns] as x lies in memory: the 64 columns of one token that belong to a lane."""
    register = [*([0, 0, 1 << i] for i in range(6)), *([0, 8 << i, 0] for i in range((tokens // 8).bit_length() - 1))]
    lane = [[0, 0, 64], [0, 0, 128], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(register, lane, _warps(warps, 3), [], [warps, tokens, 256])


@gluon.jit
def _scale_pair(words, BYTE: gl.constexpr):
    """One of the four E4M3 bytes of each word -> bf16x2, byte * 2^118 twice."""
    return gl.inline_asm_elementwise(scale_pair(BYTE, True), "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _half_scales(words, HALF: gl.constexpr, W: gl.constexpr, R: gl.constexpr):
    """[W, R, 4] words -> scale pairs of one half of the tile, one per register value, [W, R, 16, 4]."""
    if HALF == 0:
        pairs = gl.join(_scale_pair(words, 0), _scale_pair(words, 1))
    else:
        pairs = gl.join(_scale_pair(words, 2), _scale_pair(words, 3))
    BLOCKS: gl.constexpr = half_blocks_layout(W, R)
    pairs = gl.convert_layout(pairs.reshape([W, R, 8]), gl.SliceLayout(3, gl.SliceLayout(4, BLOCKS)))
    pairs = gl.expand_dims(gl.expand_dims(pairs, 3), 4).broadcast_to([W, R, 8, 2, 4]).reshape([W, R, 16, 4])
    return gl.convert_layout(pairs, half_layout(W, R))


@gluon.jit
def _plane(codes, pairs, HIGH: gl.constexpr, W: gl.constexpr, R: gl.constexpr):
    """codes [W, R, 16], pairs [W, R, 16, 4] -> A operand [W, R, 64]: code * scale * 2^-8, exact in bf16."""
    HALF: gl.constexpr = half_layout(W, R)
    codes = gl.convert_layout(codes, gl.SliceLayout(3, HALF))
    codes = gl.expand_dims(codes, 3).broadcast_to([W, R, 16, 4])
    p = gl.inline_asm_elementwise(
        decode_pairs(HIGH, "$6", True),
        "=&r,=&r,r,r,r,r,r,r,r,r",
        [codes, pairs],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )
    # rows (hi, g, h), values (t, word, pair, low) -> rows (hi, h, g), positions (word, pair, t, low)
    p = p.reshape([W, R // 16, 8, 2, 4, 4, 2, 2]).permute([0, 1, 3, 2, 5, 6, 4, 7])
    return gl.convert_layout(p.reshape([W, R, 64]), gl.DotOperandLayout(0, mma(W), 2))


@gluon.jit
def _fragments(x_at, W: gl.constexpr, T: gl.constexpr):
    """x of one tile in fragment order -> the operands of its four planes, [W, 64, T] each."""
    return (
        _fragment(gl.load(x_at), W, T),
        _fragment(gl.load(x_at + 64 * T), W, T),
        _fragment(gl.load(x_at + 128 * T), W, T),
        _fragment(gl.load(x_at + 192 * T), W, T),
    )


@gluon.jit
def _fragment(x, W: gl.constexpr, T: gl.constexpr):
    # (token block, step high, g, t, step low, pair, low) -> positions (step, pair, t, low), tokens (block, g)
    x = x.reshape([W, T // 8, 2, 8, 4, 2, 2, 2]).permute([0, 2, 5, 6, 4, 7, 1, 3]).reshape([W, 64, T])
    return gl.convert_layout(x, gl.DotOperandLayout(1, mma(W), 2))


@gluon.jit
def _natural(x_at, inside, W: gl.constexpr, T: gl.constexpr):
    """The same from x as it lies in memory; the pairs (i, i + 4) are put together here."""
    x = gl.load(x_at, mask=inside, other=0.0)
    # columns (t, half, word, low, high, pair), plane (half, high)
    x = x.reshape([W, T, 4, 2, 4, 2, 2, 2]).permute([0, 4, 7, 2, 5, 1, 3, 6]).reshape([W, 64, T, 2, 2])
    low, high = gl.split(x)
    x0, x2 = gl.split(low)
    x1, x3 = gl.split(high)
    B: gl.constexpr = gl.DotOperandLayout(1, mma(W), 2)
    return gl.convert_layout(x0, B), gl.convert_layout(x1, B), gl.convert_layout(x2, B), gl.convert_layout(x3, B)


@gluon.jit
def _multiply(acc, codes, words, x0, x1, x2, x3, W: gl.constexpr, R: gl.constexpr):
    """acc [W, R, T] += one tile (R x 256 of each warp's stretch) · xᵀ."""
    low, high = gl.split(codes.reshape([W, R, 4, 2, 4]).permute([0, 1, 2, 4, 3]))
    low, high = low.reshape([W, R, 16]), high.reshape([W, R, 16])
    acc = mma_v2(_plane(low, _half_scales(words, 0, W, R), False, W, R), x0, acc)
    acc = mma_v2(_plane(low, _half_scales(words, 0, W, R), True, W, R), x1, acc)
    acc = mma_v2(_plane(high, _half_scales(words, 1, W, R), False, W, R), x2, acc)
    return mma_v2(_plane(high, _half_scales(words, 1, W, R), True, W, R), x3, acc)


@gluon.jit
def _step(acc, codes, words, x_at, tile, end, token_ok, k_tiles,
          W: gl.constexpr, R: gl.constexpr, T: gl.constexpr, NATURAL: gl.constexpr):  # fmt: skip
    if NATURAL:
        x0, x1, x2, x3 = _natural(x_at + tile * 256, token_ok & (tile < end), W, T)
    else:  # past the end: the tile of zeros
        x0, x1, x2, x3 = _fragments(x_at + gl.where(tile < end, tile, k_tiles) * (256 * T), W, T)
    return _multiply(acc, codes, words, x0, x1, x2, x3, W, R)


@gluon.jit
def _fetch(codes_at, words_at, codes_tile, words_tile, end, W: gl.constexpr, STEP: gl.constexpr):
    """A lane's codes and scales, STEP steps on. Past the end the codes are whatever they are (any code is finite and x
    is zero there); the scales are real ones of this row, since arbitrary bytes may decode to infinity."""
    codes = gl.load(codes_at + STEP * W * 32, mask=codes_tile + STEP * W < end)
    words = gl.load(words_at + gl.minimum(words_tile + STEP * W, end - 1) * 4)
    return codes, words


@gluon.jit
def _lora(h_ptr, lora_ptr, row0, N, M, stride_h, stride_lora, W: gl.constexpr, R: gl.constexpr, T: gl.constexpr,
          RANK: gl.constexpr):  # fmt: skip
    """B · hᵀ, [W, R, T], in the accumulator's order of rows: all of it in warp 0, zero elsewhere."""
    A: gl.constexpr = gl.DotOperandLayout(0, mma(W), 2)
    B: gl.constexpr = gl.DotOperandLayout(1, mma(W), 2)
    first = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, A))) == 0
    i = gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, A)))
    row = gl.minimum(row0 + i // 16 * 16 + i % 8 * 2 + i // 8 % 2, N - 1)
    r = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(1, A)))
    at = lora_ptr + row[None, :, None] * stride_lora + r[None, None, :]
    lora = gl.load(at + gl.zeros([W, 1, 1], gl.int32, A), mask=first[:, None, None], other=0.0)
    r = gl.arange(0, RANK, gl.SliceLayout(0, gl.SliceLayout(2, B)))
    token = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(1, B)))
    at = h_ptr + token[None, None, :] * stride_h + r[None, :, None]
    h = gl.load(at + gl.zeros([W, 1, 1], gl.int32, B), mask=(token < M)[None, None, :], other=0.0)
    return mma_v2(lora, h, gl.zeros([W, R, T], gl.float32, layout=mma(W)))


@gluon.jit(do_not_specialize=["M", "k_tiles", "arrival_at", "arriving"])
def kernel(
    x_ptr, codes_ptr, block_ptr, decode_ptr, y_ptr, part_ptr, h_ptr, lora_ptr, residual_ptr,
    arrival_ptr, arrival_at, arriving, M, N, k_tiles,
    codes_stride, block_stride, stride_x, stride_y, stride_h, stride_lora, stride_residual,
    W: gl.constexpr, R: gl.constexpr, T: gl.constexpr, SLICES: gl.constexpr, RANK: gl.constexpr,
    NATURAL: gl.constexpr, RESIDUAL: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """R rows over one slice of K, M <= T tokens; x in fragments with a tile of zeros, or as it is; RANK 0: no LoRA."""
    CODES: gl.constexpr = codes_layout(W, R)
    WORDS: gl.constexpr = scales_layout(W, R)
    codes_ptr = codes_ptr.to(gl.pointer_type(gl.int32), bitcast=True)  # eight codes a word
    block_ptr = block_ptr.to(gl.pointer_type(gl.int32), bitcast=True)  # four scales a word
    row0 = gl.program_id(0) * R
    begin = gl.program_id(1) * k_tiles // SLICES
    end = (gl.program_id(1) + 1) * k_tiles // SLICES
    steps = gl.cdiv(end - begin, W)

    # The warps take turns along K, so that a CTA reads W * 128 neighbouring bytes of each row at a time.
    codes_tile = begin + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, CODES)))[:, None, None]
    row = gl.minimum(row0 + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, CODES))), N - 1).to(gl.int64)
    word = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, CODES)))[None, None, :]
    codes_at = codes_ptr + row[None, :, None] * (codes_stride // 4) + (codes_tile * 32 + word)
    words_tile = begin + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    row = gl.minimum(row0 + gl.arange(0, R, gl.SliceLayout(0, gl.SliceLayout(2, WORDS))), N - 1).to(gl.int64)
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    words_at = block_ptr + row[None, :, None] * (block_stride // 4) + word
    if NATURAL:
        X: gl.constexpr = natural_x_layout(W, T)
        x_tile = begin + gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, X)))[:, None, None]
        token = gl.arange(0, T, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :, None]
        column = gl.arange(0, 256, gl.SliceLayout(0, gl.SliceLayout(1, X)))[None, None, :]
        x_at = x_ptr + token * stride_x + column
        token_ok = token < M
    else:
        X: gl.constexpr = x_layout(W, T)
        x_tile = begin + gl.arange(0, W, gl.SliceLayout(1, X))[:, None]
        x_at = x_ptr + gl.arange(0, 64 * T, gl.SliceLayout(0, X))[None, :]
        token_ok = True

    codes0, words0 = _fetch(codes_at, words_at, codes_tile, words_tile, end, W, 0)
    codes1, words1 = _fetch(codes_at, words_at, codes_tile, words_tile, end, W, 1)
    if DEPENDENT:  # weights do not depend on the kernel before this one
        await_x(arrival_ptr, arrival_at, arriving)
        gdc_launch_dependents()
    acc = gl.zeros([W, R, T], gl.float32, layout=mma(W))
    for i in range(0, steps, 2):
        codes_at += 2 * W * 32
        codes_tile += 2 * W
        words_tile += 2 * W
        acc = _step(acc, codes0, words0, x_at, x_tile, end, token_ok, k_tiles, W, R, T, NATURAL)
        codes0, words0 = _fetch(codes_at, words_at, codes_tile, words_tile, end, W, 0)
        if i + 1 < steps:
            acc = _step(acc, codes1, words1, x_at, x_tile + W, end, token_ok, k_tiles, W, R, T, NATURAL)
        codes1, words1 = _fetch(codes_at, words_at, codes_tile, words_tile, end, W, 1)
        x_tile += 2 * W

    if DEPENDENT:
        gdc_wait()  # where x was waited for by a count (lead_in.py); over at once where it was not
    out = gl.sum(acc, axis=0)
    OUT: gl.constexpr = out.type.layout
    last = True
    if SLICES > 1:
        tile = gl.program_id(0)
        ticket_ptr = (part_ptr + gl.num_programs(0) * (SLICES * R * T)).to(gl.pointer_type(gl.int32), bitcast=True)
        part_at = part_ptr + tile * (SLICES * R * T)
        part_at += gl.arange(0, R, gl.SliceLayout(1, OUT))[:, None] * T
        part_at += gl.arange(0, T, gl.SliceLayout(0, OUT))[None, :]
        gl.store(part_at + gl.program_id(1) * (R * T), out)
        barrier()
        last = gl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel") == SLICES - 1
        if last:
            out = gl.zeros([R, T], gl.float32, layout=OUT)
            for s in range(SLICES):
                out += gl.load(part_at + s * (R * T), cache_modifier=".cg")
    if last:
        out = out * (gl.load(decode_ptr) * 256.0)
        if RANK > 0:
            out += gl.sum(_lora(h_ptr, lora_ptr, row0, N, M, stride_h, stride_lora, W, R, T, RANK), axis=0)
        # rows (hi, h, g) of the accumulator are rows (hi, g, h) of W
        y = out.to(gl.bfloat16).reshape([R // 16, 2, 8, T]).permute([0, 2, 1, 3]).reshape([R, T])
        Y: gl.constexpr = y.type.layout
        rows = row0 + gl.arange(0, R, gl.SliceLayout(1, Y))
        tokens = gl.arange(0, T, gl.SliceLayout(0, Y))
        inside = (rows < N)[:, None] & (tokens < M)[None, :]
        if RESIDUAL:  # y is rounded first, as where the sum is a kernel of its own
            at = residual_ptr + tokens[None, :] * stride_residual + rows[:, None]
            y = (y.to(gl.float32) + gl.load(at, mask=inside, other=0.0).to(gl.float32)).to(gl.bfloat16)
        gl.store(y_ptr + tokens[None, :] * stride_y + rows[:, None], y, mask=inside)
