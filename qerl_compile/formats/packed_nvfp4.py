"""The one type that holds an NVFP4 weight, and what is always true of it.

The layout is that of serving checkpoints, row-major and unswizzled, so that exports are renames and sharding along N
keeps nibble pairs and blocks whole. Layouts that a kernel prefers are derived from it and never saved.

The matrix scale exists in two dialects that are each other's reciprocal, and most bugs of this format are one taken for
the other. So the type keeps the number as its source wrote it, together with its direction, and says `decode_scale`
for the number that multiplies. The source's number is kept because 1/(1/x) differs from x for one fp32 value in six.

Shape suffixes: N rows (output features), K columns (input features), G = K/16 blocks, K2 = K/2 bytes.
"""

from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor

from qerl_compile.errors import FormatError

BLOCK = 16


@dataclass(frozen=True, eq=False)
class PackedNVFP4:
    """A weight [N, K] in NVFP4, in the layout of serving checkpoints.

    The following conditions hold:
      * codes_NK2 is uint8 [N, K/2], the even column in the low nibble; N >= 1, K a positive multiple of 16.
      * block_decode_scale_NG is float8_e4m3fn [N, K/16], no NaN, no sign bit set.
      * global_scale is float32 [1], finite and positive, exactly as its source gave it.
      * direction is "divisor" (compressed-tensors, 2688/amax) or "multiplier" (ModelOpt, amax/2688).
      * all three tensors are on one device.
    Values are not looked at on the meta device.

    Raises:
        FormatError: one of these does not hold.
    """

    codes_NK2: Tensor
    block_decode_scale_NG: Tensor
    global_scale: Tensor
    direction: Literal["divisor", "multiplier"]

    def __post_init__(self) -> None:
        codes, block, global_scale = self.codes_NK2, self.block_decode_scale_NG, self.global_scale
        well_formed = codes.dtype == torch.uint8 and codes.ndim == 2 and codes.numel() > 0
        if not well_formed or codes.shape[1] * 2 % BLOCK:
            _refuse("codes_NK2", "uint8 [N, K/2], N >= 1, K a positive multiple of 16", _describe(codes))
        blocks = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
        if block.dtype != torch.float8_e4m3fn or tuple(block.shape) != blocks:
            _refuse("block_decode_scale_NG", f"float8_e4m3fn [N, K/16] = {list(blocks)}", _describe(block))
        if global_scale.dtype != torch.float32 or tuple(global_scale.shape) != (1,):
            _refuse("global_scale", "float32 [1]", _describe(global_scale))
        if self.direction not in ("divisor", "multiplier"):
            _refuse("direction", '"divisor" or "multiplier"', repr(self.direction))
        devices = {str(tensor.device) for tensor in (codes, block, global_scale)}
        if len(devices) > 1:
            _refuse("PackedNVFP4", "all three tensors on one device", ", ".join(sorted(devices)))
        if codes.device.type == "meta":
            return
        worst = block.view(torch.uint8).max().item()
        if worst > 0x7E:  # 0x7F is NaN, 0x80 and above carry a sign
            _refuse("block_decode_scale_NG", "no NaN, no sign bit set", f"byte 0x{worst:02X}")
        value = global_scale.item()
        if not 0.0 < value < float("inf"):
            _refuse("global_scale", "a finite and positive number", repr(value))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        return self.codes_NK2.shape[0], self.codes_NK2.shape[1] * 2

    @property
    def decode_scale(self) -> Tensor:
        """The matrix scale as a multiplier: fp32, 0-dim."""
        scalar = self.global_scale.squeeze(0)
        return scalar.reciprocal() if self.direction == "divisor" else scalar


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _refuse(where: str, expected: str, got: str) -> NoReturn:
    raise FormatError(where=where, expected=expected, got=got, do="Read it again from a valid NVFP4 checkpoint.")
