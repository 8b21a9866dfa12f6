"""Sampling against Hugging Face's generate, against a recomputation, and against the distribution it claims."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from qerl_compile.errors import ModelError
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout import Sampling, _draw, generate, left_padded, positions
from qerl_compile.transforming import resample_noise, transform
from tests.models import FAMILIES, dequantized_oracle, tiny_model

PROMPTS = [(5, 9, 17, 33), (7,), (11, 100, 3, 4, 60, 61, 62, 90, 120, 15, 16), (80, 81)]
RECIPE = Recipe.named("qerl-nvfp4-aqn")


@cache
def models(family):
    """A transformed model in fp32 and the plain model with its dequantized weights, made once per family."""
    changes = {"sliding_window": 8} if family == "gemma3" else {}
    model = tiny_model(family, **changes)
    oracle = dequantized_oracle(model, make_plan(model, RECIPE))
    return transform(model, RECIPE, inner="eager"), oracle


def greedy_reference(oracle, prompts, end_ids, max_new_tokens):
    """Hugging Face's greedy completions, each prompt alone and unpadded, the end token included."""
    completions = []
    for prompt in prompts:
        options = {"do_sample": False, "eos_token_id": list(end_ids), "pad_token_id": 0}
        ids = oracle.generate(torch.tensor([prompt]), max_new_tokens=max_new_tokens, **options)
        completions.append(tuple(ids[0, len(prompt) :].tolist()))
    return completions


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face_token_for_token(family):
    model, oracle = models(family)
    free = greedy_reference(oracle, PROMPTS, (127,), 8)
    end_ids = (free[0][2], free[2][5], 126)  # tokens that do come, in different rows at different times
    want = greedy_reference(oracle, PROMPTS, end_ids, 8)
    assert len({len(completion) for completion in want}) >= 2
    got = generate(model, PROMPTS, Sampling(8, end_ids, pad_id=0, temperature=0.0), group_size=2)
    assert [rollout.completion_ids for rollout in got] == [tokens for tokens in want for _ in range(2)]
    assert [rollout.prompt_ids for rollout in got] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [rollout.ended for rollout in got] == [rollout.completion_ids[-1] in end_ids for rollout in got]
    assert any(rollout.ended for rollout in got)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recorded_log_probabilities_equal_a_full_recomputation(family):
    model, oracle = models(family)
    temperature = 0.7
    rollouts = generate(model, PROMPTS, Sampling(9, (3, 64), 0, temperature), group_size=3, seed=(1, "a"))
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = oracle(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
        want = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logps), want, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch():
    model, _ = models("llama")
    sampling = Sampling(5, (2, 50), 0, 1.0)
    together = generate(model, PROMPTS, sampling, group_size=4, seed=(3,))
    for batch in (1, 3, 9):  # 1 and 3 split a group, 9 leaves a remainder
        split = generate(model, PROMPTS, Sampling(5, (2, 50), 0, 1.0, batch=batch), group_size=4, seed=(3,))
        assert [r.completion_ids for r in split] == [r.completion_ids for r in together]
    alone = generate(model, PROMPTS[:1], sampling, group_size=2, seed=(3,))
    assert [r.completion_ids for r in alone] == [r.completion_ids for r in together[:2]]


def test_no_more_sequences_than_asked_for_are_generated_together():
    model, _ = models("llama")
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        for group_size, batch in ((4, 9), (4, 3), (5, 1), (1, 2)):
            sizes.clear()
            rollouts = generate(model, PROMPTS, Sampling(2, (2,), 0, 1.0, batch=batch), group_size=group_size)
            assert len(rollouts) == len(PROMPTS) * group_size
            assert max(sizes) <= batch
    finally:
        hook.remove()


def test_one_seed_gives_one_set_of_samples_and_another_seed_another():
    model, _ = models("llama")
    sampling = Sampling(8, (2,), 0, 1.0)
    first, again, other, step = (
        generate(model, PROMPTS, sampling, group_size=3, seed=seed) for seed in ((1, 5), (1, 5), (2, 5), (1, 6))
    )
    assert first == again
    assert first != other
    assert first != step
    assert len({rollout.completion_ids for rollout in first}) > len(PROMPTS)  # and samples of a group differ


def test_noise_changes_the_samples_and_silence_brings_them_back():
    model, _ = models("llama")
    sampling = Sampling(8, (2,), 0, 1.0)
    clean = generate(model, PROMPTS, sampling, seed=(1,))
    resample_noise(model, 0.3, torch.Generator().manual_seed(0))
    noisy = generate(model, PROMPTS, sampling, seed=(1,))
    resample_noise(model, 0.0)
    assert [r.completion_ids for r in noisy] != [r.completion_ids for r in clean]
    assert generate(model, PROMPTS, sampling, seed=(1,)) == clean


def test_samples_are_distributed_as_the_softmax_at_the_temperature():
    model = tiny_model("llama", layers=1, vocab_size=16, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    prompt, temperature, draws = (5, 9, 11), 1.5, 4000
    sampling = Sampling(1, (), 0, temperature, batch=draws)
    rollouts = generate(model, [prompt], sampling, group_size=draws, seed=("chi-square",))
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected_V = draws * torch.softmax(logits_V.double() / temperature, -1)
    counts_V = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=16).double()
    assert float(expected_V.min()) > 5
    chi_square = float(((counts_V - expected_V) ** 2 / expected_V).sum())
    assert chi_square < 37.7  # 99.9 % quantile with 15 degrees of freedom; the seed is fixed
    flat_V = draws * torch.softmax(logits_V.double(), -1)
    assert float(((counts_V - flat_V) ** 2 / flat_V).sum()) > 37.7  # the test would see a forgotten temperature


@pytest.mark.parametrize(
    "probabilities, uniform, token",
    [
        ([0.25, 0.25, 0.5], 0.0, 0),
        ([0.25, 0.25, 0.5], 0.2499, 0),
        ([0.25, 0.25, 0.5], 0.2501, 1),
        ([0.25, 0.25, 0.5], 0.4999, 1),
        ([0.25, 0.25, 0.5], 0.5001, 2),
        ([0.0, 1.0, 0.0], 0.0, 1),
        ([0.0, 1.0, 0.0], 1 - 2**-53, 1),  # in float32 this number is 1, and the last token would be drawn
        ([0.5, 0.5 - 1e-9, 1e-9], 1 - 5e-10, 2),  # in float32 the sum is 1 before the last token
    ],
)
def test_a_token_is_the_inverse_cdf_at_a_uniform_number(probabilities, uniform, token):
    logits_BV = torch.tensor([probabilities]).log()
    drawn_B, logp_B = _draw(logits_BV, 1.0, torch.tensor([uniform], dtype=torch.float64))
    assert drawn_B.tolist() == [token]
    assert logp_B.item() == pytest.approx(math.log(probabilities[token]), abs=1e-6)


def test_greedy_takes_the_largest_logit_and_records_probability_one():
    token_B, logp_B = _draw(torch.tensor([[0.1, 2.0, 1.0]]), 0.0, torch.tensor([0.99], dtype=torch.float64))
    assert (token_B.tolist(), logp_B.tolist()) == ([1], [0.0])


def test_padding_goes_left_and_positions_count_real_tokens():
    ids_BT, mask_BT = left_padded([(5, 6, 7), (8,)], 9, "cpu")
    assert ids_BT.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask_BT).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_generation_stops_when_every_row_has_ended():
    model, _ = models("llama")
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    every_token = tuple(range(128))
    rollouts = generate(model, PROMPTS, Sampling(50, every_token, 0, 1.0), group_size=2)
    hook.remove()
    assert len(calls) == 1
    assert all(len(r.completion_ids) == len(r.logps) == 1 and r.ended for r in rollouts)


def test_logits_that_are_not_finite_are_an_error_and_no_sample():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 2)
            self.config = tiny_model("llama", layers=1).config

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, past_key_values, **_):
            past_key_values.update(*torch.zeros(2, len(input_ids), 2, input_ids.shape[1], 16), 0)
            return SimpleNamespace(logits=torch.full((len(input_ids), 1, 4), math.nan))

    with pytest.raises(ModelError, match="rollout: expected finite log-probabilities"):
        generate(Broken(), [(1, 2)], Sampling(3, (2,), 0, 1.0))


def test_no_prompts_give_no_rollouts():
    assert generate(models("llama")[0], [], Sampling(3, (2,), 0)) == []


def test_positions_given_to_the_model_are_those_of_each_sequence_alone():
    """Rotary embeddings forgive a shift, so no token would show a mistake here; learned positions would not."""
    model, _ = models("llama")
    seen = []
    hook = model.register_forward_pre_hook(lambda _, __, given: seen.append(given["position_ids"]), with_kwargs=True)
    generate(model, [(5, 6, 7), (8,)], Sampling(3, (), 0, 1.0))
    hook.remove()
    assert [ids.tolist() for ids in seen] == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]
