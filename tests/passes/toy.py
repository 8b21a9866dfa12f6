"""Hand-built programs over real modules: a few nodes to rewrite, read as text, and run.

A toy takes the road of a captured graph without Dynamo: its weights are get_attr nodes typed by fake tensors, and `run`
binds the program and feeds it as a compiled region would be fed.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from qerl_compile.graph import LINEAR, Program, bind, gather, held_tensor, owner_of, set_owner
from qerl_compile.graphdiff import graph_text


class Toy:
    """A program that reads the tensors of `modules` by name."""

    def __init__(self, **modules: nn.Module) -> None:
        self.modules = modules
        self.program = Program(fx.Graph(), fake_mode=FakeTensorMode())
        self.args: list[Tensor] = []

    def input(self, name: str, tensor: Tensor) -> fx.Node:
        with self._above_the_calls():
            node = self.program.graph.placeholder(name)
        self._register(node, node.name, tensor)
        return node

    def read(self, name: str) -> fx.Node:
        """A weight, one node each; the program learns which module owns it, as `unlift` would tell it."""
        path, _, leaf = name.rpartition(".")
        known = next((node for node in self.program.weights() if node.target == name), None)
        if known is not None:
            return known
        tensor = held_tensor(self.modules[path], leaf)
        with self._above_the_calls():
            node = self.program.graph.get_attr(name)
        self._register(node, name, tensor)
        if owner_of(tensor) is not None:
            self.program.owners[path] = self.program.inputs[name]
            self.program.modules[path] = self.modules[path]
        return node

    def _above_the_calls(self) -> AbstractContextManager[object]:
        calls = (node for node in self.program.graph.nodes if node.op.startswith("call"))
        first = next(calls, None)
        return nullcontext() if first is None else self.program.graph.inserting_before(first)

    def _register(self, node: fx.Node, name: str, tensor: Tensor) -> None:
        mode = self.program.fake_mode
        assert mode is not None
        node.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True)
        self.program.inputs[name] = len(self.args)
        self.args.append(tensor)

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self.program.call(target, *args)

    def linear(self, x: fx.Node, path: str, name: str | None = None) -> fx.Node:
        """linear(x, path.weight, path.bias or None), as `nn.Linear` leaves it in a graph."""
        bias = None if self.modules[path].bias is None else self.read(f"{path}.bias")
        node = self.call(LINEAR, x, self.read(f"{path}.weight"), bias)
        node.name = name or node.name
        return node

    def output(self, *nodes: fx.Node) -> "Toy":
        self.program.graph.output(nodes)
        return self

    def text(self) -> str:
        return graph_text(self.program)

    def rewrite(self, *passes: Callable[[Program], None]) -> str:
        """Run passes and return the text afterwards."""
        for one in passes:
            one(self.program)
            self.program.graph.lint()
        return self.text()

    def unchanged_by(self, one: Callable[[Program], None]) -> bool:
        before = self.text()
        return self.rewrite(one) == before

    def run(self) -> tuple[Tensor, ...]:
        """Bind a copy of the program and call it."""
        program = Program(copy.deepcopy(self.program.graph), self.program.inputs, self.program.owners)
        program.modules = self.program.modules
        feeds = bind(program)
        return fx.GraphModule(nn.Module(), program.graph)(*gather(feeds, self.args))


def linear(
    rows: int, columns: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    """A linear with normal weights, frozen, with its owner recorded."""
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    made.to(dtype).requires_grad_(False)
    set_owner(made.weight, made)
    return made
