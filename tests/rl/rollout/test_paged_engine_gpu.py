"""What only a GPU has: steps replayed from CUDA graphs, and end flags that the host sees a step late."""

import gc

import pytest
import torch
from torch._dynamo.utils import counters

from qerl_compile.rl.rollout import paged as engine
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.rollout.schedule import compact
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.transforming import resample_noise, transform
from tests.models import tiny_model
from tests.rl.rollout.engines import PROMPTS, RECIPE

ENDS = tuple(range(0, 128, 8))
SAMPLED = Sampling(12, ENDS, 0, seed=(1,))


@pytest.fixture(scope="module", params=["eager", "inductor"])
def model(request):
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.lm_head.weight.data.mul_(8)
    model = transform(model.cuda(), RECIPE, inner=request.param)
    train(model, 1)
    return model


@torch.no_grad()
def train(model, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1, generator=generator)


@pytest.fixture
def two_rows_at_least(monkeypatch):
    """Graphs have two rows at least; eager steps are given the same sizes, since products depend on them."""
    monkeypatch.setattr(engine, "compact", lambda running, sizes: compact(running, [s for s in sizes if s > 1]))


@pytest.mark.parametrize("rows, group_size", [(8, 2), (3, 4), (16, 4)])  # all at once; refills; many copies
@pytest.mark.parametrize("params", [SAMPLED, Sampling(12, (), 0, 0.0), Sampling(12, ENDS, 0, top_k=5)], ids=str)
def test_replayed_steps_equal_eager_ones_bit_for_bit(model, two_rows_at_least, rows, group_size, params):
    replayed = PagedSampler(model, rows=rows).generate(PROMPTS, group_size, params)
    eager = PagedSampler(model, rows=rows, graphs=False).generate(PROMPTS, group_size, params)
    assert [r.completion_ids for r in replayed] == [r.completion_ids for r in eager]
    if model.qerl.inner == "eager" or params.truncated or not params.temperature:  # else the draw is one fused kernel
        assert replayed.rollouts == eager.rollouts
    for one, other in zip(replayed, eager, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_completions_end_at_their_first_end_token_and_logps_are_the_models(model):
    got = PagedSampler(model, rows=5).generate(PROMPTS, 6, SAMPLED)
    assert [r.prompt_ids for r in got] == [prompt for prompt in PROMPTS for _ in range(6)]
    assert {r.ended for r in got} == {True, False}
    for rollout in got:
        assert not set(rollout.completion_ids[:-1]) & set(ENDS)
        assert rollout.ended == (rollout.completion_ids[-1] in ENDS)
        assert rollout.ended or len(rollout.completion_ids) == 12
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]], device="cuda")
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
        want = torch.log_softmax(logits, -1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logps), want.cpu(), rtol=0, atol=0.15)  # logits of 8 in bf16


def test_repeating_a_call_repeats_every_bit(model):
    sampler = PagedSampler(model, rows=5)
    first = sampler.generate(PROMPTS, 6, SAMPLED)
    for _ in range(5):
        assert sampler.generate(PROMPTS, 6, SAMPLED).rollouts == first.rollouts
    assert PagedSampler(model, rows=5).generate(PROMPTS, 6, SAMPLED).rollouts == first.rollouts


def test_adapters_and_noise_act_at_the_next_call_without_a_new_capture(model):
    sampler = PagedSampler(model, rows=5)
    greedy = Sampling(12, (), 0, 0.0)
    first = sampler.generate(PROMPTS, 2, greedy)
    captured = [dict(step.steps) for step in sampler._steps.values()]
    train(model, 2)
    second = sampler.generate(PROMPTS, 2, greedy)
    resample_noise(model, 0.3, torch.Generator().manual_seed(0))
    third = sampler.generate(PROMPTS, 2, greedy)
    assert len({first.rollouts, second.rollouts, third.rollouts}) == 3
    assert third.rollouts == PagedSampler(model, rows=5).generate(PROMPTS, 2, greedy).rollouts
    resample_noise(model, 0.0)
    train(model, 1)
    assert sampler.generate(PROMPTS, 2, greedy).rollouts == first.rollouts
    assert [dict(step.steps) for step in sampler._steps.values()] == captured


def test_a_capture_in_the_middle_of_a_call_changes_nothing(model):
    """Smaller graphs are captured when rows have moved together; the next call has them all."""
    sampler = PagedSampler(model, rows=16)
    first = sampler.generate(PROMPTS, 4, SAMPLED)
    (step,) = sampler._steps.values()
    assert len(step.steps) > 1
    count = len(step.steps)
    assert sampler.generate(PROMPTS, 4, SAMPLED).rollouts == first.rollouts
    assert len(step.steps) == count


def test_one_token_is_drawn_without_a_step(model):
    rollouts = PagedSampler(model, rows=3).generate(PROMPTS, 4, Sampling(1, (), 0))
    assert [len(r.completion_ids) for r in rollouts] == [1] * 16
    assert rollouts.metrics["rollout/decode_steps"] == 0


def test_no_step_is_run_after_the_limit_of_all_rows(model):
    metrics = PagedSampler(model, rows=64).generate(PROMPTS, 2, Sampling(12, (), 0)).metrics
    assert (metrics["rollout/decode_steps"], metrics["rollout/occupancy"]) == (11, 1)
    refilled = PagedSampler(model, rows=len(PROMPTS)).generate(PROMPTS, 2, Sampling(12, (), 0)).metrics
    assert (refilled["rollout/decode_steps"], refilled["rollout/occupancy"]) == (22, 1)


def test_memory_is_flat_over_many_calls(model):
    sampler = PagedSampler(model, rows=5)

    def allocated(call):
        sampler.generate(PROMPTS, 3 + call % 3, Sampling(12 - call % 4, ENDS, 0, seed=(call,)))
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    warm = max(allocated(call) for call in range(12))
    assert max(allocated(call) for call in range(20)) <= warm
    sampler.release()
    gc.collect()
    assert torch.cuda.memory_allocated() < warm


def test_released_memory_is_back_and_made_anew_without_compiling(model):
    sampler = PagedSampler(model, rows=5)
    params = (SAMPLED, Sampling(12, (), 0, 0.0))
    want = [sampler.generate(PROMPTS, 6, each).rollouts for each in params]
    gc.collect()
    torch.cuda.synchronize()
    full, graphs = torch.cuda.memory_allocated(), counters["stats"]["unique_graphs"]
    for _ in range(3):
        freed_bytes = sampler.release()
        gc.collect()
        assert torch.cuda.memory_allocated() <= full - freed_bytes
        assert [sampler.generate(PROMPTS, 6, each).rollouts for each in params] == want
        gc.collect()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= full
    assert counters["stats"]["unique_graphs"] == graphs
