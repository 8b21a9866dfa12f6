"""Codes and scales to bfloat16 inside a Triton kernel, exactly, in few instructions and on any architecture.

Numbers. The three magnitude bits ee|m of a code, put at bits 8..6 of a bfloat16, read as value * 2^-126, with the
subnormal 0.5 falling out right; an E4M3 byte shifted left by 4 reads as scale * 2^-120. Two multiplications with 2^119
bring the scale to scale * 2^118, and one per weight gives

    code * scale * 2^-8        at most 6 significant bits: exact

so a kernel multiplies its fp32 sum by decode_scale * 2^8 at the end.

Two layouts of a 32-bit word of eight codes:
    STANDARD    the checkpoint's: nibble i is column i
    TWIDDLED    the same 32 bits permuted so that and-masks and shifts alone produce four register pairs
                (nvfp4_twiddle.py); 11 integer instructions per 8 weights instead of 16

Both give two planes: even columns and odd columns. Activations are loaded as 32-bit words, two neighbours of k, and
split alike, so no weight is ever moved between registers.

The multiplication is an fma with -0.0: `mul.bf16x2` exists from Hopper on, `fma.bf16x2` from Ampere on.

Under TRITON_INTERPRET=1 (`ASM` false) plain Triton arithmetic stands in for PTX; bfloat16 dot products are computed on
float32 operands there, because the interpreter multiplies raw bits.
"""

# ruff: noqa: ANN001, ANN201, ANN202, D417
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

import os

import triton
import triton.language as tl

GLUON = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)
"""Gluon moves between releases: those where tests/kernels has seen our kernels compile as they should
(gluon_compat.py). Only 3.6 has run them on a GPU."""

ASM = os.environ.get("TRITON_INTERPRET", "0") != "1"
STANDARD, TWIDDLED = 0, 1


@triton.jit
def scale_to_bf16(byte, ASM: tl.constexpr):
    """E4M3 byte (sign clear) -> bfloat16 scale * 2^118."""
    if ASM:
        bits = (byte.to(tl.uint16) << 4).to(tl.bfloat16, bitcast=True)
        up = tl.full((1,), 664613997892457936451903530140172288.0, tl.bfloat16)  # 2^119
        return (bits * up) * up
    else:
        wide = (byte.to(tl.uint32) << 20).to(tl.float32, bitcast=True)
        wide = wide * 664613997892457936451903530140172288.0
        return (wide * 664613997892457936451903530140172288.0).to(tl.bfloat16)


@triton.jit
def _standard_planes(codes, scales):
    return tl.inline_asm_elementwise(
        asm="""
        {
        .reg .b32 t0, t1, a, b, z;
        mov.b32 z, 0x80008000;
        prmt.b32 t0, $4, 0, 0x1404;
        prmt.b32 t1, $4, 0, 0x3424;
        shl.b32 a, t0, 4;
        shr.u32 b, t0, 2;
        and.b32 b, b, 0x01C001C0;
        lop3.b32 a, a, 0x80008000, b, 0xEA;
        fma.rn.bf16x2 $0, a, $5, z;
        shl.b32 a, t1, 4;
        shr.u32 b, t1, 2;
        and.b32 b, b, 0x01C001C0;
        lop3.b32 a, a, 0x80008000, b, 0xEA;
        fma.rn.bf16x2 $1, a, $6, z;
        shr.u32 b, t0, 6;
        and.b32 b, b, 0x01C001C0;
        lop3.b32 a, t0, 0x80008000, b, 0xEA;
        fma.rn.bf16x2 $2, a, $5, z;
        shr.u32 b, t1, 6;
        and.b32 b, b, 0x01C001C0;
        lop3.b32 a, t1, 0x80008000, b, 0xEA;
        fma.rn.bf16x2 $3, a, $6, z;
        }
        """,
        constraints="=&r,=&r,=&r,=&r,r,r,r",
        args=[codes, scales],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _twiddled_planes(codes, scales):
    return tl.inline_asm_elementwise(
        asm="""
        {
        .reg .b32 a, b, z;
        mov.b32 z, 0x80008000;
        and.b32 a, $4, 0x81C081C0;
        fma.rn.bf16x2 $0, a, $5, z;
        shl.b32 a, $4, 3;
        and.b32 a, a, 0x81C081C0;
        fma.rn.bf16x2 $1, a, $6, z;
        shl.b32 a, $4, 1;
        shr.u32 b, $4, 3;
        and.b32 b, b, 0x01C001C0;
        lop3.b32 a, a, 0x80008000, b, 0xEA;
        fma.rn.bf16x2 $2, a, $5, z;
        shl.b32 a, $4, 2;
        shl.b32 b, $4, 6;
        and.b32 b, b, 0x01C001C0;
        lop3.b32 a, a, 0x80008000, b, 0xEA;
        fma.rn.bf16x2 $3, a, $6, z;
        }
        """,
        constraints="=&r,=&r,=&r,=&r,r,r,r",
        args=[codes, scales],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def planes(codes, scale_bytes, R: tl.constexpr, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr, ASM: tl.constexpr):
    """Weights of even and of odd columns.

    Args:
        codes: uint8 [R, 8 * BLOCKS], packed.
        scale_bytes: uint8 [R, BLOCKS].

    Returns:
        Two bfloat16 [R, 8 * BLOCKS], code * scale * 2^-8.
    """
    s = scale_to_bf16(scale_bytes, ASM)
    s = tl.broadcast_to(s[:, :, None], (R, BLOCKS, 8)).reshape(R, BLOCKS * 8)
    if ASM:
        if LAYOUT == 0:
            even, odd = _standard_planes(codes, s)
        else:
            even, odd = _twiddled_planes(codes, s)
    else:
        tl.static_assert(LAYOUT == 0, "the interpreter knows the standard layout only")
        word = codes.to(tl.uint32)
        even = (((word & 0x08) << 28) | ((word & 0x07) << 22)).to(tl.float32, bitcast=True)
        odd = (((word & 0x80) << 24) | ((word & 0x70) << 18)).to(tl.float32, bitcast=True)
        even = (even * s.to(tl.float32)).to(tl.bfloat16)
        odd = (odd * s.to(tl.float32)).to(tl.bfloat16)
    return even, odd


@triton.jit
def split_pairs(words):
    """int32 words of two neighbouring bfloat16 -> (even, odd)."""
    even = (words & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    odd = (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return even, odd


@triton.jit
def dot(a, b, acc, ASM: tl.constexpr):
    """acc + a · b with bfloat16 operands."""
    if ASM:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile order in which GROUP rows of tiles share their columns through L2."""
    width = GROUP * tiles_n
    first = pid // width * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size
