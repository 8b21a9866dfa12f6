"""The reference engine against Hugging Face run one prompt at a time, and against what a checkpoint could slip in."""

import math

import pytest
import torch
from transformers import GenerationConfig

from qerl_compile.rl.rollout.hf import HuggingFaceSampler
from qerl_compile.rl.rollout.types import Sampling
from tests.models import FAMILIES, tiny_model
from tests.rl.rollout.engines import PROMPTS


def sharp(family="llama", **changes):
    """A plain model whose most likely tokens are likely, so that a changed distribution shows."""
    model = tiny_model(family, **changes)
    model.lm_head.weight.data.mul_(8)
    return model


def alone(model, prompt, count, end_ids):
    """Hugging Face's greedy completion of one unpadded prompt."""
    options = {"do_sample": False, "eos_token_id": list(end_ids), "pad_token_id": 0}
    return tuple(model.generate(torch.tensor([prompt]), max_new_tokens=count, **options)[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_each_prompt_alone_and_unpadded(family):
    model = sharp(family, **({"sliding_window": 8} if family == "gemma3" else {}))
    free = [alone(model, prompt, 8, (127,)) for prompt in PROMPTS]
    end_ids = (free[0][2], free[2][5], 126)  # tokens that do come, in different rows at different times
    want = [alone(model, prompt, 8, end_ids) for prompt in PROMPTS]
    assert len({len(completion) for completion in want}) >= 2
    for batch in (1, 3, 16):
        got = HuggingFaceSampler(model, batch).generate(PROMPTS, 2, Sampling(8, end_ids, 0, 0.0))
        assert [rollout.completion_ids for rollout in got] == [tokens for tokens in want for _ in range(2)]


HOSTILE = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 6,
    "suppress_tokens": list(range(3, 120)),
    "bad_words_ids": [[1]],
    "forced_eos_token_id": 9,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "temperature": 0.01,
    "do_sample": True,
    "eos_token_id": [2, 17, 30],
    "pad_token_id": 77,
    "max_length": 5,
    "num_beams": 3,
    "num_return_sequences": 2,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_comes_from_the_checkpoints_generation_config(key, temperature):
    model = sharp()
    sampler, sampling = HuggingFaceSampler(model), Sampling(6, (2, 9), 0, temperature, seed=(1,))
    want = sampler.generate(PROMPTS, 3, sampling)
    hostile = GenerationConfig(eos_token_id=2, pad_token_id=0)
    setattr(hostile, key, HOSTILE[key])
    model.generation_config = hostile
    assert sampler.generate(PROMPTS, 3, sampling) == want
    assert model.generation_config is hostile  # and it is given back


def test_the_generation_config_is_given_back_after_an_error():
    model = sharp()
    before = model.generation_config
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(Exception, match="finite"):
        HuggingFaceSampler(model).generate(PROMPTS, 1, Sampling(2, (2,), 0))
    assert model.generation_config is before


@pytest.mark.parametrize(
    "truncation",
    [{}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.15}, {"top_k": 8, "top_p": 0.8, "min_p": 0.05}],
    ids=str,
)
def test_samples_follow_the_truncated_distribution_and_logps_the_whole_one(truncation):
    model = tiny_model("llama", layers=1, vocab_size=16, seed=3)
    model.lm_head.weight.data.mul_(8)
    prompt, temperature, draws = (5, 9, 11), 1.4, 4000
    with torch.no_grad():
        whole_V = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature, -1)
    kept_V = truncated(whole_V, **truncation)
    assert not truncation or 2 <= int(kept_V.sum()) < 16
    params = Sampling(1, (), 0, temperature, **truncation, seed=("chi-square",))
    rollouts = HuggingFaceSampler(model, batch=draws).generate([prompt], draws, params)
    tokens = torch.tensor([rollout.completion_ids[0] for rollout in rollouts])
    logps = torch.tensor([rollout.logps[0] for rollout in rollouts], dtype=torch.float64)
    torch.testing.assert_close(logps, whole_V.log()[tokens], rtol=0, atol=1e-5)
    counts_V, expected_V = (
        torch.bincount(tokens, minlength=16).double(),
        draws * whole_V * kept_V / whole_V[kept_V].sum(),
    )
    assert float(counts_V[~kept_V].sum()) == 0
    assert float(((counts_V - expected_V) ** 2 / expected_V)[kept_V].sum()) < 37.7  # 99.9 %, 15 degrees of freedom


def truncated(probability_V, *, top_k=0, top_p=1.0, min_p=0.0):
    """What may be drawn, each criterion on what the one before left: k, then p, then min-p, as Hugging Face does."""
    kept_V = torch.ones_like(probability_V, dtype=torch.bool)
    if top_k:
        kept_V &= probability_V >= probability_V.sort(descending=True).values[top_k - 1]
    left_V = probability_V * kept_V / probability_V[kept_V].sum()
    order = left_V.argsort(descending=True)
    before = left_V[order].cumsum(0) - left_V[order]
    kept_V[order] &= before < top_p
    return kept_V & (probability_V >= min_p * probability_V.max())


def test_tokens_beyond_the_fifty_likeliest_are_drawn_too():
    """`generate` keeps 50 unless told otherwise."""
    model, prompt = tiny_model("llama"), (5, 9, 11)  # 128 tokens, nearly alike
    with torch.no_grad():
        order = model(input_ids=torch.tensor([prompt])).logits[0, -1].argsort(descending=True)
    rollouts = HuggingFaceSampler(model, batch=500).generate([prompt], 500, Sampling(1, (), 0))
    assert {rollout.completion_ids[0] for rollout in rollouts} & set(order[100:].tolist())


def test_no_more_rows_than_asked_for_are_generated_together():
    model, sizes = sharp(), []
    hook = model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    rollouts = HuggingFaceSampler(model, batch=3).generate(PROMPTS, 2, Sampling(2, (), 0))
    hook.remove()
    assert sizes == [3, 3, 3, 3, 2, 2]
    assert rollouts.metrics == {"rollout/decode_steps": 6.0}


def test_generation_stops_when_every_row_has_ended():
    rollouts = HuggingFaceSampler(sharp()).generate(PROMPTS, 2, Sampling(50, tuple(range(128)), 0))
    assert rollouts.metrics == {"rollout/decode_steps": 1.0}
    assert all(len(rollout.completion_ids) == 1 and rollout.ended for rollout in rollouts)
