"""Adaptive quantization noise: `w_eff = w + z` on the norms that feed q/k/v and gate/up.

QeRL (arXiv 2510.11696, eq. 10 and App. G) perturbs a quantized policy by adding N(0, σ²) to the weight of an RMSNorm:

    RMSNorm_noise(x) = (w + z) ⊙ x / rms(x)        which is        X̂ · (diag(1 + z/w) Ŵ)

so one vector of noise acts as multiplicative noise on every row of all linears that read the norm, at no cost.

    before      norm = w * x̂                    (bf16 or fp32, as the model has it)
    after       w32  = w.to(float32) + z         (z: float32 buffer, resampled in place by the loop)
                norm = (w32 * x̂).to(dtype before)

**Why fp32.** In bf16 a weight near 1 has neighbours 2⁻⁷ = 0.0078 apart. The schedule ends at σ = 5e-4, so `w + z` in
bf16 rounds back to w for nearly every element and the noise is silently gone. The sum and its product are therefore
taken in fp32, and rounded once where the model rounded before. With z = 0 this changes no bit: the product of two
bf16 numbers is exact in fp32.

The clean weight is never modified; `z` is not in the state_dict; σ = 0 is a zeroed buffer and not another graph.
Where a norm is trained too (trained_norms.py), w is its trained float32 weight.

What this pass does not do: choose σ (rl/noise_schedule.py) or draw z (`transforming.resample_noise`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM
from qerl_compile.graph import Program
from qerl_compile.passes.widen import widen_reads


@dataclass(frozen=True)
class Noise:
    """Adds the buffer `noise` to the weight of each module in `sites` (norm module paths)."""

    sites: frozenset[str]

    @staticmethod
    def state(module: nn.Module, weight: Tensor) -> None:
        """Give the norm a zeroed float32 buffer `noise`, shaped like its weight and kept out of the state_dict."""
        module.register_buffer("noise", torch.zeros_like(weight, dtype=torch.float32), persistent=False)

    def __call__(self, program: Program) -> None:
        """Rewrite every read of a site's weight."""
        for node in list(program.weights()):
            path, _, leaf = str(node.target).rpartition(".")
            if leaf not in ("weight", TRAINED_NORM) or path not in self.sites:
                continue
            users = list(node.users)
            with program.graph.inserting_after(node):
                noise = program.weight(f"{path}.noise")
            with program.graph.inserting_after(noise):
                clean = program.call(torch.ops.aten.to.dtype, node, torch.float32)
            with program.graph.inserting_after(clean):
                noisy = program.call(torch.add, clean, noise)
            widen_reads(program, node, users, noisy)
