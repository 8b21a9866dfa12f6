"""What a step does to the lines: by hand, and compiled against eager. The engine's tests run it with a model."""

import math
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from qerl_compile.isolation import isolated
from qerl_compile.rl.rollout.decode import DecodeStep, Rows, StepCode, advance
from qerl_compile.rl.rollout.drawing import draw
from qerl_compile.rl.rollout.types import Sampling

NAMES = ("token", "position", "length", "table", "drawn", "finished", "uniform", "tokens", "logps")
GREEDY = partial(draw, temperature=0.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def inference_mode():
    """As in `generate`: lines are inference tensors."""
    with torch.inference_mode():
        yield


def lines(rows, columns, *, limit, ends=()):
    made = Rows.make(rows, columns, 3, CPU)
    made.begin(Sampling(limit, ends, 0))
    return made


def set_all(made, **values):
    for name, value in values.items():
        line = getattr(made, name)
        line.copy_(torch.tensor(value, dtype=line.dtype))


def same(one, other, names=NAMES):
    return [name for name, a, b in zip(NAMES, one, other, strict=True) if name in names and not torch.equal(a, b)]


def test_a_step_by_hand():
    """Lines: runs on; draws an end token; reaches the limit; is idle; is the second last of the limit."""
    made = lines(5, 4, limit=4, ends=(7, 3))
    set_all(made, length_R=[9, 6, 12, 0, 5], position_R=[8, 5, 11, 2, 4], drawn_R=[1, 2, 3, 4, 2])
    set_all(made, finished_R=[0, 0, 0, 4, 0])
    advance(made, torch.nn.functional.one_hot(torch.tensor([5, 3, 6, 7, 0]), 8).float(), GREEDY)
    assert made.token_R.tolist() == [5, 3, 6, 7, 0]
    assert made.length_R.tolist() == [10, 0, 0, 0, 6]
    assert made.position_R.tolist() == [9, 0, 0, 0, 5]
    assert made.drawn_R.tolist() == [2, 3, 4, 4, 3]
    assert made.finished_R.tolist() == [0, 3, 4, 4, 0]
    assert made.tokens_RC.tolist() == [[0, 5, 0, 0, 0], [0, 0, 3, 0, 0], [0, 0, 0, 6, 0], [0, 0, 0, 0, 7], [0] * 5]
    assert not made.logps_RC.any()  # of greedy tokens


def test_the_uniform_number_is_that_of_the_tokens_place_and_an_idle_line_takes_the_last():
    made = lines(3, 2, limit=2)
    set_all(made, length_R=[4, 4, 0], drawn_R=[0, 1, 2], uniform_RC=[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    seen = []

    def drawing(logits_BV, uniform_B):
        seen.append(uniform_B.tolist())
        return torch.tensor([1, 1, 1]), torch.tensor([-1.0, -2.0, -3.0])

    advance(made, torch.zeros(3, 8), drawing)
    assert seen == [[0.1, 0.4, 0.6]]
    assert made.logps_RC.tolist() == [[-1, 0, 0], [0, -2, 0], [0, 0, -3]]
    assert made.logps_RC.dtype == torch.float32


def test_first_tokens_are_recorded_for_lines_in_any_order():
    made = lines(4, 3, limit=3, ends=(9,))
    set_all(made, length_R=[7, 0, 0, 5], token_R=[1, 2, 3, 4], position_R=[6, 0, 0, 4])
    at, alive = torch.tensor([2, 1]), torch.ones(2, dtype=torch.bool)
    made.record(at, torch.tensor([8, 9]), torch.tensor([-0.5, -1.5]), torch.tensor([20, 30]), alive)
    assert made.token_R.tolist() == [1, 9, 8, 4]
    assert made.length_R.tolist() == [7, 0, 21, 5]
    assert made.position_R.tolist() == [6, 0, 20, 4]
    assert made.finished_R.tolist() == [0, 1, 0, 0]
    assert made.drawn_R.tolist() == [0, 1, 1, 0]
    assert made.tokens_RC[:, 0].tolist() == [0, 9, 8, 0]
    assert made.logps_RC[:, 0].tolist() == [0, -1.5, -0.5, 0]


def test_a_step_of_some_lines_leaves_the_others_and_every_tensor_where_it_was():
    made = lines(4, 3, limit=3)
    set_all(made, length_R=[1, 2, 3, 4])
    before = [line.clone() for line in made.lines()]
    addresses = [line.data_ptr() for line in made.lines()]
    advance(made.first(2), torch.randn(2, 8), GREEDY)
    assert [line.data_ptr() for line in made.lines()] == addresses
    assert not same([line[2:] for line in before], [line[2:] for line in made.lines()])
    assert same([line[:2] for line in before], [line[:2] for line in made.lines()])


class Walk(torch.nn.Module):
    """A model without attention: the logits of a token at a position are a line of a table."""

    def __init__(self, inner, vocabulary):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Identity()])
        self.qerl = SimpleNamespace(inner=inner, plan=SimpleNamespace(layers=("layers.0",)))
        generator = torch.Generator().manual_seed(0)
        self.table = 3 * torch.randn(vocabulary, vocabulary, generator=generator)

    def forward(self, input_ids, position_ids, **_):
        assert input_ids.shape == position_ids.shape == (len(input_ids), 1)
        return SimpleNamespace(logits=self.table[(input_ids + position_ids) % len(self.table)])


def walk(inner, temperature, shapes):
    """Run lines to their ends, for each (lines, of a step, columns); return what became of them."""
    ends = (3, 5, *range(0, 600, 40))[:16]
    cache: Any = SimpleNamespace(keys=[], values=[])
    code = StepCode.of(Walk(inner, 600), Sampling(1, ends, 0, temperature), {}, graphs=True)
    step = DecodeStep(code, cache, lines(1, 1, limit=1), graphs=True)
    found = []
    for rows, size, columns in shapes:
        made = lines(rows, columns, limit=columns - 1, ends=ends)
        generator = torch.Generator().manual_seed(rows)
        made.uniform_RC.copy_(torch.rand(rows, columns, generator=generator, dtype=torch.float64))
        length = torch.randint(0, 9, (rows,), generator=generator)  # some are idle from the start
        set_all(made, length_R=length.tolist(), position_R=(length - 1).clamp(min=0).tolist())
        step.rows = made
        for _ in range(columns):
            step._step(size)  # what a CUDA graph captures
        assert not made.length_R[:size].any()
        found.append(made)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_one_compiled_graph_for_all_sizes_and_lengths_does_what_the_eager_step_does(temperature):
    shapes = [(8, 8, 8), (8, 4, 8), (5, 3, 20), (16, 16, 16), (4, 2, 5)]
    want = walk("eager", temperature, shapes)
    before = counters["stats"]["unique_graphs"]
    got = walk("inductor", temperature, shapes)
    assert counters["stats"]["unique_graphs"] == before + 1
    for one, other in zip(want, got, strict=True):
        assert not same(one.lines(), other.lines(), set(NAMES) - {"logps"})
        assert one.finished_R.any()
        torch.testing.assert_close(other.logps_RC, one.logps_RC, rtol=0, atol=2e-6)  # sums in another order


def test_without_code_generation_every_bit_is_that_of_the_eager_step():
    drawing, generator = partial(draw, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0), torch.Generator().manual_seed(0)
    one, other = (lines(6, 9, limit=9, ends=(3,)) for _ in range(2))
    for made in (one, other):
        set_all(made, length_R=[4, 0, 2, 7, 1, 3], drawn_R=[0, 9, 3, 8, 2, 2])
        made.uniform_RC.copy_(torch.linspace(0, 0.99, 54, dtype=torch.float64).view(6, 9))
    compiled = isolated(advance, "aot_eager")
    for _ in range(4):
        logits_BV = torch.randn(6, 40, generator=generator)
        advance(one, logits_BV, drawing)
        compiled(other, logits_BV, drawing)
        assert not same(one.lines(), other.lines())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_compiled_steps_too_show_logits_that_are_not_finite_and_take_the_first_of_equals(temperature):
    drawing = partial(draw, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0)
    logits_BV = torch.zeros(5, 1300)
    logits_BV[0, 700], logits_BV[1, 3], logits_BV[2] = math.nan, math.inf, -math.inf
    logits_BV[3, 600:] = 200.0  # the rest has no mass in float32
    for function in (advance, isolated(advance, "inductor")):
        made = lines(5, 4, limit=4)
        set_all(made, length_R=[1] * 5)
        function(made, logits_BV, drawing)
        assert made.logps_RC[:, 0].isnan().tolist() == [True, True, True, False, False]
        assert made.token_R[3:].tolist() == [600, 0]  # the first of equals, and what is drawn at 0
        assert made.token_R.max() < 1300
        assert made.token_R.min() >= 0


def test_completions_are_written_in_place_and_not_copied():
    def scattering(made, logits_BV, drawing):
        token_B, _ = drawing(logits_BV, made.uniform_RC[:, 0])
        made.tokens_RC.scatter_(1, made.drawn_R[:, None], token_B[:, None])

    for function, copies in ((advance, False), (scattering, True)):
        made = lines(6, 76, limit=76)
        with config.patch(force_disable_caches=True):
            _, (code,) = run_and_get_code(isolated(function, "inductor"), made, torch.randn(6, 40), GREEDY)
        assert bool(re.search(r"empty_strided\w*\(\([^)]*\b77\b", code)) == copies


@pytest.mark.parametrize("change", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("inner", ["inductor", "eager", None])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_is_compiled_where_it_is_captured_and_sorts_nothing(change, inner, graphs):
    model = Walk(inner, 8) if inner else SimpleNamespace()
    code = StepCode.of(model, Sampling(2, (), 0, **change), {}, graphs=graphs)
    assert code.fused == (graphs and inner == "inductor" and (not change or "temperature" in change))
    assert (code.advance is advance) == (not code.fused)
