"""Inline PTX executed instruction by instruction on torch tensors, for gluon_on_torch.py.

A 32-bit register is an int64 tensor, one element per instance of the assembly. `pack` values of a thread share an
instance: neighbours along one dimension of the tensor, which depends on the layout and is the caller's to say.
Narrower values share a register, the first of them in its lowest bits.

Only the instructions that our kernels use are known; an unknown one is a KeyError.
"""

import torch


def _bf16x2(a, b, c=0x80008000):
    """a * b + c; adding the default, -0.0, changes nothing."""

    def halves(x):
        x = torch.stack((torch.as_tensor(x) & 0xFFFF, torch.as_tensor(x) >> 16), -1).to(torch.int32)
        return (x << 16).view(torch.float32).double()

    result = (halves(a) * halves(b) + halves(c)).bfloat16().view(torch.int16).to(torch.int64) & 0xFFFF
    return result[..., 0] | (result[..., 1] << 16)


def _prmt(a, b, selector):
    out = torch.zeros_like(a)
    for i in range(4):
        choice = (selector >> (4 * i)) & 15
        byte = ((a | (b << 32)) >> (8 * (choice & 7))) & 255
        out |= torch.where(byte >= 128, 255, 0) << (8 * i) if choice & 8 else byte << (8 * i)
    return out


_OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
    "mul.lo.u32": lambda a, b: (a * b) & 0xFFFFFFFF,
    "mul.rn.bf16x2": _bf16x2,
    "fma.rn.bf16x2": _bf16x2,
    "prmt.b32": _prmt,
}


def _registers(value, pack, dim):
    """The registers that hold `pack` neighbours along `dim`, one tensor each."""
    bits = 8 * value.element_size()
    words = value.view({8: torch.uint8, 16: torch.int16, 32: torch.int32}[bits]).to(torch.int64) & ((1 << bits) - 1)
    words = words.movedim(dim, 0)
    each = [words[i::pack] << (bits * i % 32) for i in range(pack)]
    return [sum(each[i : i + 32 // bits]) for i in range(0, pack, 32 // bits)]


def _value(registers, kind, dim):
    """The inverse."""
    if kind.itemsize == 2:
        registers = [half for register in registers for half in (register & 0xFFFF, register >> 16)]
    words = torch.stack(registers, 1).flatten(0, 1).movedim(0, dim)
    return words.to({2: torch.int16, 4: torch.int32}[kind.itemsize]).view(kind)


def execute(asm, constraints, args, kinds, pack, dim):
    """Run `asm` on `args`; one tensor per element of `kinds`, shaped like the first argument."""
    inputs = [register for arg in args for register in _registers(arg, pack, dim)]
    counts = [pack * kind.itemsize // 4 for kind in kinds]
    registers = {f"${sum(counts) + i}": register for i, register in enumerate(inputs)}
    assert sum(counts) + len(inputs) == len(constraints.split(","))
    for line in asm.split(";"):
        words = line.replace("{", " ").replace("}", " ").replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        operands = [registers[w] if w in registers else int(w, 0) for w in words[2:]]
        value = torch.as_tensor(_OPERATIONS[words[0]](*operands))
        registers[words[1]] = value.expand_as(inputs[0])
    outputs = iter([registers[f"${i}"] for i in range(sum(counts))])
    return [_value([next(outputs) for _ in range(n)], kind, dim) for n, kind in zip(counts, kinds, strict=True)]
