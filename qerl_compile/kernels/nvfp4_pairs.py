"""Nibbles and scale bytes to pairs of bfloat16, as PTX: the arithmetic that the Gluon kernels share.

Codes. A register holds nibbles s|ee|m, 16 bits apart where a pair wants them. Two masks (0x000F000F, 0x00F000F0) pick
two pairs; a product with 2^12 + 2^6 or 2^8 + 2^2 puts the sign at bit 15 and ee|m at bits 8..6, which reads as
value * 2^-126 in bfloat16. The other two pairs lie 8 bits higher.

Scales. An E4M3 byte shifted left by 4 reads as byte * 2^-120 in bfloat16, subnormals included; twice 2^119 makes it
byte * 2^118. Code times scale is then the exact product * 2^-8.

`mul.bf16x2` exists from Hopper on. Kernels that also run elsewhere take the fma with -0.0, from Ampere on, which
becomes the same instruction where there is one.
"""

# pyright: basic

from triton.experimental import gluon


@gluon.constexpr_function
def _declared(registers: str, portable: bool) -> str:
    return f".reg .b32 {registers}, z;\n        mov.b32 z, 0x80008000;" if portable else f".reg .b32 {registers};"


@gluon.constexpr_function
def _product(out: str, a: str, b: str, portable: bool) -> str:
    return f"fma.rn.bf16x2 {out}, {a}, {b}, z;" if portable else f"mul.rn.bf16x2 {out}, {a}, {b};"


@gluon.constexpr_function
def decode_pairs(high: bool, block_scale: str, portable: bool) -> str:
    """$0, $1 = two pairs of the codes in $2, times the pair of scales in the operand `block_scale`.

    Args:
        high: the two pairs in bits 8 to 15 of each half, not those in bits 0 to 7.
        block_scale: "$3", or what it is in the kernel's list of operands.
        portable: fma instead of mul.
    """
    return f"""
        {{
        {_declared("a, v", portable)}
        {"shr.u32 v, $2, 8" if high else "mov.b32 v, $2"};
        and.b32 a, v, 0x000F000F;
        mul.lo.u32 a, a, 0x1040;
        and.b32 a, a, 0x81C081C0;
        {_product("$0", "a", block_scale, portable)}
        and.b32 a, v, 0x00F000F0;
        mul.lo.u32 a, a, 0x0104;
        and.b32 a, a, 0x81C081C0;
        {_product("$1", "a", block_scale, portable)}
        }}
        """


@gluon.constexpr_function
def scale_pair(byte: int, portable: bool) -> str:
    """$0 = the E4M3 byte number `byte` of $1, twice, times 2^118."""
    return f"""
        {{
        {_declared("c, t", portable)}
        mov.b32 c, 0x7B007B00;
        prmt.b32 t, $1, 0, 0x4{byte}4{byte};
        shl.b32 t, t, 4;
        {_product("t", "t", "c", portable)}
        {_product("$0", "t", "c", portable)}
        }}
        """
