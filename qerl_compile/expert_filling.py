"""Stacks of experts are filled matrix by matrix, as their virtual linears arrive in any order.

    PackedFilling   quantizes an expert's matrices as soon as those that share an amax are there (gate and up), or takes
                    packed ones; the stack's codes and scales are allocated once, at the first
    put_expert      the same for a stack that stays dense

So neither a whole stack in full precision nor a second copy of the packed one exists at any time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qerl_compile.errors import FormatError
from qerl_compile.expert_stacks import Place, Stack
from qerl_compile.formats.nvfp4 import BLOCK, PackedNVFP4
from qerl_compile.passes import Experts, QuantizeSite
from qerl_compile.passes.experts import PackedStack


class PackedFilling:
    """One stack that is being packed.

    Args:
        module: owns it.
        stack: its virtual linears.
        site: how dense ones are quantized.
        done: called when the stack is complete and the module holds it.
    """

    def __init__(self, module: nn.Module, stack: Stack, site: QuantizeSite, done: Callable[[], object]) -> None:
        self.module, self.stack, self.site, self.done = module, stack, site, done
        self._waiting: dict[str, Tensor] = {}
        self._missing = set(stack.places)
        self._filled: PackedStack | None = None

    def weight(self, path: str, weight: Tensor, dtype: torch.dtype) -> None:
        """Take a dense matrix [N/P, K]; `dtype` is what the model computes in.

        Raises:
            FormatError: NaN or Inf.
        """
        self._waiting[path] = weight
        parts = self.stack.members[self.stack.places[path].expert]
        if all(part in self._waiting for part in parts):
            for part, packed in self.site.pack({part: self._waiting.pop(part) for part in parts}).items():
                self.packed(part, packed, dtype)

    def packed(self, path: str, packed: PackedNVFP4, dtype: torch.dtype) -> None:
        """Take a packed matrix [N/P, K].

        Raises:
            FormatError: its scalar goes the other way than those before.
        """
        if self._filled is None:
            self._filled = self._allocated(packed)
        into = self._filled
        if packed.direction != into.direction:
            raise FormatError(
                where=path,
                expected=f"a {into.direction}, like the scales of the other experts",
                got=f"a {packed.direction}",
                do="Write all experts of a layer in one format.",
            )
        place = self.stack.places[path]
        into.codes_ENK2[place.expert, place.rows] = packed.codes_NK2
        # torch assigns no float8 slices on every device; bytes it does
        blocks = into.block_decode_scale_ENG.view(torch.uint8)
        blocks[place.expert, place.rows] = packed.block_decode_scale_NG.view(torch.uint8)
        into.global_scale_EP[place.expert, place.rows.start // self.stack.part_rows] = packed.global_scale[0]
        self._missing.discard(path)
        if not self._missing:
            Experts.state(self.module, self.stack.leaf, into, dtype)
            self.done()

    def _allocated(self, first: PackedNVFP4) -> PackedStack:
        experts, rows, columns = len(self.stack.members), self.stack.rows, self.stack.columns
        with first.codes_NK2.device:
            return PackedStack(
                torch.empty(experts, rows, columns // 2, dtype=torch.uint8),
                torch.empty(experts, rows, columns // BLOCK, dtype=torch.float8_e4m3fn),
                torch.empty(experts, len(self.stack.members[0])),
                first.direction,
            )


def put_expert(module: nn.Module, stack: Stack, place: Place, tensor: Tensor, dtype: torch.dtype) -> None:
    """Copy a dense matrix [N/P, K] into a module's stack [E, N, K], which is allocated at the first, frozen."""
    held = module.get_parameter(stack.leaf)
    if held.is_meta:
        whole = torch.empty(held.shape, dtype=dtype, device=tensor.device)
        held = module._parameters[stack.leaf] = nn.Parameter(whole, requires_grad=False)
    held.data[place.expert, place.rows] = tensor.to(dtype)
