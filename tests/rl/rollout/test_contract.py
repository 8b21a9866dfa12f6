"""What every engine promises, whatever it is made of. engines.py lists the engines."""

import math

import pytest
import torch

from qerl_compile.errors import ModelError
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.transforming import resample_noise
from tests.rl.rollout.engines import ENGINES, PROMPTS, computing, make_world, reset

END_IDS = tuple(range(0, 128, 8))  # one token in eight ends, so that rows end at different times


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("contract") / "base")


@pytest.fixture
def world(shared_world):
    yield shared_world
    reset(shared_world)


@pytest.fixture(params=ENGINES)
def engine(request, world):
    return ENGINES[request.param](world)


def test_rollouts_come_group_after_group(engine):
    got = engine.generate(PROMPTS, 3, Sampling(4, END_IDS, 0, seed=(1,)))
    assert [rollout.prompt_ids for rollout in got] == [prompt for prompt in PROMPTS for _ in range(3)]


def test_a_completion_ends_with_its_first_end_token_or_at_the_limit(engine):
    got = engine.generate(PROMPTS, 6, Sampling(5, END_IDS, 0, seed=(2,)))
    for rollout in got:
        assert 1 <= len(rollout.completion_ids) <= 5
        assert not set(rollout.completion_ids[:-1]) & set(END_IDS)
        assert rollout.ended == (rollout.completion_ids[-1] in END_IDS)
        assert rollout.ended or len(rollout.completion_ids) == 5
        assert len(rollout.logps) == len(rollout.completion_ids)
    assert {rollout.ended for rollout in got} == {True, False}
    assert len({len(rollout.completion_ids) for rollout in got}) > 2


def test_the_checkpoints_own_end_token_ends_nothing_unless_asked(engine, world):
    free = engine.generate(PROMPTS, 1, Sampling(6, (), 0, 0.0))
    third = free[0].completion_ids[2]
    world.patch.setattr(world.model.generation_config, "eos_token_id", third)
    assert [rollout.completion_ids for rollout in engine.generate(PROMPTS, 1, Sampling(6, (), 0, 0.0))] == [
        rollout.completion_ids for rollout in free
    ]
    asked = engine.generate(PROMPTS, 1, Sampling(6, (third,), 0, 0.0))[0]
    assert asked.completion_ids == free[0].completion_ids[: free[0].completion_ids.index(third) + 1]
    assert asked.ended


def test_greedy_is_deterministic_and_records_probability_one(engine):
    first, second = (engine.generate(PROMPTS, 2, Sampling(5, (), 0, 0.0, seed=(seed,))) for seed in (1, 2))
    assert [r.completion_ids for r in first] == [r.completion_ids for r in second]
    assert all(first[2 * i].completion_ids == first[2 * i + 1].completion_ids for i in range(len(PROMPTS)))
    assert {logp for rollout in first for logp in rollout.logps} == {0.0}


def test_equal_seeds_give_equal_samples_and_samples_of_a_group_differ(engine):
    first, again, other = (engine.generate(PROMPTS, 4, Sampling(6, (), 0, seed=seed)) for seed in ((1,), (1,), (2,)))
    assert first.rollouts == again.rollouts
    assert first.rollouts != other.rollouts
    assert len({rollout.completion_ids for rollout in first}) > len(PROMPTS)


@pytest.mark.parametrize("top_k", [0, 3])
def test_log_probabilities_are_those_of_the_whole_distribution(engine, world, top_k):
    """With top-k the tokens come from three, but the recorded numbers stay those among all."""
    got = engine.generate(PROMPTS, 3, Sampling(5, END_IDS, 0, top_k=top_k, seed=(3,)))
    for rollout in got:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = world.model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
        chosen = ids[0, len(rollout.prompt_ids) :, None]
        want = torch.log_softmax(logits, -1).gather(1, chosen).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logps), want, rtol=0, atol=1e-4)
        ranks = (logits > logits.gather(1, chosen)).sum(1)
        assert not top_k or int(ranks.max()) < top_k


def test_adapters_and_noise_are_those_of_the_model_at_the_time_of_the_call(engine, world):
    greedy = Sampling(6, (), 0, 0.0)
    clean = engine.generate(PROMPTS, 1, greedy)
    resample_noise(world.model, 0.3, torch.Generator().manual_seed(0))
    noisy = engine.generate(PROMPTS, 1, greedy)
    want = [greedy_alone(world.model, prompt, 6) for prompt in PROMPTS]
    assert [rollout.completion_ids for rollout in noisy] == want
    assert noisy.rollouts != clean.rollouts
    resample_noise(world.model, 0.0)
    assert engine.generate(PROMPTS, 1, greedy).rollouts == clean.rollouts


def greedy_alone(model, prompt, count):
    """Greedy without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_the_callers_random_numbers_are_left_alone(engine):
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    engine.generate(PROMPTS, 2, Sampling(3, (), 0, seed=(1,)))
    assert torch.equal(torch.rand(3), want)


def test_no_prompts_give_no_rollouts(engine):
    assert len(engine.generate([], 4, Sampling(3, (2,), 0))) == 0


def test_metrics_are_numbers_by_name(engine):
    metrics = engine.generate(PROMPTS[:1], 1, Sampling(2, (2,), 0)).metrics
    assert all(isinstance(value, float) and math.isfinite(value) and "/" in name for name, value in metrics.items())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_no_sample(engine, world, temperature):
    head = computing(engine, world).lm_head.weight
    before = head.data.clone()
    head.data[3] = math.nan
    try:
        with pytest.raises(ModelError, match=r"rollout.*: expected finite log-probabilities"):
            engine.generate(PROMPTS, 2, Sampling(3, (2,), 0, temperature))
    finally:
        head.data.copy_(before)
