"""Low-rank adapters as graph nodes (Hu et al. 2021, arXiv 2106.09685).

    before      y = linear(x, W, b)
    after       h = linear(x, A.to(x.dtype)) * (alpha / r)
                y = linear(x, W, b) + linear(h, B.to(x.dtype))          A: [r, K], B: [N, r], float32

A starts uniform as in PEFT (Kaiming, a = √5) and B at zero, so the branch starts as the identity. Both are kept in
float32 whatever the model's dtype: at a learning rate of 1e-5 a bf16 master weight would lose most updates to
rounding. The casts are a few thousand elements, and the scaling multiplies `h` (r wide) rather than the output (N
wide).

What this pass does not do: merge. Adding B·A into a packed weight rounds the adapter away (design/ecosystem.md,
decision 4).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qerl_compile.graph import LINEAR, Program, linear_parts


@dataclass(frozen=True)
class LoraSite:
    """One adapter: its rank r and alpha; the branch is multiplied by alpha / r."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class LoRA:
    """Adds a low-rank branch to each linear in `sites` (module path → rank and alpha)."""

    sites: Mapping[str, LoraSite]

    @staticmethod
    def state(module: nn.Module, weight: Tensor, site: LoraSite, generator: torch.Generator | None = None) -> None:
        """Give the linear trainable float32 Parameters `lora_A` [r, K] and `lora_B` [N, r] on the weight's device.

        A is drawn on the CPU, so that a seed means the same adapter on every device.
        """
        features_out, features_in = weight.shape
        bound = 1 / math.sqrt(features_in)  # kaiming_uniform with a = sqrt(5)
        a_RK = torch.empty(site.rank, features_in).uniform_(-bound, bound, generator=generator)
        module.lora_A = nn.Parameter(a_RK.to(weight.device))
        module.lora_B = nn.Parameter(torch.zeros(features_out, site.rank, device=weight.device))
        vars(module).update(lora_rank=site.rank, lora_alpha=site.alpha)  # plain numbers, for adapter files

    def __call__(self, program: Program) -> None:
        """Rewrite every linear of a site."""
        for node, path in list(program.linears()):
            site = self.sites.get(path)
            if site is None:
                continue
            x = linear_parts(node).x
            with program.replacing(node) as result:
                hidden = program.call(LINEAR, x, _cast_like(program, f"{path}.lora_A", x), None)
                scaled = program.call(torch.mul, hidden, site.alpha / site.rank)
                branch = program.call(LINEAR, scaled, _cast_like(program, f"{path}.lora_B", x), None)
                result.append(program.call(torch.add, node, branch))


def _cast_like(program: Program, name: str, x: fx.Node) -> fx.Node:
    weight = program.weight(name)
    example = x.meta.get("example_value")
    if isinstance(example, Tensor) and example.dtype == torch.float32:
        return weight
    # not torch.Tensor.type_as: AOTAutograd caches no graph that calls a method by its descriptor
    return program.call(torch.ops.aten.type_as.default, weight, x)
