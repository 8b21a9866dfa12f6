"""Lower linears of packed modules to `qerl::quantized_linear`.

    before      y = linear(x, W, b)                                    W: a ghost [N, K]
    after       y = qerl::quantized_linear(x, codes, block_decode_scale, decode_scale) + b

    before      f = linear(x, cat([Wq, Wk, Wv]), b)                    what the fuse pass left
    after       f = qerl::quantized_linear(x, fused codes, fused block_decode_scale, decode_scale) + b

What a packed module owns (ARCHITECTURE.md, "One copy of the weights"). Names and layout are those of
compressed-tensors' checkpoints, so that the module's state_dict is the serving file:

    weight_packed        Parameter  uint8   [N, K/2]     codes, even column in the low nibble
    weight_scale         Parameter  e4m3    [N, K/16]    block decode scale
    weight_global_scale  buffer     float32 [1]          the source scalar, 2688 / amax: a divisor; or, read from
    weight_scale_2       buffer     float32 [1]          ModelOpt or torchao, amax / 2688: a multiplier. One of the two
    decode_scale         buffer     float32 []           derived, the scalar as a multiplier; not saved
    weight               buffer     ghost   [N, K]       not saved
    fused_packed, fused_scale                            first member of a group only; not saved: the members' own
                                                         tensors are row slices of these, so there is one copy

The scalar stays under the name and in the direction of its source, because 1/(1/x) is not always x: a model that was
read from either dialect is exported to that dialect bit for bit. `packed_of` is the one reader of this state.

A checkpoint made for 4-bit activations brings a calibrated scale of each linear's input, and it is kept for exports:
`input_global_scale` (float32 [1], a divisor) or `input_scale` (float32 [1], a multiplier), a buffer of the packed
module. Nothing here computes with it: activations stay in 16 bits.

The codes are frozen Parameters and not buffers because sharding engines shard parameters and leave buffers replicated.

What this pass does not do: bias. A bias stays dense and is added after, in the activation's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.graph import LINEAR, Program, leaf_tensor, linear_parts, make_ghost
from qerl_compile.kernels import ops as _ops  # noqa: F401  # registers the qerl:: operators

Direction = Literal["divisor", "multiplier"]
GLOBAL_SCALES: dict[Direction, str] = {"divisor": "weight_global_scale", "multiplier": "weight_scale_2"}
"""Where a packed module holds the scalar of its matrix; it has exactly one of the two."""
INPUT_SCALES: dict[Direction, str] = {"divisor": "input_global_scale", "multiplier": "input_scale"}
"""Where it holds the calibrated scale of its input, if it has one."""
CACHE_SCALES = ("k_scale", "v_scale")
"""Where an attention module holds calibrated scales of its keys and values, if it has any: multipliers."""


@dataclass(frozen=True)
class Quantize:
    """Lowers the linears of `sites` (module paths), and the fused linears of `groups` (tuples of such paths)."""

    sites: frozenset[str]
    groups: tuple[tuple[str, ...], ...] = ()

    @staticmethod
    def state(module: nn.Module, packed: PackedNVFP4, dtype: torch.dtype) -> None:
        """Replace the module's `weight` by its packed form; `dtype` is what the dense weight had, and the ghost has."""
        module.weight_packed = nn.Parameter(packed.codes_NK2, requires_grad=False)
        module.weight_scale = nn.Parameter(packed.block_decode_scale_NG, requires_grad=False)
        for leaf in GLOBAL_SCALES.values():
            module._buffers.pop(leaf, None)
        module.register_buffer(GLOBAL_SCALES[packed.direction], packed.global_scale)
        module._parameters.pop("weight", None)
        vars(module)["dense_dtype"] = dtype  # outlives the ghost, which is derived from it
        add_ghost(module)

    def __call__(self, program: Program) -> None:
        """Rewrite every linear of a site and every fused linear of a group."""
        for node in list(program.graph.find_nodes(op="call_function", target=LINEAR)):
            x, weight, bias = linear_parts(node)
            path = self._packed_path(weight)
            if path is None:
                continue
            names = ("weight_packed", "weight_scale") if weight.op == "get_attr" else ("fused_packed", "fused_scale")
            with program.replacing(node) as result:
                operands = [program.weight(f"{path}.{name}") for name in (*names, "decode_scale")]
                result.append(program.call(torch.ops.qerl.quantized_linear.default, x, *operands))
                if bias is not None:
                    result[:] = [program.call(torch.add, result[0], bias)]
            for dead in (weight, *weight.all_input_nodes):
                if not dead.users:
                    program.graph.erase_node(dead)

    def _packed_path(self, weight: fx.Node) -> str | None:
        """Return the module that owns the packed form of a linear's weight node, or None for a dense weight."""
        if weight.op == "get_attr":
            path = str(weight.target).removesuffix(".weight")
            return path if path in self.sites else None
        if weight.target is torch.cat:
            members = tuple(str(member.target).removesuffix(".weight") for member in weight.all_input_nodes)
            return members[0] if members in self.groups else None
        return None


def add_ghost(module: nn.Module) -> None:
    """Derive the ghost `weight` and `decode_scale` (multiplies) of a packed module from what it owns."""
    codes_NK2 = module.get_parameter("weight_packed")
    rows, bytes_in = codes_NK2.shape
    ghost = make_ghost((rows, 2 * bytes_in), vars(module)["dense_dtype"], codes_NK2.device)
    module.register_buffer("weight", ghost, persistent=False)
    module.register_buffer("decode_scale", derived_decode_scale(module), persistent=False)


def derived_decode_scale(module: nn.Module) -> Tensor:
    """Return the fp32 0-dim multiplier that the stored scalar stands for."""
    direction, scalar = _global_scale(module)
    scalar = scalar.float().reshape(())
    return scalar.reciprocal() if direction == "divisor" else scalar.clone()


def packed_of(module: nn.Module) -> PackedNVFP4 | None:
    """Return a module's packed weight, or None if it has none. The tensors are the module's own, not copies.

    Raises:
        FormatError: the state breaks the format, because something wrote into it.
    """
    codes_NK2, block_NG = leaf_tensor(module, "weight_packed"), leaf_tensor(module, "weight_scale")
    if codes_NK2 is None or block_NG is None:
        return None
    direction, scalar = _global_scale(module)
    return PackedNVFP4(codes_NK2.detach(), block_NG.detach(), scalar, direction)


def _global_scale(module: nn.Module) -> tuple[Direction, Tensor]:
    for direction, leaf in GLOBAL_SCALES.items():
        scalar = leaf_tensor(module, leaf)
        if scalar is not None:
            return direction, scalar
    raise AttributeError(f"{type(module).__name__} holds no tensor named {' or '.join(GLOBAL_SCALES.values())}")


def share_storage(members: Sequence[nn.Module]) -> None:
    """Lay the packed tensors of a fused group one after another and make the members' own tensors row slices of them.

    The group's memory is allocated once more while it is copied, and freed at once: two or three projections. A group
    that lies so already is left as it is.
    """
    for own, fused in (("weight_packed", "fused_packed"), ("weight_scale", "fused_scale")):
        lay_together(members, own, fused)


def lay_together(members: Sequence[nn.Module], own: str, fused: str) -> bool:
    """Give the first member a buffer `fused` with the rows of all, of which the Parameters `own` become slices.

    Returns:
        Whether it was done; not if they lie so already.
    """
    parts = [module.get_parameter(own) for module in members]
    whole = leaf_tensor(members[0], fused)
    if whole is not None and _are_slices(parts, whole):
        return False
    # torch concatenates no float8
    whole = torch.cat([part.data.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    members[0].register_buffer(fused, whole, persistent=False)
    start = 0
    for part in parts:
        part.data = whole[start : start + part.shape[0]]
        start += part.shape[0]
    return True


def _are_slices(parts: Sequence[Tensor], whole: Tensor) -> bool:
    start = 0
    for part in parts:
        same_storage = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if not same_storage or part.storage_offset() != start:
            return False
        start += part.numel()
    return True
