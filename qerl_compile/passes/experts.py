"""Lower grouped products of packed experts to `qerl::grouped_quantized_linear`.

    before      y = torch._grouped_mm(x, transpose(W, -2, -1), offs=offsets)      W: a ghost [E, N, K]
    after       y = qerl::grouped_quantized_linear(x, offsets, codes, block_decode_scale, decode_scale)

What a module owns whose tensor `gate_up_proj` [E, N, K] is packed; `down_proj` likewise:

    gate_up_proj_packed         Parameter  uint8   [E, N, K/2]    codes, even column in the low nibble
    gate_up_proj_scale          Parameter  e4m3    [E, N, K/16]   block decode scale
    gate_up_proj_global_scale   buffer     float32 [E, P]         a divisor for every expert and part (gate, up); or
    gate_up_proj_scale_2        buffer     float32 [E, P]         multipliers, read from ModelOpt or torchao. One of two
    gate_up_proj_decode_scale   buffer     float32 [E, P]         derived multipliers, or [E, 1] where parts agree
    gate_up_proj                buffer     ghost   [E, N, K]      not saved

Scalars stay as their source wrote them, for the same reason as in quantize.py. Every expert has its own, as in files;
the parts of an expert (w1 and w3) share one where we quantize, since engines load them into one matrix.

The ghost has the strides of a matrix, (0, K, 1): torch's grouped product looks at strides while it is traced, before
any pass can remove it. So it needs memory for one matrix, which all ghosts of one shape in a model share.

What is not done here: adapters on experts. LoRA goes to ordinary linears, such as those of attention; and noise stays
off the norm before the router, which it would make choose other experts (regions.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.graph import Program, held_tensor, leaf_tensor, set_owner
from qerl_compile.grouped_nodes import grouped_products
from qerl_compile.kernels import grouped as _grouped  # noqa: F401  # registers the operators
from qerl_compile.passes.quantize import Direction

SCALARS: dict[Direction, str] = {"divisor": "global_scale", "multiplier": "scale_2"}
"""Where a packed stack holds its scalars, after the tensor's own name; it has exactly one of the two."""
DERIVED = ("", "_decode_scale")


@dataclass(frozen=True, eq=False)
class PackedStack:
    """A packed stack [E, N, K].

    Attributes:
        codes_ENK2: uint8 [E, N, K/2].
        block_decode_scale_ENG: float8_e4m3fn [E, N, K/16].
        global_scale_EP: float32 [E, P], exactly as their source gave them.
        direction: which way these go.
    """

    codes_ENK2: Tensor
    block_decode_scale_ENG: Tensor
    global_scale_EP: Tensor
    direction: Direction

    def part(self, expert: int, part: int) -> PackedNVFP4:
        """Return one virtual linear; its tensors are slices and no copies.

        Raises:
            FormatError: the state breaks the format, because something wrote into it.
        """
        step = self.codes_ENK2.shape[1] // self.global_scale_EP.shape[1]
        rows = slice(part * step, (part + 1) * step)
        scalar = self.global_scale_EP[expert, part].reshape(1)
        codes, block = self.codes_ENK2[expert, rows], self.block_decode_scale_ENG[expert, rows]
        return PackedNVFP4(codes, block, scalar, self.direction)


@dataclass(frozen=True)
class Experts:
    """Lowers the grouped products with the stacks `stacks` (tensor names)."""

    stacks: frozenset[str]

    @staticmethod
    def state(module: nn.Module, leaf: str, packed: PackedStack, dtype: torch.dtype) -> None:
        """Replace the module's tensor `leaf` by its packed form; `dtype` is what the dense one had."""
        module.register_parameter(f"{leaf}_packed", nn.Parameter(packed.codes_ENK2, requires_grad=False))
        module.register_parameter(f"{leaf}_scale", nn.Parameter(packed.block_decode_scale_ENG, requires_grad=False))
        module.register_buffer(f"{leaf}_{SCALARS[packed.direction]}", packed.global_scale_EP)
        module._parameters.pop(leaf, None)
        vars(module).setdefault("dense_dtypes", {})[leaf] = dtype  # outlives the ghost, which is derived from it

    def __call__(self, program: Program) -> None:
        """Rewrite every product with one of the stacks."""
        for node, x, offsets, weight in list(grouped_products(program)):
            name = str(weight.target)
            if name not in self.stacks:
                continue
            turned = node.args[1]
            with program.replacing(node) as result:
                operands = [program.weight(f"{name}_{own}") for own in ("packed", "scale", "decode_scale")]
                result.append(program.call(torch.ops.qerl.grouped_quantized_linear.default, x, offsets, *operands))
            for dead in (turned, weight):
                if isinstance(dead, torch.fx.Node) and not dead.users:
                    program.graph.erase_node(dead)


def packed_stack_of(module: nn.Module, leaf: str) -> PackedStack | None:
    """Return the packed form of a module's tensor `leaf`, or None if it is dense. Tensors are the module's own."""
    codes_ENK2 = leaf_tensor(module, f"{leaf}_packed")
    if codes_ENK2 is None:
        return None
    direction, scalar_EP = _scalars(module, leaf)
    return PackedStack(codes_ENK2.detach(), held_tensor(module, f"{leaf}_scale").detach(), scalar_EP, direction)


def _scalars(module: nn.Module, leaf: str) -> tuple[Direction, Tensor]:
    for direction, scalar in SCALARS.items():
        scalar_EP = leaf_tensor(module, f"{leaf}_{scalar}")
        if scalar_EP is not None:
            return direction, scalar_EP
    raise AttributeError(f"{type(module).__name__} holds no scalars of {leaf}")


def link_stack(module: nn.Module, leaf: str, matrices: dict[tuple[object, ...], Tensor]) -> None:
    """Derive the ghost and the decode scales of a packed stack, and let the ghost know its module.

    Args:
        module: owns the stack.
        leaf: what it calls the tensor.
        matrices: NaN matrices made so far, by shape, dtype and device; ghosts of one shape share one.
    """
    codes_ENK2 = module.get_parameter(f"{leaf}_packed")
    experts, rows, bytes_in = codes_ENK2.shape
    key = (rows, 2 * bytes_in, vars(module)["dense_dtypes"][leaf], codes_ENK2.device)
    if key not in matrices:
        matrices[key] = torch.full(key[:2], float("nan"), dtype=key[2], device=key[3])
    ghost = matrices[key].expand(experts, -1, -1)
    set_owner(ghost, module)
    module.register_buffer(leaf, ghost, persistent=False)
    module.register_buffer(f"{leaf}_decode_scale", decode_scales(module, leaf), persistent=False)


def unlink_stack(module: nn.Module, leaf: str) -> None:
    """Undo `link_stack`."""
    for suffix in DERIVED:
        module._buffers.pop(f"{leaf}{suffix}", None)
        module._non_persistent_buffers_set.discard(f"{leaf}{suffix}")


def decode_scales(module: nn.Module, leaf: str) -> Tensor:
    """Return the multipliers that the stored scalars stand for: float32 [E, P], or [E, 1] where parts agree."""
    direction, scalar_EP = _scalars(module, leaf)
    decode_EP = scalar_EP.reciprocal() if direction == "divisor" else scalar_EP.clone()
    agree = decode_EP.is_meta or bool((decode_EP == decode_EP[:, :1]).all())
    return decode_EP[:, :1].contiguous() if agree else decode_EP


def refresh(module: nn.Module) -> None:
    """Derive the decode scales again, in place where graphs may hold them, after a state_dict was loaded."""
    for leaf in vars(module)["dense_dtypes"]:
        held, derived = module.get_buffer(f"{leaf}_decode_scale"), decode_scales(module, leaf)
        if held.shape == derived.shape:
            held.copy_(derived)
        else:
            module.register_buffer(f"{leaf}_decode_scale", derived, persistent=False)
