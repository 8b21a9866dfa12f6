"""Tags for the partitioner: which nodes get them, and that nothing else changes."""

import re

import torch
from torch.utils.checkpoint import CheckpointPolicy

from qerl_compile.graphdiff import graph_text
from qerl_compile.passes import Recompute
from tests.passes.toy import Toy


def calls(*paths: str) -> Toy:
    """One `neg` for each module path, and one call without."""
    toy = Toy()
    node = toy.input("x", torch.ones(2))
    for path in paths:
        node = toy.call(torch.neg, node)
        node.meta["nn_module_stack"] = {"a": ("", object), "b": (path, object)}
    return toy.output(toy.call(torch.relu, node))


def only_tagged(toy: Toy) -> bool:
    """Run the pass; whether nothing but tags changed."""
    before = graph_text(toy.program)
    Recompute()(toy.program)
    return re.sub(r"  # PREFER_RECOMPUTE, region \d+", "", graph_text(toy.program)) == before


def tags(toy: Toy) -> list[int | None]:
    nodes = [node for node in toy.program.graph.nodes if node.op == "call_function"]
    assert all(node.meta.get("recompute") in (None, CheckpointPolicy.PREFER_RECOMPUTE) for node in nodes)
    assert all(("recompute" in node.meta) == ("ac_graph_id" in node.meta) for node in nodes)
    return [node.meta.get("ac_graph_id") for node in nodes]


def test_each_layer_is_a_region_of_its_own_and_what_lies_outside_is_kept():
    toy = calls("L['self'].model.embed", "L['self'].model.layers[3].mlp", "L['self'].model.layers.12", "L['self'].norm")
    assert only_tagged(toy)
    assert tags(toy) == [None, 3, 12, None, None]


def test_a_graph_that_names_no_layer_is_one_region():
    toy = calls("L['region'].mlp", "L['region'].self_attn")
    assert only_tagged(toy)
    assert tags(toy) == [0, 0, 0]


def test_inputs_and_outputs_are_not_tagged():
    toy = calls("model.layers.0")
    Recompute()(toy.program)
    others = [node for node in toy.program.graph.nodes if node.op in ("placeholder", "output")]
    assert len(others) == 2
    assert not any("recompute" in node.meta for node in others)


def test_another_name_for_layers_can_be_given():
    toy = calls("transformer.h.4.attn", "transformer.wte")
    Recompute(layer=r"\bh\.(\d+)\b")(toy.program)
    assert tags(toy) == [4, None, None]


def test_a_word_that_only_ends_in_layers_names_no_layer():
    toy = calls("model.layers.1", "model.sublayers.2")
    Recompute()(toy.program)
    assert tags(toy) == [1, None, None]
