"""`torch.compile(model, backend="qerl")` on models that we do not own, and the compiler that both roads share."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from qerl_compile.backend import INNER, GraphCompiler, check_inner
from qerl_compile.backend import qerl as named_backend
from qerl_compile.errors import FormatError, RecipeError
from qerl_compile.formats.nvfp4 import dequantize, quantize, quantize_group
from qerl_compile.isolation import call_region, isolated
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from tests.models import dequantized_oracle, tiny_model

TOKENS_BT = torch.arange(14).reshape(2, 7)
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
UP = {"quantize": [{"match": "mlp.up_proj"}]}


class Small(nn.Module):
    """Two linears on one input and one after; small enough to compute by hand."""

    def __init__(self, columns: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(columns, 16, bias=False),
                "up_proj": nn.Linear(columns, 16, bias=False),
                "down_proj": nn.Linear(16, 8),
            }
        )

    def forward(self, x):
        return self.mlp["down_proj"](self.mlp["gate_proj"](x).relu() * self.mlp["up_proj"](x))


def compiled(module: nn.Module, **options):
    """What `torch.compile(module, backend="qerl", options=options)` does, apart from other tests' graphs."""
    return torch.compile(module, backend="qerl", options={"inner": "eager", **options})


def rounded(linear: nn.Linear) -> torch.Tensor:
    return dequantize(quantize(linear.weight.detach()), torch.float32)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def results():
    """Logits and weight gradients of a Llama under the backend, and of its oracle with rounded weights."""
    recipe = {"quantize": [{"match": r"model\.layers\..*_proj"}]}
    model = tiny_model("llama", layers=1)
    oracle = dequantized_oracle(model, make_plan(model, Recipe.resolve(recipe)))
    torch._dynamo.reset()
    found = []
    for call, module in ((compiled(model, recipe=recipe, inner="aot_eager"), model), (oracle, oracle)):
        logits = call(input_ids=TOKENS_BT, use_cache=False).logits
        logits.logsumexp(-1).mean().backward()
        found.append((logits.detach(), {name: p.grad for name, p in module.named_parameters()}))
    return found


def test_logits_equal_the_oracle_whose_groups_share_one_amax(results):
    (got, _), (want, _) = results
    assert (got - want).abs().max() <= 1e-5
    assert want.abs().max() > 0.1


def test_gradients_pass_straight_through_to_every_weight(results):
    """The oracle's weights are the rounded ones, so its gradients are the straight-through ones."""
    (_, got), (_, want) = results
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-7)
    assert got["model.layers.0.mlp.up_proj.weight"].abs().sum() > 0


def test_without_options_the_rules_of_the_paper_apply_without_adapters_and_noise():
    """The module is called `layers.0`, as the built-in pattern wants."""
    holder = nn.ModuleDict({"layers": nn.ModuleList([Small()])})
    small = holder["layers"][0]

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = holder

        def forward(self, x):
            return self.model["layers"][0](x)

    weights = {name: linear.weight.detach() for name, linear in small.mlp.items()}
    shared = quantize_group({name: weights[name] for name in ("gate_proj", "up_proj")})
    gate, up = (X @ dequantize(shared[name], torch.float32).T for name in ("gate_proj", "up_proj"))
    down = small.mlp["down_proj"]
    want = nn.functional.linear(gate.relu() * up, rounded(down), down.bias)
    torch.testing.assert_close(compiled(Caller())(X), want)


def test_only_selected_linears_are_rounded():
    module = Small()
    gate, up, down = module.mlp.values()
    want = down(gate(X).relu() * (X @ rounded(up).T))
    torch.testing.assert_close(compiled(module, recipe=UP)(X), want)


def test_an_earlier_rule_with_format_none_excludes():
    module = Small()
    rules = [{"match": "mlp.(up|gate)_proj", "format": "none"}, {"match": ".*"}]
    gate, up, down = module.mlp.values()
    want = nn.functional.linear(gate(X).relu() * up(X), rounded(down), down.bias)
    torch.testing.assert_close(compiled(module, recipe={"quantize": rules})(X), want)


def test_weights_stay_ordinary_and_updates_are_seen():
    module = Small()
    call = compiled(module, recipe=UP)
    before = call(X)
    assert set(module.state_dict()) == {f"mlp.{name}" for name in ("gate_proj.weight", "up_proj.weight")} | {
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
    }
    with torch.no_grad():
        module.mlp["up_proj"].weight.mul_(2)
    gate, up, down = module.mlp.values()
    torch.testing.assert_close(call(X), down(gate(X).relu() * (X @ rounded(up).T)))
    assert not torch.equal(call(X), before)


def refusal(options: dict, module: nn.Module | None = None) -> Exception:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as fault:
        torch.compile(module or Small(), backend="qerl", options=options)(X)
    return fault.value.inner_exception


@pytest.mark.parametrize(
    "options, words",
    [
        ({"recipe": "qerl-nvfp4-aqn"}, ("lora and noise rules", "qerl_compile.transform(model, recipe)")),
        ({"recipe": {**UP, "lora": [{"match": ".*", "rank": 4}]}}, ("lora rules", "qerl_compile.transform")),
        ({"recipe": {**UP, "noise": {}}}, ("noise rules", "qerl_compile.transform")),
        ({"recipe": {**UP, "sparsify": [{"match": ".*"}]}}, ("sparsify rules", "qerl_compile.transform")),
        (
            {"recipe": {"quantize": [{"match": ".*", "scales": "mse"}]}},
            ("scales or rounding", "qerl_compile.transform"),
        ),
        ({"reciep": UP}, ("'reciep'", "the keys recipe and inner")),
        ({"recipe": UP, "a": 1, "b": 2}, ("'a', 'b'",)),
        ({"inner": "induktor"}, ("'induktor'", "inductor, aot_eager, eager")),
        ({"recipe": {"quantise": []}}, ("quantise",)),
        ({"recipe": "no-such-recipe"}, ("no-such-recipe",)),
    ],
)
def test_bad_options_are_refused_with_a_reason(options, words):
    fault = refusal(options)
    assert isinstance(fault, RecipeError)
    for word in words:
        assert word in str(fault)


def test_columns_that_are_no_multiple_of_16_are_refused_by_module():
    class Odd(Small):
        def forward(self, x):
            return super().forward(x[:, :24])

    fault = refusal({"inner": "eager", "recipe": UP}, Odd(columns=24))
    assert isinstance(fault, FormatError)
    assert fault.where == "mlp.up_proj"
    assert "[16, 24]" in fault.got


def test_a_graph_of_which_nothing_is_selected_is_warned_about():
    module = Small()
    with pytest.warns(UserWarning, match=r"selects none of the 3 linears of this graph, such as 'mlp\.gate_proj'"):
        got = compiled(module, recipe={"quantize": [{"match": "model.*"}]})(X)
    assert torch.equal(got, module(X))


def test_options_may_be_left_out():
    with pytest.warns(UserWarning, match="selects none"):
        got = isolated(call_region, lambda gm, inputs: named_backend(gm, inputs, options={"inner": "eager"}))(
            Small(), X
        )
    assert torch.equal(got, Small()(X))


def test_the_backend_is_found_by_name_without_importing_the_package():
    code = """
        import sys, torch
        assert "qerl" in torch._dynamo.list_backends()
        assert not any(name.startswith("qerl_compile") for name in sys.modules)
        model = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(32, 8, bias=False)})
        options = {"recipe": {"quantize": [{"match": ".*up_proj"}]}, "inner": "eager"}
        x = torch.randn(4, 32)
        got = torch.compile(lambda x: model["up_proj"](x), backend="qerl", options=options)(x)
        from qerl_compile.formats.nvfp4 import dequantize, quantize
        torch.testing.assert_close(got, x @ dequantize(quantize(model["up_proj"].weight.detach()), torch.float32).T)
        assert "transformers" not in sys.modules
        print("found")
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(sys.prefix),
    )
    assert process.stdout == "found\n", process.stderr


def test_stages_are_recorded_and_graphs_counted():
    seen = []

    class Touch:
        def __call__(self, program):
            program.graph.lint()

    names = {}
    compiler = GraphCompiler([Touch()], lambda: names, "eager", record=lambda stage, text: seen.append((stage, text)))
    assert compiler.graphs == 0
    isolated(call_region, compiler)(Small(), X)
    assert [stage for stage, _ in seen] == ["capture", "touch"]
    assert seen[0][1] == seen[1][1]
    assert compiler.graphs == 1


def test_a_pass_that_breaks_the_graph_is_caught_before_the_next_one_runs():
    later = []

    def broken(program):
        nodes = list(program.graph.nodes)
        nodes[0].prepend(nodes[-2])

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="used before it has been defined"):
        isolated(call_region, GraphCompiler([broken, later.append], dict, "eager"))(Small(), X)
    assert later == []


@pytest.mark.parametrize("inner", INNER)
def test_known_inner_compilers_pass(inner):
    assert check_inner(inner) == inner


@pytest.mark.parametrize("inner", ["", "Eager", None, 3])
def test_unknown_inner_compilers_are_refused(inner):
    with pytest.raises(RecipeError, match="inner: expected one of inductor, aot_eager, eager"):
        check_inner(inner)
