"""What rollout graphs read beside the packed weights: stacked adapters, and dense groups as one tensor.

    stacked_lora_A [R, K], stacked_lora_B [N, R]   per group or lone linear with an adapter, in the model's dtype
    fused_weight [N, K]                            per dense group; the members' own weights are row slices of it
    fused_bias [N]                                 per group whose members have biases; likewise slices

passes/adapt.py says how the stacked factors are laid out. All of it is *derived* (attach.py): not saved, dropped by
`unlink`, made by the first rollout and not before, since a model that only trains has no use for it.

**In place.** The float32 masters change with every optimizer step. `refresh_stacked_adapters` rounds them into buffers
that stay where they are, so that CUDA graphs which were captured over them compute with the new adapters. It returns
True when buffers had to be made, which is when graphs captured earlier must be thrown away.

**Memory.** The stacked factors are extra: about (ΣR·K + N·ΣR) elements per group, 0.9 GB for Qwen2.5-32B at rank 32 in
bf16. The fused tensors are not: they take the place of the members', with one group in memory twice while it is copied.

**Rounding.** A training graph rounds A and multiplies h by alpha / rank; here alpha / rank · A is rounded once. The two
are equal where alpha / rank is a power of two.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qerl_compile.graph import held_tensor, leaf_tensor, set_owner
from qerl_compile.passes import Adapt
from qerl_compile.passes.adapt import blocks
from qerl_compile.passes.quantize import lay_together
from qerl_compile.transforming import state_of


@torch.inference_mode(False)  # a buffer made in inference mode could never be written to outside of it
@torch.no_grad()
def attach_stacked_adapters(model: nn.Module) -> bool:
    """Make the buffers that rollout graphs read, where they are missing or no longer shared with the members.

    Args:
        model: a transformed model.

    Returns:
        Whether anything was made; stacked factors are then zero until `refresh_stacked_adapters`.

    Raises:
        ModelError: the model is not transformed.
    """
    plan, modules, made = state_of(model).plan, dict(model.named_modules()), False
    for group in plan.dense_groups:
        members = list(_members(modules, group).values())
        made |= lay_together(members, "weight", "fused_weight")
        for module in members:
            set_owner(held_tensor(module, "weight"), module)
    for group in (*plan.groups, *plan.dense_groups):
        members = list(_members(modules, group).values())
        if all(leaf_tensor(module, "bias") is not None for module in members):
            made |= lay_together(members, "bias", "fused_bias")
    for group in plan.adapted():
        if leaf_tensor(modules[group[0]], "stacked_lora_A") is None:
            Adapt.state(_members(modules, group), plan.lora)
            made = True
    return made


@torch.no_grad()
def refresh_stacked_adapters(model: nn.Module) -> bool:
    """Copy the adapters' current values into the stacked buffers, which are made first if need be.

    Args:
        model: a transformed model.

    Returns:
        Whether buffers were made, so that CUDA graphs captured earlier read freed memory.

    Raises:
        ModelError: the model is not transformed.
    """
    made = attach_stacked_adapters(model)
    plan, modules = state_of(model).plan, dict(model.named_modules())  # looking each path up walks the tree each time
    sites = plan.lora
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for group in plan.adapted():
        members = _members(modules, group)
        a_RK, b_NR = (held_tensor(members[group[0]], name) for name in ("stacked_lora_A", "stacked_lora_B"))
        for path, block in blocks(members, sites).items():
            if path in sites:
                lora_A, lora_B = (held_tensor(members[path], name) for name in ("lora_A", "lora_B"))
                targets.append(b_NR[block.rows, block.ranks])
                sources.append(lora_B)
                if sites[path].alpha == sites[path].rank:
                    targets.append(a_RK[block.ranks])
                    sources.append(lora_A)
                else:
                    torch.mul(lora_A, sites[path].alpha / sites[path].rank, out=a_RK[block.ranks])
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]  # torch.optim uses it as well
    return made


def _members(modules: Mapping[str, nn.Module], paths: Sequence[str]) -> dict[str, nn.Module]:
    return {path: modules[path] for path in paths}
