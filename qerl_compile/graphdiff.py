"""Graphs as stable text, and the difference that a pass makes.

A line per node: FX name, dtype and shape, operation, arguments, and the tag of a node that backward computes again. No
device, path or object id appears, and symbolic sizes are renamed d0, d1, … in order of appearance, so that the text is
the same in every process. A golden is the unified diff of one pass with no context lines: only what the pass did, so
that wording changes elsewhere do not touch it.
"""

import difflib
import re
from typing import Any

import torch
from torch import Tensor, fx

from qerl_compile.graph import Program


def graph_text(program: Program) -> str:
    """Return the program as text, one node a line."""
    symbols: dict[str, str] = {}
    weights = set(program.weights())
    return "\n".join(_line(node, node in weights, symbols) for node in program.graph.nodes)


def diff(before: str, after: str, *, context: int = 0) -> list[str]:
    """Return the unified diff of two graph texts without its file header."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=context, lineterm="")
    return list(lines)[2:]


def _line(node: fx.Node, is_weight: bool, symbols: dict[str, str]) -> str:
    value = node.meta.get("example_value")
    typed = node.name
    if isinstance(value, torch.SymInt):
        _rename(str(value), symbols)
    if isinstance(value, Tensor):
        sizes = ", ".join(str(size) if isinstance(size, int) else _rename(str(size), symbols) for size in value.shape)
        typed = f"{node.name}: {str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if node.op == "placeholder":
        text = f"{typed} = input"
    elif node.op == "get_attr":
        text = f"{typed} = {'weight' if is_weight else 'constant'} {node.target}"
    else:
        keywords = [f"{key}={_plain(arg)}" for key, arg in node.kwargs.items() if key != "device"]
        arguments = ", ".join([*map(_plain, node.args), *keywords])
        text = f"return {arguments}" if node.op == "output" else f"{typed} = {_operation(node)}({arguments})"
    if "recompute" in node.meta:
        text += f"  # {node.meta['recompute'].name}, region {node.meta['ac_graph_id']}"
    return re.sub(r"\bs\d+\b", lambda found: _rename(found[0], symbols), text)


def _rename(symbol: str, symbols: dict[str, str]) -> str:
    if not re.fullmatch(r"s\d+", symbol):
        return re.sub(r"\bs\d+\b", lambda found: _rename(found[0], symbols), symbol)
    return symbols.setdefault(symbol, f"d{len(symbols)}")


def _plain(argument: Any) -> str:
    """Return an argument as text without devices, addresses or torch's module names."""
    if isinstance(argument, torch.device):
        return "device"
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    if isinstance(argument, slice):
        return f"slice({', '.join(map(_plain, (argument.start, argument.stop, argument.step)))})"
    if isinstance(argument, dict):
        return f"{{{', '.join(f'{key}: {_plain(value)}' for key, value in argument.items())}}}"
    if isinstance(argument, tuple | list):
        items = ", ".join(map(_plain, argument))
        return f"[{items}]" if isinstance(argument, list) else f"({items}{',' * (len(argument) == 1)})"
    return getattr(argument, "__name__", str(argument)) if callable(argument) else str(argument)


def _operation(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))
