"""Trained full weights as an export packs them: the bits that the graph computes with, group by group.

    for packed in trained_packed(model, plan):      {module path: PackedNVFP4} of q/k/v, then of o, then of gate/up …

A model under quantization-aware training holds ordinary weights and rounds them in every forward
(passes/fake_quantize.py). Here the same rounding is done once more for a file: one amax a group, masked first where the
weight is 2:4 sparse. What a serving engine decodes is then what the last forward multiplied with, bit for bit.

Groups are yielded one at a time so that an exporter never holds a packed copy of the whole model. What this module does
not do: write files (exporters/), or change the model, which goes on training.
"""

from collections.abc import Iterator

import torch
from torch import nn

from qerl_compile.formats.nvfp4 import PackedNVFP4, quantize_group
from qerl_compile.passes.sparsify import MASK
from qerl_compile.plan import Plan


def trained_packed(model: nn.Module, plan: Plan) -> Iterator[dict[str, PackedNVFP4]]:
    """Quantize the trained weights of a model, one group after another.

    Args:
        model: a transformed model.
        plan: its plan; nothing is yielded if it has no trained weights.

    Yields:
        module path → packed weight; all of one dict share an input and a global scale. Every trained weight comes once.

    Raises:
        FormatError: a weight has NaN or Inf.
    """
    for group in dict.fromkeys(plan.group_of(path) for path in plan.trained_weights):
        yield quantize_group({path: _weight(model.get_submodule(path)) for path in group})


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.get_parameter("weight").detach()
    kept_NK = module._buffers.get(MASK)
    return weight if kept_NK is None else torch.where(kept_NK, weight, 0.0)
