"""What our engine keeps between calls, what it shares within one, what it refuses, and what it leaves alone."""

import gc
import math
import weakref

import pytest
import torch

from qerl_compile.errors import ModelError
from qerl_compile.isolation import isolated
from qerl_compile.rl.rollout import leaves
from qerl_compile.rl.rollout import paged as engine
from qerl_compile.rl.rollout.cache import CacheShape, PrefillView, attend, paged_attention
from qerl_compile.rl.rollout.memory import Workload
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.rollout.schedule import Schedule
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.transforming import resample_noise, transform
from tests.models import LONG, tiny_model
from tests.rl.rollout.engines import PROMPTS, RECIPE

GREEDY = Sampling(6, (), 0, 0.0)
A_PAGE = CacheShape(2, 2, 16, 4, torch.float32).page_bytes


@pytest.fixture(scope="module")
def shared_model():
    model = tiny_model("llama")
    model.lm_head.weight.data.mul_(8)
    model = transform(model, RECIPE, inner="eager")
    train(model, 1)
    return model


@pytest.fixture
def model(shared_model):
    yield shared_model
    train(shared_model, 1)
    resample_noise(shared_model, 0.0)


@torch.no_grad()
def train(model, seed):
    """Other adapters, in place, as an optimizer leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1, generator=generator)


def paged(model, rows=3, **options):
    return PagedSampler(model, rows=rows, **{"page_tokens": 4, **options})


def graphs(model):
    return [compiler.graphs for compiler in model.qerl.compilers]


def pages_of(sampler):
    return [(pages.data_ptr(), tuple(pages.shape)) for pages in (*sampler._cache.keys, *sampler._cache.values)]


# Adapters, noise and graphs


def test_adapters_and_noise_act_at_the_next_call_without_new_graphs(model):
    sampler = paged(model)
    first = sampler.generate(PROMPTS, 2, GREEDY)
    sampler.generate(PROMPTS[:1], 1, GREEDY)  # one row has a graph of its own
    count, steps = graphs(model), dict(sampler._steps)
    train(model, 2)
    second = sampler.generate(PROMPTS, 2, GREEDY)
    resample_noise(model, 0.3, torch.Generator().manual_seed(0))
    third = sampler.generate(PROMPTS, 2, GREEDY)
    assert len({first.rollouts, second.rollouts, third.rollouts}) == 3
    assert third.rollouts == paged(model).generate(PROMPTS, 2, GREEDY).rollouts
    resample_noise(model, 0.0)
    train(model, 1)
    assert sampler.generate(PROMPTS, 2, GREEDY).rollouts == first.rollouts
    assert graphs(model) == count
    assert sampler._steps == steps


def test_neither_depth_nor_lengths_nor_rows_nor_pages_make_graphs():
    counts = []
    for layers in (1, 3):
        model = transform(tiny_model("llama", layers=layers), RECIPE, inner="eager")
        for rows, prompts, new in (
            (1, PROMPTS[:1], 2),  # a cache of one page
            (3, PROMPTS, 9),
            (8, [tuple(range(40)), *PROMPTS], 3),
            (5, [(7,)], 70),
        ):
            sampler = PagedSampler(model, rows=rows, page_tokens=16)
            for group_size in (1, 4):
                sampler.generate(prompts, group_size, Sampling(new, (), 0))
        counts.append(graphs(model))
    assert counts[0] == counts[1]
    training, rollout = counts[0]
    assert training == 0
    assert rollout == 3  # prefill, one row, several rows


def test_a_change_of_temperature_or_truncation_is_followed(model):
    sampler = paged(model)
    for changes in ({"temperature": 0.5}, {"temperature": 1.0}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.4}, {}):
        params = Sampling(6, (3,), 0, **changes, seed=(1,))
        got = sampler.generate(PROMPTS, 2, params)
        assert got.rollouts == paged(model).generate(PROMPTS, 2, params).rollouts


# Pages


def test_a_group_shares_the_pages_of_its_prompt(model, monkeypatch):
    """Eleven tokens are two full pages of four and a partial one, which three of four samples copy."""
    tables, prefilled, copied = [], [], []

    class Watched(Schedule):
        def admit(self):
            admission = super().admit()
            tables.extend(start.pages for start in admission.starts)
            prefilled.extend(admission.prefills)
            copied.extend(admission.copies)
            return admission

    monkeypatch.setattr(engine, "Schedule", Watched)
    sampler = paged(model, rows=4)
    got = sampler.generate([PROMPTS[2]], 4, GREEDY)
    (prefill,) = prefilled
    assert got.metrics["rollout/prefill_tokens"] == 11
    assert {pages[:2] for pages in tables} == {prefill.pages[:2]}
    assert [source for source, _ in copied] == [prefill.pages[2]] * 3
    own = [page for pages in tables for page in pages[2:]]
    assert len(own) == len(set(own)) == 4 * 3  # ceil(17 / 4) - 2
    assert sampler._cache.pages == 2 + 4 * 3
    for keys in sampler._cache.keys:  # greedy samples are equal, and so is what each wrote to pages of its own
        first = keys[list(tables[0][2:])].transpose(1, 2).flatten(0, 1)[: 16 - 8]
        for pages in tables[1:]:
            assert torch.equal(keys[list(pages[2:])].transpose(1, 2).flatten(0, 1)[: 16 - 8], first)


def test_pages_are_back_after_every_call(model, monkeypatch):
    pools = []

    class Watched(engine.PagePool):
        def __init__(self, pages):
            super().__init__(pages)
            pools.append(self)

    monkeypatch.setattr(engine, "PagePool", Watched)
    sampler = paged(model)
    for group_size, new in ((1, 1), (3, 7), (2, 4)):
        sampler.generate(PROMPTS, group_size, Sampling(new, (3, 5, 9), 0, seed=(1,)))
    assert len(pools) == 3
    assert all(pool.free == pool.pages > 0 for pool in pools)


def test_what_earlier_calls_left_in_the_pages_is_never_read(model):
    sampler = paged(model)
    want = sampler.generate(PROMPTS, 3, Sampling(7, (3, 64), 0, seed=(1,)))
    with torch.inference_mode():
        for pages in (*sampler._cache.keys, *sampler._cache.values):
            pages.fill_(math.nan)
    assert sampler.generate(PROMPTS, 3, Sampling(7, (3, 64), 0, seed=(1,))).rollouts == want.rollouts


def test_memory_is_reused_where_it_fits_and_replaced_where_it_does_not(model):
    sampler = paged(model)
    sampler.generate(PROMPTS, 2, GREEDY)
    before, lines = pages_of(sampler), sampler._lines
    for prompts, group_size, new in ((PROMPTS, 2, 6), (PROMPTS[:1], 1, 2), (PROMPTS[1:], 9, 5)):
        sampler.generate(prompts, group_size, Sampling(new, (), 0))
        assert pages_of(sampler) == before
        assert sampler._lines is lines
    want = paged(model).generate(PROMPTS, 2, Sampling(40, (), 0, 0.0))
    assert sampler.generate(PROMPTS, 2, Sampling(40, (), 0, 0.0)).rollouts == want.rollouts
    larger = pages_of(sampler)
    assert larger[0][1][0] > before[0][1][0]
    sampler.generate(PROMPTS, 2, GREEDY)
    assert pages_of(sampler) == larger
    assert want.metrics["rollout/cache_bytes"] == larger[0][1][0] * A_PAGE


def test_released_memory_is_gone_and_made_anew_as_it_was(model):
    sampler = paged(model)
    sampler.generate(PROMPTS, 2, Sampling(40, (), 0, 0.0))  # the largest call so far decides, as if nothing were freed
    want = sampler.generate(PROMPTS, 2, GREEDY)
    shapes, lines = [shape for _, shape in pages_of(sampler)], sampler._lines.size
    held = (*sampler._cache.keys, *sampler._cache.values, *sampler._lines.lines())
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in held]
    size_bytes = sum(pages.nbytes for pages in held[: len(shapes)])
    del held
    assert sampler.release() == size_bytes == want.metrics["rollout/cache_bytes"]
    gc.collect()
    assert not any(storage() for storage in storages)
    assert sampler.release() == 0
    count = graphs(model)
    assert sampler.generate(PROMPTS, 2, GREEDY).rollouts == want.rollouts
    assert [shape for _, shape in pages_of(sampler)] == shapes
    assert sampler._lines.size == lines
    assert graphs(model) == count


def test_pages_that_no_longer_fit_are_counted_anew(model, monkeypatch):
    sampler = paged(model, rows=8)
    want = sampler.generate(PROMPTS, 2, GREEDY)
    had = sampler._cache.pages
    sampler.release()
    monkeypatch.setattr(engine, "_free_bytes", lambda _: had * A_PAGE)  # none would be left for a step
    got = sampler.generate(PROMPTS, 2, GREEDY)
    assert sampler._cache.pages < had
    assert [r.completion_ids for r in got] == [r.completion_ids for r in want]
    sampler.release()
    monkeypatch.setattr(engine, "_free_bytes", lambda _: 3 * A_PAGE)
    with pytest.raises(ModelError, match="rollout memory"):
        sampler.generate(PROMPTS, 2, GREEDY)


def test_compiled_functions_outlive_the_memory_they_worked_on(model, monkeypatch):
    sampler, counted = paged(model), []
    monkeypatch.setattr(leaves, "isolated", lambda function, _: isolated(function, "eager"))
    with monkeypatch.context() as patch:
        patch.setattr(model.qerl, "inner", "inductor")  # small modules are compiled where Inductor is, as on a GPU
        sampler._leaves = leaves.compiled_leaves(model)
    assert len(sampler._leaves) == 2
    for _ in range(3):
        for params in (GREEDY, Sampling(6, (), 0, seed=(1,))):
            sampler.generate(PROMPTS, 2, params)
        code = dict(sampler._code)
        sampler.release()
        counted.append((torch._dynamo.utils.counters["stats"]["unique_graphs"], *map(id, code.values())))
    assert len(code) == 2
    assert len(set(counted)) == 1


@pytest.mark.parametrize("pages", [5, 6, 7, 9, 30])
def test_a_small_budget_makes_rows_wait_and_changes_no_token(model, pages):
    """The longest prompt needs three pages of prompt and three of its sample; one of five runs without a group."""
    group_size = 1 if pages == 5 else 3
    params = Sampling(6, (3, 64), 0, seed=(1,))
    want = paged(model, rows=8).generate(PROMPTS, group_size, params)
    sampler = paged(model, rows=8, budget_bytes=pages * A_PAGE)
    got = sampler.generate(PROMPTS, group_size, params)
    assert [r.completion_ids for r in got] == [r.completion_ids for r in want]
    for one, other in zip(got, want, strict=True):  # torch's products differ in the last bit with the number of rows
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    assert sampler._cache.pages <= pages
    assert got.metrics["rollout/decode_steps"] >= want.metrics["rollout/decode_steps"]


# Flags that are seen late, as on a GPU


class LateFlags:
    """`_EndFlags` without a GPU: what rows ended is told `ahead` steps later, as values of that time."""

    def __init__(self, finished_R, ahead):
        self.finished_R, self.ahead, self.pending = finished_R, ahead, []

    def after(self, step):
        self.pending.append((step, self.finished_R.tolist()))
        return [self.pending.pop(0)] if len(self.pending) > self.ahead else []

    def drain(self):
        pending, self.pending = self.pending, []
        return pending


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3, 9] if LONG else [3])
@pytest.mark.parametrize("ends", [(), tuple(range(0, 128, 8)), tuple(range(0, 128, 16))], ids=len)
def test_flags_that_come_late_change_no_sample(model, monkeypatch, ahead, rows, ends):
    params = Sampling(7, ends, 0, seed=(1,))
    want = paged(model, rows=rows).generate(PROMPTS, 5, params)
    monkeypatch.setattr(engine, "_EndFlags", lambda finished_R, **_: LateFlags(finished_R, ahead))
    got = paged(model, rows=rows).generate(PROMPTS, 5, params)
    assert [r.completion_ids for r in got] == [r.completion_ids for r in want]
    assert [r.ended for r in got] == [r.ended for r in want]
    for one, other in zip(got, want, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    taken, least = (rollouts.metrics["rollout/decode_steps"] for rollouts in (got, want))
    assert taken > least if ends else taken == least  # the limit is known beforehand, so nothing is run after it


# Refusals


def forbid_running(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model ran"))


@pytest.mark.parametrize(
    "budget, match",
    [
        (4 * A_PAGE, r"rollout memory: expected a key-value cache of at least 5 pages .* prompt 2 has 11 tokens"),
        (2**60, "rollout memory: expected a key-value cache within"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(model, monkeypatch, budget, match):
    forbid_running(model, monkeypatch)
    with pytest.raises(ModelError, match=match):
        paged(model, budget_bytes=budget).generate(PROMPTS, 1, GREEDY)


def test_a_refused_call_leaves_the_memory_of_earlier_ones(model):
    sampler = paged(model, budget_bytes=20 * A_PAGE)
    want = sampler.generate(PROMPTS, 2, GREEDY)
    before = pages_of(sampler)
    with pytest.raises(ModelError, match="rollout memory"):
        sampler.generate([tuple(range(100))], 2, GREEDY)
    assert pages_of(sampler) == before
    assert sampler.generate(PROMPTS, 2, GREEDY).rollouts == want.rollouts


@pytest.mark.parametrize(
    "prompts, group_size, params, match",
    [
        ([(5,), (), (7,)], 1, GREEDY, "expected prompts of one token or more, got none in prompt 1"),
        (PROMPTS, 0, GREEDY, "expected group_size >= 1, got 0"),
        (PROMPTS, 1, Sampling(2, tuple(range(17)), 0), "expected at most 16 end_ids, got 17"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(model, monkeypatch, prompts, group_size, params, match):
    forbid_running(model, monkeypatch)
    with pytest.raises(ValueError, match=match):
        paged(model).generate(prompts, group_size, params)


def test_sixteen_end_tokens_are_looked_for(model):
    free = paged(model).generate(PROMPTS, 1, GREEDY)
    ends = tuple(range(112, 127)), (free[0].completion_ids[3],)
    got = paged(model).generate(PROMPTS, 1, Sampling(6, ends[0] + ends[1], 0, 0.0))
    assert got[0].completion_ids == free[0].completion_ids[: free[0].completion_ids.index(ends[1][0]) + 1]


def test_no_prompts_do_nothing(model):
    sampler = paged(model)
    assert len(sampler.generate([], 3, GREEDY)) == 0
    assert sampler._cache is None


def test_a_call_without_the_engines_cache_is_refused():
    model = tiny_model("llama", layers=1)
    with paged_attention(model), pytest.raises(ModelError, match="without its cache"):
        model(input_ids=torch.tensor([[5, 6]]), use_cache=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_that_no_kernel_computes_is_refused(compiled):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    model = transform(model, RECIPE, inner="eager") if compiled else model
    with pytest.raises(ModelError, match=r"rollout: Gemma2ForCausalLM: .* got softcap\. Use HuggingFaceSampler"):
        PagedSampler(model)


def test_a_mask_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="got attention_mask"):
        attend(torch.nn.Linear(1, 1), q, q, q, torch.ones(3, 3), qerl_cache=object())


# What is left alone


def test_the_models_own_attention_is_back_after_a_call_and_after_an_error(model):
    before = model.config._attn_implementation
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    sampler = paged(model)
    sampler.generate(PROMPTS, 1, GREEDY)
    assert model.config._attn_implementation == before
    head = model.lm_head.weight
    kept = head.data.clone()
    head.data[3] = math.nan
    with pytest.raises(ModelError, match="prompt 0, sample 0: expected finite"):
        sampler.generate(PROMPTS, 2, GREEDY)
    head.data.copy_(kept)
    assert model.config._attn_implementation == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
    assert sampler.generate(PROMPTS, 1, GREEDY).rollouts == paged(model).generate(PROMPTS, 1, GREEDY).rollouts


def test_an_interrupted_call_leaves_nothing_behind(model):
    sampler = paged(model)
    want = sampler.generate(PROMPTS, 2, GREEDY)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(PROMPTS, 2, Sampling(6, (), 0, 0.0))
    hook.remove()
    assert model.config._attn_implementation != "qerl_paged"
    assert sampler.generate(PROMPTS, 2, GREEDY).rollouts == want.rollouts


@pytest.mark.parametrize("inner", ["eager", "inductor"] if LONG else ["eager"])
def test_training_after_rollouts_is_training_without_them(inner):
    ids = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    losses, states = [], []
    for rolls_out in (False, True):
        model = transform(tiny_model("llama", layers=1), RECIPE, inner=inner)
        train(model, 3)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        sampler = paged(model)
        for step in range(3):
            if rolls_out:
                resample_noise(model, 0.1, torch.Generator().manual_seed(step))
                sampler.generate(PROMPTS, 2, Sampling(4, (), 0, seed=(step,)))
                resample_noise(model, 0.0)
            loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        states.append([parameter.detach().clone() for parameter in parameters])
    assert losses[:3] == losses[3:]
    assert len(set(losses)) == 3
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_rollouts_follow_the_training_between_them():
    model = transform(tiny_model("llama", layers=1), RECIPE, inner="eager")
    train(model, 3)
    sampler = paged(model)
    seen = set()
    for _ in range(3):
        seen.add(sampler.generate(PROMPTS, 1, Sampling(8, (), 0, seed=(1,))).rollouts)
        assert sampler.generate(PROMPTS, 1, GREEDY).rollouts == paged(model).generate(PROMPTS, 1, GREEDY).rollouts
        model(input_ids=torch.tensor([PROMPTS[2]]), use_cache=False).logits.logsumexp(-1).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * 0.05)
                    parameter.grad = None
    assert len(seen) == 3


def test_a_single_prompt_of_one_token_is_padded_to_what_one_graph_takes(model):
    sampler = paged(model)
    sampler.generate(PROMPTS, 1, GREEDY)
    view = PrefillView(sampler._cache, [(9,)], [(2,)])
    assert view.ids_1N.tolist() == [[9, 0]]
    assert (view.length_B.tolist(), view.last.tolist()) == ([1, 0], [0])
    assert view.pad_BT.shape == (2, 2)
    assert Workload((1,), 1, 1, 4).prompt_pages(0) == 1
