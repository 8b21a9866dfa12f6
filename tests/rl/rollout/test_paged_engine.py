"""What our engine samples: Hugging Face's tokens, a recomputation's log-probabilities, nothing of its neighbours."""

from functools import cache

import pytest
import torch

from qerl_compile.plan import make_plan
from qerl_compile.rl.rollout.hf import HuggingFaceSampler
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.transforming import transform
from tests.models import FAMILIES, SOME_FAMILIES, dequantized_oracle, tiny_model
from tests.rl.rollout.engines import PROMPTS, RECIPE

PAGE = 4
RAGGED = [
    *PROMPTS,
    (9, 8, 7, 6, 5, 4, 3, 9),
    (100,),
    tuple(range(20, 33)),
]  # two of them fill pages exactly
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ENDS = (3, 64, 17, 90, 41)


@cache
def models(family):
    """A transformed model in fp32 and the plain model with its dequantized weights, made once per family."""
    model = tiny_model(family, layers=3, **(WINDOWED if family == "gemma3" else {}))
    if family != "gemma3":  # its embeddings are tied to the head
        model.lm_head.weight.data.mul_(8)
    oracle = dequantized_oracle(model, make_plan(model, RECIPE))
    return transform(model, RECIPE, inner="eager"), oracle


def paged(family="llama", rows=3, **options):
    return PagedSampler(models(family)[0], rows=rows, **{"page_tokens": PAGE, **options})


def completions(rollouts):
    return [rollout.completion_ids for rollout in rollouts]


@cache
def greedy_of_hugging_face(family, end_ids, count):
    """Each prompt alone and unpadded."""
    sampler = HuggingFaceSampler(models(family)[1], batch=1)
    return completions(sampler.generate(RAGGED, 1, Sampling(count, end_ids, 0, 0.0)))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face_token_for_token(family, rows):
    free = greedy_of_hugging_face(family, (), 11)
    assert len(set(free)) == len(free)
    end_ids = (free[0][2], free[2][5], free[4][0], 126)  # they come in different rows at different times
    want = greedy_of_hugging_face(family, end_ids, 11)
    assert len({len(tokens) for tokens in want}) >= 3
    assert min(map(len, want)) == 1  # an end token that is drawn first
    got = paged(family, rows).generate(RAGGED, 2, Sampling(11, end_ids, 0, 0.0))
    assert completions(got) == [tokens for tokens in want for _ in range(2)]
    assert [rollout.prompt_ids for rollout in got] == [prompt for prompt in RAGGED for _ in range(2)]
    assert [rollout.ended for rollout in got] == [rollout.completion_ids[-1] in end_ids for rollout in got]


def test_a_sliding_window_is_passed_by_prompts_and_by_completions():
    """The test above would not see a window that is ignored if nothing were longer than it."""
    window = models("gemma3")[1].config.sliding_window
    assert max(map(len, RAGGED)) > window
    assert any(len(prompt) < window < len(prompt) + 11 for prompt in RAGGED)
    wide = tiny_model("gemma3", layers=3, **{**WINDOWED, "sliding_window": 200})
    oracle = dequantized_oracle(wide, make_plan(wide, RECIPE))
    got = HuggingFaceSampler(oracle).generate(RAGGED, 1, Sampling(11, (), 0, 0.0))
    assert completions(got) != greedy_of_hugging_face("gemma3", (), 11)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("new", [1, 2, 5])
def test_prompts_around_the_end_of_a_page(length, new):
    prompt = tuple(range(50, 50 + length))
    want = HuggingFaceSampler(models("llama")[1]).generate([prompt], 1, Sampling(new, (), 0, 0.0))
    for page_tokens in (1, 4):
        got = paged(page_tokens=page_tokens).generate([prompt], 3, Sampling(new, (), 0, 0.0))
        assert completions(got) == completions(want) * 3


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("temperature, truncation", [(0.7, {}), (1.0, {"top_k": 9, "top_p": 0.9})], ids=str)
def test_recorded_log_probabilities_equal_a_full_recomputation(family, temperature, truncation):
    _, oracle = models(family)
    params = Sampling(9, ENDS, 0, temperature, **truncation, seed=(1, "a"))
    for rollout in paged(family).generate(RAGGED, 3, params):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = oracle(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
        want = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logps), want, rtol=0, atol=2e-5)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch():
    params = Sampling(6, ENDS, 0, seed=(3,))
    together = completions(paged(rows=64).generate(RAGGED, 4, params))
    assert len({len(tokens) for tokens in together}) > 3
    for rows in (1, 2, 5, 28):
        assert completions(paged(rows=rows).generate(RAGGED, 4, params)) == together
    assert completions(paged().generate(RAGGED, 2, params)) == [
        tokens for index, tokens in enumerate(together) if index % 4 < 2
    ]
    assert completions(paged().generate(RAGGED[:2], 4, params)) == together[:8]
    assert completions(paged(page_tokens=16, prefill_tokens=1).generate(RAGGED, 4, params)) == together


def test_a_prompt_brings_its_randomness_by_its_place_and_nothing_else_by_it():
    greedy = Sampling(6, ENDS, 0, 0.0)
    there = paged().generate(RAGGED, 2, greedy)
    back = paged().generate(RAGGED[::-1], 2, greedy)
    assert {rollout.prompt_ids: rollout for rollout in there} == {rollout.prompt_ids: rollout for rollout in back}
    same = paged().generate([RAGGED[0]] * 3, 1, Sampling(9, (), 0, seed=(1,)))
    assert len({rollout.completion_ids for rollout in same}) == 3
    assert same[0] == paged().generate([RAGGED[0]], 2, Sampling(9, (), 0, seed=(1,)))[0]


def test_repeating_a_call_repeats_every_bit():
    params = Sampling(8, ENDS, 0, seed=(1, 5))
    sampler = paged()
    first = sampler.generate(RAGGED, 3, params)
    for other in ((2, 5), (1, 6)):
        assert sampler.generate(RAGGED, 3, Sampling(8, ENDS, 0, seed=other)).rollouts != first.rollouts
    assert sampler.generate(RAGGED, 3, params).rollouts == first.rollouts
    assert paged().generate(RAGGED, 3, params).rollouts == first.rollouts


def test_samples_are_distributed_as_the_softmax_at_the_temperature():
    model = tiny_model("llama", layers=1, vocab_size=16, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    prompt, temperature, draws = (5, 9, 11), 1.5, 4000
    params = Sampling(1, (), 0, temperature, seed=("chi-square",))
    rollouts = PagedSampler(model, rows=500, page_tokens=4).generate([prompt], draws, params)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected_V = draws * torch.softmax(logits_V.double() / temperature, -1)
    counts_V = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=16).double()
    assert float(expected_V.min()) > 5
    chi_square = float(((counts_V - expected_V) ** 2 / expected_V).sum())
    assert chi_square < 37.7  # 99.9 % quantile with 15 degrees of freedom; the seed is fixed
    flat_V = draws * torch.softmax(logits_V.double(), -1)
    assert float(((counts_V - flat_V) ** 2 / flat_V).sum()) > 37.7  # the test would see a forgotten temperature


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_plain_model_is_sampled_too(family):
    _, oracle = models(family)
    got = PagedSampler(oracle, rows=3, page_tokens=PAGE).generate(RAGGED, 1, Sampling(11, (), 0, 0.0))
    assert completions(got) == greedy_of_hugging_face(family, (), 11)


def test_bf16_log_probabilities_differ_by_rounding_only():
    model = transform(tiny_model("llama", dtype=torch.bfloat16), RECIPE, inner="eager")
    for rollout in PagedSampler(model, rows=3, page_tokens=PAGE).generate(RAGGED, 2, Sampling(6, (), 0, seed=(1,))):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
        want = torch.log_softmax(logits, -1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logps), want, rtol=0, atol=0.05)


def test_positions_given_to_the_model_are_those_of_each_sequence_alone():
    """Rotary embeddings forgive a shift, so no token would show a mistake here; learned positions would not."""
    model, seen = models("llama")[0], []

    def look(_, __, given):
        seen.append(given["position_ids"].tolist())  # at once: a step changes them in place

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    paged().generate([(5, 6, 7), (8,)], 1, Sampling(3, (), 0))
    hook.remove()
    assert seen == [[[0, 1, 2, 0]], [[3], [1]], [[4], [2]]]


def test_no_more_rows_than_asked_for_run_together():
    model, shapes = models("llama")[0], []
    hook = model.register_forward_pre_hook(lambda *given: shapes.append(given[2]["input_ids"].shape), with_kwargs=True)
    try:
        for group_size, rows in ((4, 9), (4, 3), (5, 1), (1, 2)):
            shapes.clear()
            assert len(paged(rows=rows).generate(RAGGED, group_size, Sampling(3, (), 0))) == len(RAGGED) * group_size
            assert max(batch for batch, _ in shapes) == rows
    finally:
        hook.remove()


def test_rows_shrink_with_what_is_left():
    """Seven rows, most of which end early: those left move together and the batch gets smaller."""
    model, sizes = models("llama")[0], []
    free = paged().generate(RAGGED, 1, Sampling(12, (), 0, 0.0))
    ends = tuple({token for rollout in free[1:] for token in rollout.completion_ids[1:3]} - set(free[0].completion_ids))
    hook = model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    got = paged(rows=9).generate(RAGGED, 1, Sampling(12, ends, 0, 0.0))
    hook.remove()
    assert got[0] == free[0]
    assert sizes[1] == len(RAGGED)
    assert sizes[-1] < 3


@pytest.mark.parametrize("group_size, params", [(2, Sampling(50, tuple(range(16)), 0, 0.0)), (3, Sampling(1, (), 0))])
def test_nothing_runs_after_the_last_token(group_size, params):
    """All end at their first token, by an end token or by the limit: there is a prefill and no step."""
    model = tiny_model("llama", layers=1, vocab_size=16)
    rollouts = PagedSampler(model, rows=4, page_tokens=PAGE).generate([(5, 9), (7,)], group_size, params)
    assert all(len(r.completion_ids) == len(r.logps) == 1 for r in rollouts)
    assert {r.ended for r in rollouts} == {bool(params.end_ids)}
    assert rollouts.metrics["rollout/decode_steps"] == 0


def test_work_is_counted():
    rollouts = paged(rows=4).generate(RAGGED[:2], 2, Sampling(5, (), 0))
    metrics = rollouts.metrics
    assert (metrics["rollout/decode_steps"], metrics["rollout/occupancy"]) == (4, 1)
    assert metrics["rollout/prefill_tokens"] == 4 + 1  # once for a group
    assert 0 < metrics["rollout/prefill_time"] < metrics["rollout/time"]
    alone = paged(rows=1).generate(RAGGED[:2], 2, Sampling(5, (), 0)).metrics
    assert (alone["rollout/decode_steps"], alone["rollout/occupancy"]) == (16, 1)
