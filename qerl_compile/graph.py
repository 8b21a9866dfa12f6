"""The intermediate representation: Dynamo's FX graph, with weights under their checkpoint names.

torch.compile hands a backend an FX graph in which every parameter has been *lifted* to a placeholder, so that one
graph can serve many modules. Our passes want to read and write names (`model.layers.3.self_attn.q_proj.weight`),
because names are what recipes, goldens, exporters and people use. So a graph makes a round trip:

    unlift   placeholders that are weights      → get_attr nodes named like the checkpoint
    passes   insert, replace, erase; may name any tensor of a module that owns one of the graph's weights
    bind     get_attr nodes                     → placeholders again, fed *at call time*

**Why late binding.** Dynamo reuses one compiled decoder layer for all layers. A tensor bound when the graph was
compiled would be layer 0's for ever, and the model would give other tokens without an error. A bound graph therefore
looks up each extra tensor in this call: Dynamo passes the layer's own weight, the weight knows the module that owns
it (`owner`), and the module has the packed codes, LoRA factors or noise beside it.

**Ghosts.** A quantized weight keeps its name, shape and dtype for tracing but owns no storage: a NaN scalar expanded to
the old shape. `bind` refuses a graph in which a ghost still has users, since that means that some pass missed a site.

What this module does not do: know what the passes rewrite, or compile anything (`backend.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode

from qerl_compile.errors import GraphError

LINEAR = nn.functional.linear
"""What `nn.functional.linear` is called in a Dynamo graph: one node per projection, `linear(x, weight, bias)`."""

Feed = tuple[int, str | None]
"""Source of a bound graph's argument: (index of Dynamo's input, None) or (input whose owner has it, leaf name)."""


def set_owner(tensor: Tensor, module: nn.Module) -> None:
    """Let `tensor` know the module that holds it, so that a bound graph finds the module's other tensors."""
    tensor.qerl_owner = module  # pyright: ignore[reportAttributeAccessIssue]  # Tensors take Python attributes


def clear_owner(tensor: Tensor) -> None:
    """Undo `set_owner`."""
    vars(tensor).pop("qerl_owner", None)


def owner_of(tensor: Tensor) -> nn.Module | None:
    """Return the module recorded by `set_owner`, or None for a tensor that belongs to no rewritten module."""
    return getattr(tensor, "qerl_owner", None)


def make_ghost(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a NaN tensor of the given shape, dtype and device with a storage of one element."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(*shape)


def is_ghost(tensor: Tensor) -> bool:
    """Whether all elements of `tensor` share storage, or all matrices of a stack do (passes/experts.py)."""
    strides = tensor.stride()
    one_element = tensor.numel() > 1 and all(stride == 0 for stride in strides)
    return one_element or (tensor.dim() == 3 and tensor.shape[0] > 1 and strides[0] == 0)


def leaf_tensor(module: nn.Module, leaf: str) -> Tensor | None:
    """Return the parameter or buffer that `module` itself holds under `leaf`, or None."""
    tensor = module._parameters.get(leaf)
    return tensor if tensor is not None else module._buffers.get(leaf)


def held_tensor(module: nn.Module, leaf: str) -> Tensor:
    """Return the parameter or buffer that `module` itself holds under `leaf`, which must be there."""
    tensor = leaf_tensor(module, leaf)
    if tensor is None:
        raise AttributeError(f"{type(module).__name__} holds no tensor named {leaf!r}")
    return tensor


class LinearParts(NamedTuple):
    """The operands of a linear node."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def linear_parts(node: fx.Node) -> LinearParts:
    """Return the operands of a linear node; it holds them as the model spelled the call, by position or keyword."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return LinearParts(*(cast(Any, given.get(name)) for name in ("input", "weight", "bias")))


@dataclass
class Program:
    """A graph whose weights are get_attr nodes, and where each of them comes from.

    Invariants:
        * every get_attr target that holds a dot and is in `inputs`, or whose module is in `owners`, is a weight;
          other get_attr nodes (Dynamo's constants and subgraphs) are left alone;
        * `inputs[name]` is the index among Dynamo's inputs of the tensor called `name`;
        * `owners[module]` is the index of any weight of `module`, through which its other tensors are found.
    """

    graph: fx.Graph
    inputs: dict[str, int] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    fake_mode: FakeTensorMode | None = None

    def weights(self) -> Iterator[fx.Node]:
        """Yield the get_attr nodes that are weights, in graph order."""
        for node in self.graph.find_nodes(op="get_attr"):
            if node.target in self.inputs or str(node.target).rpartition(".")[0] in self.owners:
                yield node

    def linears(self) -> Iterator[tuple[fx.Node, str]]:
        """Yield (linear node, module path) for every linear whose weight is read straight from a module."""
        for node in self.graph.find_nodes(op="call_function", target=LINEAR):
            weight = linear_parts(node).weight
            if weight.op == "get_attr" and str(weight.target).endswith(".weight"):
                yield node, str(weight.target).removesuffix(".weight")

    def rows(self, linear: fx.Node) -> int:
        """Return N of a linear's weight [N, K]. Dynamo types every weight it lifts, and their sizes are static."""
        return int(linear_parts(linear).weight.meta["example_value"].shape[0])

    def weight(self, name: str) -> fx.Node:
        """Insert a get_attr node for the tensor called `name`, typed like the module's tensor."""
        node = self.graph.get_attr(name)
        path, _, leaf = name.rpartition(".")
        module = self.modules.get(path)
        tensor = None if module is None else leaf_tensor(module, leaf)
        if tensor is not None and self.fake_mode is not None:
            node.meta["example_value"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        return node

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Insert a call of `target`; its type is inferred on fake tensors where the arguments' types are known."""
        node = self.graph.call_function(target, args)
        self.infer(node)
        return node

    def infer(self, node: fx.Node) -> None:
        """Type a call node anew from the types of its arguments, if they are known."""
        if not all("example_value" in argument.meta for argument in node.all_input_nodes):
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["example_value"])
        # Symbolic sizes need torch's Python decompositions: linear's own C++ body asks for numbers (torch 2.11).
        with torch.no_grad(), enable_python_dispatcher(), self.fake_mode or nullcontext():
            if callable(node.target):
                node.meta["example_value"] = node.target(*args, **kwargs)
            else:
                node.meta["example_value"] = getattr(args[0], node.target)(*args[1:], **kwargs)

    @contextmanager
    def replacing(self, node: fx.Node) -> Iterator[list[fx.Node]]:
        """Insert nodes after `node`; append the last to the yielded list and it takes over the other users of `node`.

        What is inserted inherits the stack trace and module stack of `node`, so that errors and goldens point home.
        """
        after, result = node.next, []
        with self.graph.inserting_before(after):
            yield result
        new, cursor = set[fx.Node](), node.next
        while cursor is not after:
            new.add(cursor)
            for key in ("nn_module_stack", "stack_trace"):
                if key in node.meta:
                    cursor.meta.setdefault(key, node.meta[key])
            cursor = cursor.next
        node.replace_all_uses_with(result[0], delete_user_cb=lambda user: user not in new)
        if not node.users:
            self.graph.erase_node(node)


def unlift(gm: fx.GraphModule, example_inputs: Sequence[Any], names: dict[int, str]) -> Program:
    """Copy Dynamo's graph with its lifted weights as named get_attr nodes.

    Args:
        gm: the graph module that Dynamo hands to a backend. It is left as it is: Dynamo still reads it afterwards.
        example_inputs: one entry per placeholder; a lifted weight is the parameter object itself.
        names: `{id(tensor): checkpoint key}` of the model's parameters and buffers.

    Returns:
        The program; placeholders that are no weights come first, in their old order.
    """
    examples = (node.meta.get("example_value") for node in gm.graph.nodes)
    # The mode that typed the captured graph. TracingContext's is another one: Dynamo makes a fresh mode for backends.
    fake_mode = next((example.fake_mode for example in examples if isinstance(example, FakeTensor)), None)
    program = Program(fx.Graph(), fake_mode=fake_mode)
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for index, node in enumerate(placeholders):
        if id(example_inputs[index]) not in names:
            copies[node] = program.graph.node_copy(node)
            program.inputs[copies[node].name] = index
    for index, node in enumerate(placeholders):
        key = names.get(id(example_inputs[index]))
        if key is not None:
            copies[node] = program.graph.get_attr(key)
            copies[node].meta = dict(node.meta)
            program.inputs[key] = index
            module, owner = key.rpartition(".")[0], owner_of(example_inputs[index])
            if owner is not None:
                program.owners.setdefault(module, index)
                program.modules.setdefault(module, owner)
    for node in gm.graph.nodes:
        if node.op == "output":
            program.graph.output(fx.map_arg(node.args[0], copies.__getitem__))
        elif node.op != "placeholder":
            copies[node] = program.graph.node_copy(node, copies.__getitem__)
    return program


def bind(program: Program) -> list[Feed]:
    """Turn the program's weights into placeholders and say where each argument comes from.

    Returns:
        One feed per placeholder of `program.graph`, in order; `gather` evaluates them at call time.

    Raises:
        GraphError: a ghost weight still has users, so some pass missed a site.
    """
    graph = program.graph
    placeholders = graph.find_nodes(op="placeholder")
    feeds: list[Feed] = [(program.inputs[node.name], None) for node in placeholders]
    last = placeholders[-1] if placeholders else None
    made: dict[str, fx.Node] = {}
    for node in list(program.weights()):
        name = str(node.target)
        if not node.users:
            graph.erase_node(node)
            continue
        module, _, leaf = name.rpartition(".")
        _refuse_ghost(program, node, module, leaf)
        if name not in made:
            first = next(iter(graph.nodes))
            with graph.inserting_after(last) if last is not None else graph.inserting_before(first):
                last = made[name] = graph.placeholder(name.replace(".", "_"))
            last.meta = dict(node.meta)
            feeds.append((program.inputs[name], None) if name in program.inputs else (program.owners[module], leaf))
        node.replace_all_uses_with(made[name])
        graph.erase_node(node)
    graph.lint()
    return feeds


def _refuse_ghost(program: Program, node: fx.Node, module: str, leaf: str) -> None:
    owner = program.modules.get(module)
    tensor = None if owner is None else leaf_tensor(owner, leaf)
    if tensor is not None and is_ghost(tensor):
        users = ", ".join(str(user) for user in node.users)
        raise GraphError(
            where=f"{module}.{leaf}",
            expected="every use of a packed weight to be rewritten by a pass",
            got=f"a graph in which {users} still reads it",
            do="Exclude this module from the quantize rules, or switch off what hides its linear (such as gradient "
            "checkpointing: the recompute pass replaces it).",
        )


def gather(feeds: Sequence[Feed], args: Sequence[Any]) -> list[Any]:
    """Evaluate the feeds of a bound graph for one call: Dynamo's inputs, and tensors beside the weights among them."""
    values: list[Any] = []
    for index, leaf in feeds:
        if leaf is None:
            values.append(args[index])
            continue
        owner = owner_of(args[index])
        if owner is None:
            raise replaced(f"the module whose {leaf} a compiled graph looks up")
        values.append(held_tensor(owner, leaf))
    return values


def replaced(where: str) -> GraphError:
    """Return the refusal of a tensor that took the place of one through which graphs find their module."""
    return GraphError(
        where=where,
        expected="the weight that transform left there",
        got="another tensor in its place, by assignment, load_state_dict(assign=True) or a submodule's .to()",
        do="Copy values in place (weight.data.copy_), and move the whole model.",
    )
