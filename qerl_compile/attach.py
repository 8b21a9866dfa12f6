"""The state half of a transformation: what modules own, and the links that can be derived from it.

Two kinds of state. What a module *owns* is canonical and saved: packed weights, LoRA factors, norm weights, the
base's and the trained.
*Links* are derived and can be rebuilt at any time: ghosts, decode scales, the fused storage of a group, and the owner
marks through which graphs find tensors. `unlink` drops the links and `link` makes them, so a move to another device
or a deep copy is: unlink, move or copy what is owned, link.

`Attacher` takes weights one at a time, from memory or from a file. A group (q/k/v, gate/up) waits until its last
member has arrived, because its members are quantized with one shared amax; everything else is quantized at once and its
bf16 form dropped, so full precision never coexists with the packed model.

A group is laid into its fused storage as soon as it is packed, while the members' own storage can still serve the next
group. Done at the end, it would leave the allocator of a GPU with the holes of all groups: 6.6 GB for 32B.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.errors import GraphError, ModelError
from qerl_compile.expert_filling import PackedFilling
from qerl_compile.formats.nvfp4 import BLOCK, PackedNVFP4
from qerl_compile.graph import clear_owner, held_tensor, leaf_tensor, set_owner
from qerl_compile.isolation import captured_by_others
from qerl_compile.passes import Experts, LoRA, Noise, Quantize, Sparsify, TrainedNorms
from qerl_compile.passes.adapt import DERIVED as OF_ROLLOUTS
from qerl_compile.passes.experts import PackedStack, link_stack, refresh, unlink_stack
from qerl_compile.passes.quantize import INPUT_SCALES, add_ghost, derived_decode_scale, share_storage
from qerl_compile.passes.sparsify import sparse_2_4
from qerl_compile.plan import Plan


class Attacher:
    """Attaches a plan's state to a model whose weights arrive in any order."""

    def __init__(self, model: nn.Module, plan: Plan, *, seed: int = 0) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self._waiting: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._places = plan.places()
        self._filling: dict[str, PackedFilling] = {}

    def weight(self, path: str, weight: Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Take the dense weight [N, K] of the quantize site `path`; keep no reference once its group is packed.

        Args:
            path: module path, one of `plan.quantize`; or of a virtual linear of packed experts (expert_stacks.py).
            weight: in the dtype of the checkpoint, which decides the bytes.
            dtype: what the model computes in; None is the weight's own.
        """
        if path in self._places:
            self._stack_of(path).weight(path, weight, dtype or weight.dtype)
            return
        self._dtypes[path] = dtype or weight.dtype
        self._waiting[path] = weight
        group = self.plan.group_of(path)
        if all(member in self._waiting for member in group):
            self._pack(group)

    def _pack(self, members: Iterable[str]) -> None:
        weights = {member: self._waiting.pop(member) for member in members}
        site = self.plan.quantize[next(iter(weights))]  # that of all members
        sparse = {path: sparse_2_4(w) if path in self.plan.sparse else w for path, w in weights.items()}
        for member, packed in site.pack(sparse).items():
            self.packed(member, packed, self._dtypes.pop(member))

    def packed(self, path: str, packed: PackedNVFP4, dtype: torch.dtype, *, input_scale: Tensor | None = None) -> None:
        """Take an already packed weight.

        Args:
            path: module path.
            packed: its weight.
            dtype: what the model computes in.
            input_scale: calibrated scale of the module's input, float32 [1], in the direction of the weight's scalar;
                kept for exports, except that of an expert.
        """
        if path in self._places:
            self._stack_of(path).packed(path, packed, dtype)
            return
        module = self.model.get_submodule(path)
        Quantize.state(module, packed, dtype)
        if input_scale is not None:
            module.register_buffer(INPUT_SCALES[packed.direction], input_scale)
        group = self.plan.group_of(path)
        if group in self.plan.groups and all(self._is_packed(member) for member in group) and self._one_scale(group):
            share_storage([self.model.get_submodule(member) for member in group])

    def experts(self, name: str, dense_ENK: Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Take a whole stack of experts [E, N, K], one of `plan.experts`, in the dtypes of `weight`."""
        for path, place in self.plan.experts[name][0].places.items():
            self.weight(path, dense_ENK[place.expert, place.rows], dtype=dtype)

    def _is_packed(self, path: str) -> bool:
        return leaf_tensor(self.model.get_submodule(path), "weight_packed") is not None

    def _stack_of(self, path: str) -> PackedFilling:
        name = self._places[path].stack
        if name not in self._filling:
            stack, site = self.plan.experts[name]
            module = self.model.get_submodule(stack.module)
            self._filling[name] = PackedFilling(module, stack, site, partial(self._filling.pop, name))
        return self._filling[name]

    def finish(self) -> Plan:
        """Attach adapters, trained weights and norms, and noise, link, freeze all else; return the plan as carried out.

        Groups whose members came packed with unequal global scales are dropped from the plan: one GEMM has one scale.
        If some members came packed and others dense, the dense ones share an amax among themselves.
        """
        for group in self.plan.groups:
            left = [member for member in group if member in self._waiting]
            if left:
                self._pack(left)
        plan = replace(self.plan, groups=tuple(group for group in self.plan.groups if self._one_scale(group)))
        self.model.requires_grad_(False)
        for path in plan.sparse:
            if path not in plan.quantize:
                Sparsify.state(self.model.get_submodule(path), trained=path in plan.trained_weights)
        for path in plan.trained_weights:
            self.model.get_submodule(path).get_parameter("weight").requires_grad_(True)
        generator = torch.Generator().manual_seed(self.seed)
        for path, site in plan.lora.items():
            module = self.model.get_submodule(path)
            LoRA.state(module, held_tensor(module, "weight"), site, generator)
        for path in plan.trained_norms:
            module = self.model.get_submodule(path)
            TrainedNorms.state(module, held_tensor(module, "weight"))
        for path in plan.noise:
            module = self.model.get_submodule(path)
            Noise.state(module, held_tensor(module, "weight"))
        for path in plan.quantize:
            guard(self.model.get_submodule(path), path)
        for path in set(plan.owners()).difference(plan.quantize):
            self.model.get_submodule(path).register_load_state_dict_pre_hook(_refuse_assign)
        for path in dict.fromkeys(stack.module for stack, _ in plan.experts.values()):
            guard(self.model.get_submodule(path), path)
        link(self.model, plan)
        return plan

    def _one_scale(self, group: tuple[str, ...]) -> bool:
        decode_scales = [derived_decode_scale(self.model.get_submodule(path)) for path in group]
        return all(each.is_meta or torch.equal(each, decode_scales[0]) for each in decode_scales)


def attach_shapes(model: nn.Module, plan: Plan, *, seed: int = 0) -> Plan:
    """Attach a plan to a model on the meta device: everything has its shape and dtype, and no weight is there.

    Returns:
        The plan as carried out.
    """
    attacher = Attacher(model, plan, seed=seed)
    with torch.no_grad(), torch.device("meta"):  # adapters are drawn on the default device
        for path in plan.quantize:
            weight = held_tensor(model.get_submodule(path), "weight")
            attacher.packed(path, PackedNVFP4(*_shapes(*weight.shape), torch.empty(1), "divisor"), weight.dtype)
        for stack, _ in plan.experts.values():
            module, experts, parts = model.get_submodule(stack.module), len(stack.members), len(stack.members[0])
            shapes = _shapes(experts, stack.rows, stack.columns)
            packed = PackedStack(*shapes, torch.empty(experts, parts), "divisor")
            Experts.state(module, stack.leaf, packed, module.get_parameter(stack.leaf).dtype)
        return attacher.finish()


def _shapes(*size: int) -> tuple[Tensor, Tensor]:
    """Return codes and block scales of a packed tensor [..., K] on the default device, unwritten."""
    *rows, columns = size
    codes = torch.empty(*rows, columns // 2, dtype=torch.uint8)
    return codes, torch.empty(*rows, columns // BLOCK, dtype=torch.float8_e4m3fn)


def link(model: nn.Module, plan: Plan) -> None:
    """Derive ghosts, decode scales, fused storage and owner marks from what the modules own."""
    for path in plan.quantize:
        add_ghost(model.get_submodule(path))
    for group in plan.groups:
        share_storage([model.get_submodule(path) for path in group])
    for path in plan.owners():
        module = model.get_submodule(path)
        set_owner(held_tensor(module, "weight"), module)
    matrices: dict[tuple[object, ...], Tensor] = {}
    for stack, _ in plan.experts.values():
        link_stack(model.get_submodule(stack.module), stack.leaf, matrices)


def unlink(model: nn.Module, plan: Plan) -> None:
    """Drop every derived tensor and owner mark; the model cannot run until `link`.

    What rollouts derive (stacked_adapters.py) is dropped too, and made again by the next rollout.
    """
    dense = [path for group in plan.dense_groups for path in group]
    for path in {*plan.owners(), *dense}:
        clear_owner(held_tensor(model.get_submodule(path), "weight"))
    for path in {*plan.quantize, *plan.lora, *dense}:
        ghost = ("weight",) if path in plan.quantize else ()
        module = model.get_submodule(path)
        for derived in (*ghost, "decode_scale", "fused_packed", "fused_scale", *OF_ROLLOUTS):
            module._buffers.pop(derived, None)
            module._non_persistent_buffers_set.discard(derived)
    for stack, _ in plan.experts.values():
        unlink_stack(model.get_submodule(stack.module), stack.leaf)


def guard(module: nn.Module, path: str) -> None:
    """Refuse what would read a ghost or break a link: a call outside a rewritten graph, an assigned state_dict."""
    module.register_forward_pre_hook(_RefuseEagerCall(path))
    module.register_load_state_dict_pre_hook(_refuse_assign)
    module.register_load_state_dict_post_hook(_refresh)


class _RefuseEagerCall:
    """Forward pre-hook of a packed module. Dynamo traces it as nothing; plain Python gets an error that names it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() or captured_by_others():
            raise GraphError(
                where=self.path,
                expected="a call from inside a rewritten graph",
                got="a call in plain Python, where the packed weight is a ghost (NaN)",
                do="Call the whole model, or dequantize(...) the weight with qerl_compile.formats.nvfp4.",
            )


def _refuse_assign(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        raise ModelError(
            where=prefix.removesuffix("."),
            expected="load_state_dict(..., assign=False), which copies into the tensors that graphs look up",
            got="assign=True, which would put others in their place",
            do="Drop assign=True.",
        )


def _refresh(module: nn.Module, _: Any) -> None:
    if "dense_dtypes" in vars(module):
        refresh(module)
        return
    module.get_buffer("decode_scale").copy_(derived_decode_scale(module))
