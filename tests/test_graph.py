"""Unlift, bind, gather: names go in, tensors are found at call time, and no ghost is computed with."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from qerl_compile.backend import GraphCompiler
from qerl_compile.errors import GraphError
from qerl_compile.graph import (
    Program,
    bind,
    clear_owner,
    gather,
    held_tensor,
    is_ghost,
    leaf_tensor,
    linear_parts,
    make_ghost,
    owner_of,
    set_owner,
    unlift,
)
from qerl_compile.isolation import call_region, isolated
from qerl_compile.passes import Noise, Quantize
from tests.passes.toy import Toy, linear

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A weight with noise, and a linear with a bias."""

    def __init__(self, seed: int, *, noisy: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.randn(16, generator=generator))
        self.up = linear(8, 16, bias=True, seed=seed)
        if noisy:
            Noise.state(self.norm, self.norm.weight)
            self.norm.noise.normal_(generator=generator)
            set_owner(self.norm.weight, self.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x * self.norm.weight)


def names_of(*modules: nn.Module) -> dict[int, str]:
    return {id(t): name for module in modules for name, t in [*module.named_parameters(), *module.named_buffers()]}


def captured(module: nn.Module, *args: torch.Tensor) -> tuple[fx.GraphModule, list, Program, str]:
    """Dynamo's graph module, its inputs, our program, and Dynamo's graph as it was before."""
    seen = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        seen.extend((gm, example_inputs, unlift(gm, example_inputs, names_of(module)), before))
        return gm.forward

    isolated(call_region, backend)(module, *args)
    return tuple(seen)


def test_unlift_turns_weights_into_reads_of_their_names():
    _, _, program, _ = captured(Block(0), X)
    assert [str(node.target) for node in program.weights()] == ["norm.weight", "up.weight", "up.bias"]
    kinds = [node.op for node in program.graph.nodes]
    assert kinds == ["placeholder", *["get_attr"] * 3, *["call_function"] * 2, "output"]
    assert set(program.owners) == {"norm", "up"}


def test_unlift_leaves_dynamos_graph_as_it_was():
    gm, _, program, before = captured(Block(0), X)
    Noise(frozenset({"norm"}))(program)
    bind(program)
    assert str(gm.graph) == before


def test_unlift_and_bind_alone_change_no_result():
    module = Block(0)
    _, inputs, program, _ = captured(module, X)
    feeds = bind(program)
    assert all(leaf is None for _, leaf in feeds)
    (got,) = fx.GraphModule(nn.Module(), program.graph)(*gather(feeds, inputs))
    assert torch.equal(got, module(X))


def test_bind_feeds_what_stands_beside_a_weight_from_its_module():
    module = Block(0)
    _, inputs, program, _ = captured(module, X)
    Noise(frozenset({"norm"}))(program)
    feeds = bind(program)
    assert [leaf for _, leaf in feeds].count("noise") == 1
    values = gather(feeds, inputs)
    assert any(value is module.norm.noise for value in values)
    assert not program.graph.find_nodes(op="get_attr")


def test_one_graph_serves_two_modules_with_their_own_tensors():
    first, second = Block(1), Block(2)
    compiler = GraphCompiler([Noise(frozenset({"norm"}))], lambda: names_of(first), "eager")
    call = isolated(call_region, compiler)
    for block in (first, second, first):
        want = block.up(X * (block.norm.weight + block.norm.noise))
        torch.testing.assert_close(call(block, X), want)
    assert compiler.graphs == 1


def test_a_tensor_replaced_after_compilation_is_seen():
    block = Block(1)
    call = isolated(call_region, GraphCompiler([Noise(frozenset({"norm"}))], lambda: names_of(block), "eager"))
    call(block, X)
    block.norm.noise = torch.full((16,), 3.0)
    torch.testing.assert_close(call(block, X), block.up(X * (block.norm.weight + 3)))


def test_a_module_without_state_in_a_graph_that_needs_it_is_an_error_not_another_modules_tensor():
    first, bare = Block(1), Block(2, noisy=False)
    call = isolated(call_region, GraphCompiler([Noise(frozenset({"norm"}))], lambda: names_of(first), "eager"))
    call(first, X)
    with pytest.raises(GraphError, match="whose noise a compiled graph looks up"):
        call(bare, X)


def ghostly(module: nn.Module) -> nn.Module:
    """Make the weight of `module.up` a ghost that no pass will rewrite."""
    del module.up.weight
    module.up.register_buffer("weight", make_ghost((8, 16), torch.float32, X.device), persistent=False)
    set_owner(module.up.weight, module.up)
    return module


def refused(module: nn.Module, *args: torch.Tensor) -> str:
    compiler = GraphCompiler([Quantize(frozenset())], lambda: names_of(module), "eager")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as fault:
        isolated(call_region, compiler)(module, *args)
    assert isinstance(fault.value.inner_exception, GraphError)
    return str(fault.value.inner_exception)


def test_a_ghost_that_a_pass_missed_is_refused_by_name():
    message = refused(ghostly(Block(1)), X)
    assert message.startswith("up.weight: expected every use of a packed weight to be rewritten by a pass")
    assert "linear still reads it" in message


def test_linears_hidden_by_activation_checkpointing_are_refused():
    class Checkpointed(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    message = refused(ghostly(Checkpointed(1)), X)
    assert message.startswith("up.weight: ")
    assert "gradient checkpointing" in message


def test_a_ghost_without_users_is_dropped():
    toy = Toy(up=ghostly(Block(1)).up)
    toy.read("up.weight")
    toy.output(toy.input("x", X))
    assert torch.equal(toy.run()[0], X)


def test_a_graph_without_inputs_can_be_bound():
    toy = Toy(up=linear(8, 16))
    toy.output(toy.call(torch.neg, toy.read("up.weight")))
    assert torch.equal(toy.run()[0], -toy.modules["up"].weight)


def test_constants_and_subgraphs_are_no_weights():
    program = Program(fx.Graph(), inputs={"up.weight": 0})
    for target in ("up.weight", "_tensor_constant0", "wrap_body_0", "other.weight"):
        program.graph.get_attr(target)
    assert [node.target for node in program.weights()] == ["up.weight"]


@pytest.mark.parametrize(
    "args, kwargs",
    [
        (("x", "w", "b"), {}),
        (("x", "w"), {"bias": "b"}),
        (("x",), {"weight": "w", "bias": "b"}),
        ((), {"bias": "b", "input": "x", "weight": "w"}),
    ],
)
def test_linears_are_read_however_the_model_spells_them(args, kwargs):
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xwb"}
    node = graph.call_function(
        nn.functional.linear, tuple(map(nodes.get, args)), {k: nodes[v] for k, v in kwargs.items()}
    )
    assert [str(part) for part in linear_parts(node)] == ["x", "w", "b"]


def test_a_linear_without_bias_has_none():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    assert linear_parts(graph.call_function(nn.functional.linear, (x, w))).bias is None


def test_replacing_hands_over_users_and_origin_but_not_to_what_it_inserts():
    toy = Toy()
    y = toy.call(torch.neg, toy.input("x", X))
    y.meta["stack_trace"], y.meta["nn_module_stack"] = "trace", {"a": ("a", nn.Linear)}
    z = toy.call(torch.relu, y)
    toy.output(z, y)
    with toy.program.replacing(y) as result:
        result.append(toy.program.call(torch.add, y, 1.0))
    assert z.args == (result[0],)
    assert result[0].args == (y, 1.0)
    assert (result[0].meta["stack_trace"], result[0].meta["nn_module_stack"]) == ("trace", y.meta["nn_module_stack"])
    assert torch.equal(toy.run()[1], 1 - X)


def test_a_replaced_node_without_users_is_erased():
    toy = Toy()
    x = toy.input("x", X)
    y = toy.call(torch.neg, x)
    toy.output(y)
    with toy.program.replacing(y) as result:
        result.append(toy.program.call(torch.relu, x))
    assert toy.text() == "x: float32[3, 16] = input\nrelu: float32[3, 16] = relu(x)\nreturn (relu,)"


@pytest.mark.parametrize(
    "tensor, ghost",
    [
        (make_ghost((4, 8), torch.bfloat16, X.device), True),
        (torch.zeros(()).expand(3), True),
        (torch.zeros(4, 8), False),
        (torch.zeros(8).expand(4, 8), False),
        (torch.zeros(2, 8).expand(4, 2, 8), True),  # a stack of experts
        (torch.zeros(1, 1), False),
        (torch.zeros(()), False),
        (torch.zeros(0, 4), False),
    ],
)
def test_a_ghost_is_told_by_its_strides(tensor, ghost):
    assert is_ghost(tensor) is ghost


def test_a_ghost_is_nan_and_costs_one_element():
    ghost = make_ghost((300, 200), torch.float16, X.device)
    assert ghost.shape == (300, 200)
    assert ghost.isnan().all()
    assert ghost.untyped_storage().nbytes() == 2


def test_owners_can_be_set_found_and_cleared():
    module = linear(8, 16)
    clear_owner(module.weight)
    assert owner_of(module.weight) is None
    clear_owner(module.weight)
    set_owner(module.weight, module)
    assert owner_of(module.weight) is module
    assert "qerl_owner" not in vars(copy.deepcopy(module.weight.detach()))


def test_tensors_are_found_among_parameters_and_buffers_only():
    module = nn.BatchNorm1d(4)
    assert held_tensor(module, "weight") is module.weight
    assert held_tensor(module, "running_mean") is module.running_mean
    assert leaf_tensor(module, "momentum") is None
    with pytest.raises(AttributeError, match="BatchNorm1d holds no tensor named 'momentum'"):
        held_tensor(module, "momentum")
