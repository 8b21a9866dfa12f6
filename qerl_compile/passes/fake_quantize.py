"""Quantize in the graph: weights stay ordinary and trainable, and the program computes with their rounded values.

    before      y = linear(x, W, b)
    after       y = qerl::fake_quantized_linear(x, W) + b

The operator quantizes W to NVFP4 in every call, multiplies by the rounded weight, and passes gradients straight through
to W: the rounding counts as the identity (Bengio et al. 2013, arXiv 1308.3432). No rounded weight is saved for
backward, which quantizes again; AOTAutograd's partitioner may move that forward and keep codes and scales, 4.5 bits a
weight. Two users:

    torch.compile(model, backend="qerl")   does this to a model that it does not own
    `weights: trained` in a recipe         quantization-aware training of full weights; an export packs them

**The same bits as an export.** Serving engines fuse q/k/v and gate/up and keep one global scale, so an export packs
such a group with one shared amax, and the graph must round with it too. The fuse pass, which runs before, makes
`linear(x, cat([Wq, Wk, Wv]))`, and to quantize the cat is to share its amax. Everything else of NVFP4 is per block of
16 columns of one row, so the rows of the cat get the codes that each member gets with that amax. Where fuse left
members apart (biases on some only), each takes its own rows of the product with the cat: right, and that many times
the work.

**No clipping in the gradient.** A block's scale follows its largest weight, so no weight lies outside of what the codes
span by more than the rounding of the scale, and there is nothing to clip.

What this pass does not do: save memory, or round anything but weights. Training in float32 is what moves weights at all
at learning rates of 1e-5, where bf16 numbers are 2⁻⁸ of themselves apart.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from qerl_compile.errors import GraphError
from qerl_compile.graph import LINEAR, Program, linear_parts
from qerl_compile.kernels import ops as _ops  # noqa: F401  # registers the qerl:: operators


@dataclass(frozen=True)
class FakeQuantize:
    """Rewrites the linears for which `selects(module path)` holds; `groups` are those that must share an amax."""

    selects: Callable[[str], bool]
    groups: tuple[tuple[str, ...], ...] = ()

    def __call__(self, program: Program) -> None:
        """Rewrite every linear whose weight, or all of whose fused weights, are selected."""
        for node in list(program.graph.find_nodes(op="call_function", target=LINEAR)):
            x, weight, bias = linear_parts(node)
            if not all(map(self._selected, weight.all_input_nodes if weight.target is torch.cat else [weight])):
                continue
            path = str(weight.target).removesuffix(".weight")
            group = next((group for group in self.groups if path in group), None)
            with program.replacing(node) as result:
                if group is None:
                    y = program.call(torch.ops.qerl.fake_quantized_linear.default, x, weight)
                else:
                    y = _own_rows(program, x, path, group)
                result.append(y if bias is None else program.call(torch.add, y, bias))

    def _selected(self, weight: fx.Node) -> bool:
        """Whether a node is a module's weight (and not computed by the model) and its module is selected."""
        name = str(weight.target)
        return name.endswith(".weight") and self.selects(name.removesuffix(".weight"))


def _own_rows(program: Program, x: fx.Node, path: str, group: tuple[str, ...]) -> fx.Node:
    """Insert the product with all weights of the group and a read of the rows that are this member's."""
    weights = {str(node.target).removesuffix(".weight"): node for node in program.weights()}
    missing = [member for member in group if member not in weights]
    if missing:
        raise GraphError(
            where=path,
            expected=f"the weights of {', '.join(group)} in one graph, since they are rounded with one amax",
            got=f"a graph without {', '.join(missing)}",
            do="Exclude these modules from the rules with `weights: trained`.",
        )
    rows = [int(weights[member].meta["example_value"].shape[0]) for member in group]
    start = sum(rows[: group.index(path)])
    weight = program.call(torch.cat, [weights[member] for member in group])
    y = program.call(torch.ops.qerl.fake_quantized_linear.default, x, weight)
    return program.call(operator.getitem, y, (..., slice(start, start + rows[group.index(path)])))
