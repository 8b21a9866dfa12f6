"""What holds for the rewritten layer of every family on every version of torch and transformers."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from qerl_compile.graph import LINEAR, Program, is_ghost, leaf_tensor
from qerl_compile.transforming import transform
from tests.models import FAMILIES, tiny_model

PROJECTIONS = 7  # q, k, v, o, gate, up, down
TOKENS_BT = torch.arange(12).reshape(2, 6)


class Watch:
    """A last pass that changes nothing and notes what the graph consists of before it is bound."""

    def __call__(self, program: Program) -> None:
        self.program = program
        self.calls = Counter(node.target for node in program.graph.nodes if node.op.startswith("call"))
        self.users = {str(node.target): [user.target for user in node.users] for node in program.weights()}
        self.reads = {str(node.target): tuple(node.meta["example_value"].shape) for node in program.weights()}


@pytest.fixture(scope="module", params=FAMILIES)
def layer(request: pytest.FixtureRequest) -> tuple[Any, Watch]:
    """A transformed one-layer model that has run once, and what its layer's graph was."""
    model = transform(tiny_model(request.param, layers=1), "qerl-nvfp4-aqn", inner="eager")
    (compiler,) = model.qerl.compilers
    watch = Watch()
    compiler.passes = [*compiler.passes, watch]
    logits = model(input_ids=TOKENS_BT, use_cache=False).logits
    assert logits.isfinite().all()
    assert compiler.graphs == 1
    return model, watch


def test_four_packed_products_per_layer(layer):
    """qkv fused, o, gate and up fused, down."""
    assert layer[1].calls[torch.ops.qerl.quantized_linear.default] == 4
    assert layer[1].calls[torch.functional.split] == 2


def test_two_small_linears_per_adapter_and_no_other_linear(layer):
    assert layer[1].calls[LINEAR] == 2 * PROJECTIONS
    factors = Counter(name.rpartition(".")[2] for name in layer[1].reads if "lora_" in name)
    assert factors == {"lora_A": PROJECTIONS, "lora_B": PROJECTIONS}


def test_two_noisy_norms_per_layer_each_added_once(layer):
    noise = {name: users for name, users in layer[1].users.items() if name.endswith(".noise")}
    assert list(noise.values()) == [[torch.add], [torch.add]]
    assert set(layer[0].qerl.plan.noise) == {name.removesuffix(".noise") for name in noise}


def test_no_ghost_is_read(layer):
    model, watch = layer
    read = [name for name, users in watch.users.items() if users]
    assert all(not is_ghost(_tensor(model, name)) for name in read)
    assert sum(is_ghost(module.weight) for path, module in _packed(model)) == PROJECTIONS


def test_every_read_is_a_tensor_of_the_model_with_its_shape(layer):
    model, watch = layer
    for name, shape in watch.reads.items():
        assert _tensor(model, name).shape == shape, name


def test_binding_leaves_no_read_and_one_input_per_tensor(layer):
    graph = layer[1].program.graph
    assert not graph.find_nodes(op="get_attr")
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    assert len(set(names)) == len(names)


def test_what_is_multiplied_is_half_a_byte_per_weight(layer):
    model, watch = layer
    codes = sum(math.prod(shape) for name, shape in watch.reads.items() if name.endswith("_packed"))
    weights = sum(module.weight.numel() for _, module in _packed(model))
    assert codes * 2 == weights


def _packed(model):
    return [(path, model.get_submodule(path)) for path in model.qerl.plan.quantize]


def _tensor(model, name):
    path, _, leaf = name.rpartition(".")
    tensor = leaf_tensor(model.get_submodule(path), leaf)
    assert tensor is not None, name
    return tensor
