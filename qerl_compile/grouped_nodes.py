"""Grouped products in a captured graph: how transformers computes experts, as a graph fact.

    out = torch._grouped_mm(x, transpose(W, -2, -1), offs=offsets)            bfloat16
    out = transformers::grouped_mm_fallback(x, transpose(W, -2, -1), offs)    other dtypes under torch.compile

with W [E, N, K] a tensor of a module, x [S, K] sorted by expert and offsets [E] where each expert's rows end. That is
what Dynamo captures of `experts_implementation="grouped_mm"`, which transformers chooses by itself (seen with 5.17 and
5.23, torch 2.13). Of its other two, "eager" is a loop over the experts that were hit, whose length Dynamo cannot know,
so no graph exists; "batched_mm" gathers a copy of W for every row, `bmm(W[ids], x)`, and is left alone.

Experts stored the other way round ([E, K, N], as in GPT-OSS) have no transpose here and are left alone too: blocks of
16 run along K in checkpoints, and the stack would have to be turned first.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from qerl_compile.graph import Program

FALLBACK = "transformers.grouped_mm_fallback"
GROUPED_MM: Any = torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]  # what Dynamo sees of F.grouped_mm


class GroupedProduct(NamedTuple):
    """One product: its node, its rows, where each expert's rows end, and the node that reads W."""

    node: fx.Node
    x: fx.Node
    offsets: fx.Node
    weight: fx.Node


def grouped_products(program: Program) -> Iterator[GroupedProduct]:
    """Yield every grouped product of rows with a transposed stack that is read straight from a module."""
    weights = set(program.weights())
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not _is_grouped(node.target):
            continue
        x, turned = node.args[:2]
        offsets = node.kwargs.get("offs")
        weight = _transposed(turned)
        plain = all(node.kwargs.get(key) is None for key in ("bias", "out_dtype"))
        if weight in weights and isinstance(x, fx.Node) and isinstance(offsets, fx.Node) and plain:
            yield GroupedProduct(node, x, offsets, weight)


def stacked_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of everything with three dimensions or more that is no kernel of a convolution."""
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and not isinstance(module, _ConvNd):
                yield f"{path}.{leaf}", parameter


def _is_grouped(target: Any) -> bool:
    return target is GROUPED_MM or str(target).removesuffix(".default") == FALLBACK


def _transposed(node: Any) -> Any:
    """Return W of `W.transpose(-2, -1)`, or None."""
    if isinstance(node, fx.Node) and node.target == "transpose" and set(node.args[1:]) == {-2, -1}:
        return node.args[0]
    return None
