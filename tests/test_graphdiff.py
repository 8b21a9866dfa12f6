"""Graph texts: stable, typed, and without anything that differs between machines."""

import operator
import re

import torch
from torch import fx, nn

from qerl_compile.graph import Program, unlift
from qerl_compile.graphdiff import diff, graph_text
from qerl_compile.isolation import call_region, isolated


def text_of(build) -> str:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3, device="meta")
    graph.output(build(graph, x))
    return graph_text(Program(graph))


def captured(module: nn.Module, *args: torch.Tensor) -> str:
    texts = []

    def backend(gm, example_inputs):
        names = {id(tensor): name for name, tensor in module.named_parameters()}
        texts.append(graph_text(unlift(gm, example_inputs, names)))
        return gm.forward

    isolated(call_region, backend)(module, *args)
    return texts[-1]


def test_a_line_has_a_name_a_type_an_operation_and_arguments():
    assert text_of(lambda graph, x: graph.call_function(torch.add, (x, 1.5), {"alpha": 2})) == (
        "x: float32[2, 3] = input\nadd = add(x, 1.5, alpha=2)\nreturn add"
    )


def test_devices_are_left_out():
    cpu, cuda = (
        text_of(
            lambda graph, x, d=device: graph.call_function(
                torch.zeros, (3, (torch.device(d),)), {"device": torch.device(d)}
            )
        )
        for device in ("cpu", "cuda:1")
    )
    assert cpu == cuda
    assert "zeros(3, (device,))" in cpu


def test_functions_and_dtypes_are_named_without_address_or_module():
    text = text_of(
        lambda graph, x: graph.call_method("apply", (x, [len, torch.bfloat16], {"d": (torch.float8_e4m3fn,)}))
    )
    assert "apply(x, [len, bfloat16], {d: (float8_e4m3fn,)})" in text
    assert "0x" not in text_of(lambda graph, x: graph.call_function(torch.vmap, (text_of, x)))


def test_slices_are_written_out():
    text = text_of(lambda graph, x: graph.call_function(operator.getitem, (x, (Ellipsis, slice(None, 8, None)))))
    assert "getitem(x, (Ellipsis, slice(None, 8, None)))" in text


def test_operators_are_named_with_their_namespace_and_no_default_overload():
    text = text_of(lambda graph, x: graph.call_function(torch.ops.aten.relu.default, (x,)))
    assert "relu_default = aten.relu(x)" in text
    text = text_of(lambda graph, x: graph.call_function(torch.ops.aten.to.dtype, (x, torch.float16)))
    assert "= aten.to.dtype(x, float16)" in text


def test_constants_are_told_from_weights():
    program = Program(fx.Graph(), inputs={"a.weight": 0}, owners={"a": 0})
    for target in ("a.weight", "a.noise", "_tensor_constant0", "b.weight"):
        program.graph.get_attr(target)
    program.graph.output(())
    assert graph_text(program).splitlines()[:-1] == [
        "a_weight = weight a.weight",
        "a_noise = weight a.noise",
        "_tensor_constant0 = constant _tensor_constant0",
        "b_weight = constant b.weight",
    ]


def test_symbolic_sizes_are_numbered_in_order_of_appearance():
    module = nn.Linear(4, 5, bias=False)
    first, second = torch.ones(3, 7, 4), torch.ones(6, 9, 4)
    for x in (first, second):
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
    text = captured(module, first)
    assert "float32[d0, d1, 4]" in text
    assert "float32[d0, d1, 5] = linear(" in text
    assert not re.search(r"\bs\d+\b", text)
    assert captured(module, second) == text


def test_a_diff_is_only_what_changed():
    before = "a = input\nb = neg(a)\nc = relu(b)\nreturn c"
    after = "a = input\nb = neg(a)\nc = gelu(b)\nreturn c"
    assert diff(before, after) == ["@@ -3 +3 @@", "-c = relu(b)", "+c = gelu(b)"]
    assert diff(before, after, context=1) == [
        "@@ -2,3 +2,3 @@", " b = neg(a)", "-c = relu(b)", "+c = gelu(b)", " return c",
    ]  # fmt: skip
    assert diff(before, before) == []
