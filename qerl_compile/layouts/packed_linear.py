"""What every layout answers with: which tensors make one packed linear, and what each of them must be.

A checkpoint is read in two steps. From headers and JSON alone a layout says which modules are packed, by which tensors,
and of which shapes and dtypes these must be, so that a wrong directory is refused before a byte of weights is read.
Then, as the tensors arrive, `assemble` makes a `PackedNVFP4` of them and judges their values. Nothing is requantized:
codes and block scales are the file's bytes (at most put in another order), the scalar is the file's number.

Four faults let a file load elsewhere without a word and compute garbage. Here each is an error with its tensor:

    block scales as uint8     engines cast the byte to a number instead of taking it as E4M3
    a NaN or a sign in one    passes through every engine's compressed-tensors path
    a scalar that is zero, negative or not finite
    a scalar the wrong way up a weight of amax 0.1 then decodes to 7e7; no weight is larger than 1e4 (fp16 ends at
                              65504), so that is where we stop

What this module does not do: know any one layout. Unequal scalars inside q/k/v or gate/up are not its matter either:
each linear decodes with its own, and the group is computed one by one (attach.py).

Shape suffixes: N rows (output features), K columns (input features), G = K/16 blocks, K2 = K/2 bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qerl_compile.errors import FormatError
from qerl_compile.formats.e2m1 import MAX_VALUE
from qerl_compile.formats.nvfp4 import BLOCK, PackedNVFP4
from qerl_compile.safetensors_header import TensorEntry
from qerl_compile.wording import refuse_checkpoint, shown

LARGEST_WEIGHT = 1e4
SCALAR_SHAPES = ((1,), ())
# 16-bit scalars are exact in float32; compressed-tensors' divisors are bf16 numbers, and its KV scales are stored so.
SCALAR_DTYPES = ("F32", "BF16", "F16")


class Form(NamedTuple):
    """What a tensor's header may say."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


SCALAR = Form(SCALAR_SHAPES, SCALAR_DTYPES)


@dataclass(frozen=True)
class PackedLinear:
    """The tensors that make one packed weight [N, K], by their names in the checkpoint.

    Attributes:
        codes: U8 [N, K/2], the even column in the low nibble.
        block_scale: F8_E4M3, [N, K/16] as the format has it, or what `stored_blocks` says.
        global_scale: one number; None if the format has only block scales, which is a multiplier of 1.
        direction: which way the scalars of this linear go, global and input.
        input_scale: one number, the calibrated scale of the input, if there is one.
        stored_blocks: (N, G) → shape in which the file holds the block scales.
        ordered_blocks: (block scales as stored, N, G) → [N, G].
    """

    codes: str
    block_scale: str
    global_scale: str | None
    direction: Literal["divisor", "multiplier"]
    input_scale: str | None = None
    stored_blocks: Callable[[int, int], tuple[int, int]] | None = None
    ordered_blocks: Callable[[Tensor, int, int], Tensor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that have to arrive before `assemble`."""
        given = (self.codes, self.block_scale, self.global_scale, self.input_scale)
        return tuple(name for name in given if name is not None)

    def forms(self, rows: int, columns: int) -> dict[str, Form]:
        """Say what the headers must hold for a weight [rows, columns]."""
        blocks = columns // BLOCK
        stored = (rows, blocks) if self.stored_blocks is None else self.stored_blocks(rows, blocks)
        forms = {
            self.codes: Form(((rows, columns // 2),), ("U8",)),
            self.block_scale: Form((stored,), ("F8_E4M3",)),
        }
        return forms | {name: SCALAR for name in (self.global_scale, self.input_scale) if name is not None}

    def assemble(self, read: Mapping[str, Tensor], files: Mapping[str, Path]) -> tuple[PackedNVFP4, Tensor | None]:
        """Make the packed weight of what was read.

        Args:
            read: the tensors `names`, all on one device.
            files: the shard of each, for errors.

        Returns:
            the weight, and the scale of its input as float32 [1] in the same direction, or None.

        Raises:
            CheckpointError: a value that the format does not allow; names file and tensor.
        """
        codes_NK2, stored = read[self.codes], read[self.block_scale]
        _judge_blocks(stored, f"{files[self.block_scale]}: tensor {shown(self.block_scale)}")
        rows, blocks = codes_NK2.shape[0], codes_NK2.shape[1] * 2 // BLOCK
        block_NG = stored if self.ordered_blocks is None else self.ordered_blocks(stored, rows, blocks)
        if self.global_scale is None:
            scalar, where = torch.ones(1, device=codes_NK2.device), self.block_scale
        else:
            scalar, where = positive_scalar(self.global_scale, read, files), self.global_scale
        try:
            packed = PackedNVFP4(codes_NK2, block_NG, scalar, self.direction)
        except FormatError as fault:  # what headers do not show, such as an empty matrix
            refuse_checkpoint(f"{files[where]}: {self.codes}", fault.expected, fault.got, do=fault.do)
        _judge_magnitude(packed, f"{files[where]}: tensor {shown(where)}")
        return packed, None if self.input_scale is None else positive_scalar(self.input_scale, read, files)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's headers and configs say about its packed weights.

    Attributes:
        label: name of the format, for messages.
        linears: module path → its tensors.
        kv_scales: tensor name → (path of the attention module, "k_scale" or "v_scale"); each one number, a multiplier.
        unread: tensors that are passed over.
        notes: what a user has to be told about it, a sentence each.
    """

    label: str
    linears: Mapping[str, PackedLinear] = field(default_factory=dict)
    kv_scales: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


SIXTEEN_BIT_INPUTS = (
    "It was made for activations in 4 bits; here they stay in 16 bits. Its input scales, if any, are kept for exports."
)


def require(path: str, names: Mapping[str, str], tensors: Mapping[str, TensorEntry], root: Path) -> None:
    """Refuse a packed module of which a tensor is missing.

    Args:
        path: the module.
        names: full tensor name → what it is, in a reader's words.
        tensors: what the checkpoint has.
        root: the directory, for errors.

    Raises:
        CheckpointError: naming the module and what it lacks.
    """
    missing = {name: what for name, what in names.items() if name not in tensors}
    if missing:
        refuse_checkpoint(
            f"{root}: {path}",
            f"the tensors {', '.join(name.removeprefix(f'{path}.') for name in names)}",
            ", ".join(f"no {name.removeprefix(f'{path}.')} ({what})" for name, what in missing.items()),
            do="Export the checkpoint again.",
        )


def positive_scalar(name: str, read: Mapping[str, Tensor], files: Mapping[str, Path]) -> Tensor:
    """Return the scale called `name` as float32 [1].

    Raises:
        CheckpointError: zero, negative or not finite.
    """
    scalar = read[name].float().reshape(1)
    value = scalar.item()
    if not 0.0 < value < float("inf"):
        refuse_checkpoint(
            f"{files[name]}: tensor {shown(name)}",
            "a finite and positive scale",
            repr(value),
            do="Quantize this layer again, or leave it dense; ModelOpt writes 0 for a weight that is all zero.",
        )
    return scalar


def _judge_blocks(stored: Tensor, where: str) -> None:
    """E4M3 as bytes: 0x7F and 0xFF are NaN, from 0x80 on there is a sign."""
    numbers = stored.view(torch.uint8)
    if numbers.max().item() <= 0x7E:
        return
    nan = int((numbers & 0x7F == 0x7F).sum())
    signed = int((numbers > 0x7F).sum()) - int((numbers == 0xFF).sum())
    faults = [f"NaN in {nan}"] if nan else []
    faults += [f"a sign in {signed}"] if signed else []
    refuse_checkpoint(
        where,
        "block scales without NaN and without a sign",
        f"{' and '.join(faults)} of {numbers.numel()}",
        do="Quantize this layer again, or leave it dense; ModelOpt writes NaN for a weight that is all zero.",
    )


def _judge_magnitude(packed: PackedNVFP4, where: str) -> None:
    largest_block = packed.block_decode_scale_NG.view(torch.uint8).max().view(torch.float8_e4m3fn).float()
    largest = (largest_block * MAX_VALUE * packed.decode_scale).item()
    if not largest <= LARGEST_WEIGHT:
        refuse_checkpoint(
            where,
            f"a scale that decodes to weights of at most {LARGEST_WEIGHT:g}",
            f"{packed.global_scale.item():g}, a {packed.direction}, which decodes to as much as {largest:g}",
            do="Write its reciprocal: compressed-tensors stores 2688/amax, ModelOpt and torchao amax/2688.",
        )
