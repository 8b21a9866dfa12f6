"""Trainable norms: a float32 copy of the weight, which the graph reads in its place.

    before      norm = w * x̂                              w: the base's, bf16 or as the model has it
    after       norm = (trained_weight * x̂).to(dtype before)    trained_weight: float32 [d], starts as w

QeRL's released scripts train both norms of every decoder layer (`modules_to_save`); the paper does not say so
(design/method.md, trap 6). Here they are off unless a recipe's `trainable_norms` selects them, among the norms that may
be noisy: those that feed q/k/v or gate/up.

**Why a copy.** AdamW moves a weight by about the learning rate, 1e-5; bf16 numbers near 1 are 2⁻⁷ apart, so a bf16
weight would never move. And the base stays whole: what the adapter is compared with (the KL reference) and what is
exported for serving are the base's norms, bit for bit.

**Why the whole weight and not its difference from w.** It is what PEFT's files hold, so a checkpoint that is read back
gives the same bits. Weight decay would pull it to 0 and not to w, hence trainers must give it none.

This pass runs before the noise, which is added to `trained_weight`. The optimizer writes in place, so graphs, CUDA
graphs of rollouts among them, see every update without being made anew.

What this pass does not do: train a norm's bias.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM
from qerl_compile.graph import Program, held_tensor, leaf_tensor
from qerl_compile.passes.widen import widen_reads


@dataclass(frozen=True)
class TrainedNorms:
    """Reads `trained_weight` instead of the weight of each module in `sites` (norm module paths)."""

    sites: frozenset[str]

    @staticmethod
    def state(module: nn.Module, weight: Tensor) -> None:
        """Give the norm a trainable float32 Parameter `trained_weight` [d] that starts as its weight."""
        module.register_parameter(TRAINED_NORM, nn.Parameter(weight.detach().to(torch.float32, copy=True)))

    def __call__(self, program: Program) -> None:
        """Rewrite every read of a site's weight."""
        for node in list(program.weights()):
            path, _, leaf = str(node.target).rpartition(".")
            if leaf != "weight" or path not in self.sites:
                continue
            with program.graph.inserting_after(node):
                trained = program.weight(f"{path}.{TRAINED_NORM}")
            widen_reads(program, node, list(node.users), trained)
            program.graph.erase_node(node)


def norm_weight(module: nn.Module) -> Tensor:
    """Return what a norm multiplies with when its noise is silent: float32 [d], its trained weight if it has one."""
    trained = leaf_tensor(module, TRAINED_NORM)
    return (held_tensor(module, "weight") if trained is None else trained).detach().float()
