"""Quantize in the graph: what `torch.compile(model, backend="qerl")` does to a model it does not own.

    before      y = linear(x, W, b)
    after       y = qerl::fake_quantized_linear(x, W) + b

The operator quantizes W to NVFP4 in every call, multiplies by the rounded weight, and passes gradients straight
through to W (the rounding counts as the identity). So the program computes what the packed model would compute,
weights stay ordinary and trainable, no memory is saved, and nothing is owned: to save memory, or for LoRA and noise,
use `qerl_compile.transform`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from qerl_compile.graph import LINEAR, Program, linear_parts
from qerl_compile.kernels import ops as _ops  # noqa: F401  # registers the qerl:: operators


@dataclass(frozen=True)
class FakeQuantize:
    """Rewrites the linears for which `selects(module path)` holds."""

    selects: Callable[[str], bool]

    def __call__(self, program: Program) -> None:
        """Rewrite every linear whose weight, or all of whose fused weights, are selected."""
        for node in list(program.graph.find_nodes(op="call_function", target=LINEAR)):
            x, weight, bias = linear_parts(node)
            if not all(map(self._selected, weight.all_input_nodes if weight.target is torch.cat else [weight])):
                continue
            with program.replacing(node) as result:
                result.append(program.call(torch.ops.qerl.fake_quantized_linear.default, x, weight))
                if bias is not None:
                    result[:] = [program.call(torch.add, result[0], bias)]

    def _selected(self, weight: fx.Node) -> bool:
        """Whether a node is a module's weight (and not computed by the model) and its module is selected."""
        name = str(weight.target)
        return name.endswith(".weight") and self.selects(name.removesuffix(".weight"))
