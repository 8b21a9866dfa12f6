"""Evaluation: greedy or sampled, without noise, with adapters, judged by the task, and kept for reading."""

import pytest
import torch

from qerl_compile.adapters_off import adapters_off
from qerl_compile.errors import ModelError, TaskError
from qerl_compile.rl.evaluate import (
    Evaluation,
    SampledEvaluation,
    check_evaluated,
    evaluate,
    evaluate_sampled,
    largest_update,
)
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.proportions import Proportion
from qerl_compile.rl.rollout import PagedSampler, Rollout, Sampling
from qerl_compile.transforming import resample_noise
from tests.rl.toy import COLOURS, Echo, toy_recipe, toy_trainer, words

GREEDY = Sampling(max_new_tokens=3, end_ids=(1,), pad_id=0, temperature=0.0)
DRAWN = Sampling(max_new_tokens=3, end_ids=(1,), pad_id=0, temperature=1.0, seed=(0, "evaluation"))


class Judged(Echo):
    """Echo with another judge: `right` answers are right, and the judge fails on `broken` ones."""

    def __init__(self, right=(), broken=()):
        self.right, self.broken, self.asked = right, broken, []

    def is_correct(self, answer, row):
        self.asked.append((answer, row["answer"]))
        if row["answer"] in self.broken:
            raise TaskError(where="judge", expected="a score", got="none", do="Mend it.")
        return row["answer"] in self.right


@pytest.fixture(scope="module")
def model():
    return toy_trainer(toy_recipe())[0].model


def run(model, task, rows=None, prompt=None):
    rows = task.held_out() if rows is None else rows
    return evaluate(model, PagedSampler(model), words(), task, rows, prompt or PromptFormat(), "text", GREEDY)


def draw(model, task, samples, sampling=DRAWN):
    prompt = PromptFormat()
    return evaluate_sampled(
        model, PagedSampler(model), words(), task, task.held_out(), prompt, "text", sampling, samples
    )


def test_answers_are_counted_by_the_tasks_judge(model):
    task = Judged(right=("red", "blue", "grey"))
    result = run(model, task)
    assert result.accuracy == Proportion(3, 4)
    assert result.rewards == (1.0, 0.0, 1.0, 1.0)
    assert [reference for _, reference in task.asked] == list(COLOURS)
    assert [answer for answer, _ in task.asked] == [completion.strip() or None for completion in result.completions]


def test_an_answer_on_which_the_judge_failed_counts_as_wrong_and_is_told_apart(model):
    result = run(model, Judged(right=("red", "green"), broken=("green",)))
    assert result.accuracy == Proportion(1, 4)
    assert result.rewards == (1.0, None, 0.0, 0.0)


def test_completions_are_greedy_and_belong_to_their_rows(model):
    result = run(model, Echo())
    tokenizer = words()
    for row, prompt, completion, rollout in zip(
        Echo().held_out(), result.prompts, result.completions, result.rollouts, strict=True
    ):
        assert prompt == row["prompt"]
        assert list(rollout.prompt_ids) == tokenizer(prompt)["input_ids"]
        assert completion == tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([rollout.prompt_ids]), use_cache=False).logits[0, -1]
        assert rollout.completion_ids[0] == int(logits.argmax())


def test_noise_is_silenced_for_an_evaluation(model):
    clean = run(model, Echo())
    resample_noise(model, 3.0, torch.Generator().manual_seed(0))
    assert run(model, Echo()) == clean
    assert all(float(model.get_submodule(path).noise.abs().max()) == 0 for path in model.qerl.plan.noise)


def test_the_assistant_prefix_is_part_of_the_prompt_and_not_of_the_completion(model):
    result = run(model, Echo(), prompt=PromptFormat(assistant_prefix=" {answer}"))
    assert result.prompts[0] == "say red now red"
    assert len(result.rollouts[0].prompt_ids) == 4


def test_metrics_by_hand():
    rollouts = tuple(Rollout((5,), (7,) * length, (0.0,) * length, True) for length in (1, 2, 2, 4))
    texts = ("a", "b", "c", "d")
    metrics = Evaluation(Proportion(2, 4), texts, texts, (1.0, 0.0, None, 1.0), rollouts).metrics()
    assert metrics == {
        "eval/accuracy": 0.5,
        "eval/accuracy_low": pytest.approx(0.1500, abs=1e-4),  # Wilson's interval of 2 in 4
        "eval/accuracy_high": pytest.approx(0.8500, abs=1e-4),
        "eval/items": 4,
        "eval/mean_length": 2.25,
    }


def test_samples_are_the_first_rows_with_prompt_completion_and_reward():
    result = Evaluation(Proportion(1, 2), ("p", "q"), ("a", "b"), (1.0, None), ())
    assert result.samples(1) == [{"prompt": "p", "completion": "a", "reward": 1.0}]
    assert result.samples(9)[1] == {"prompt": "q", "completion": "b", "reward": None}


def test_what_is_evaluated_is_the_model_with_its_adapter(model):
    """Trap 3 of the released code: an adapter that changes the model's first token changes the evaluation's."""
    model.load_state_dict(model.fresh_state)
    before = run(model, Echo())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path in model.qerl.plan.lora:
            lora_b = model.get_submodule(path).lora_B
            lora_b.copy_(torch.randn(lora_b.shape, generator=generator))
    after = run(model, Echo())
    for row, rollout in zip(Echo().held_out(), after.rollouts, strict=True):
        ids = words()(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert rollout.completion_ids[0] == int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
    model.load_state_dict(model.fresh_state)
    assert before.completions != after.completions
    assert run(model, Echo()) == before


def test_samples_are_counted_for_the_item_they_answer(model):
    """The judge says red and grey are right whatever was written: 3 of 3 for the first and last item, else none."""
    result = draw(model, Judged(right=("red", "grey"), broken=("blue",)), 3)
    assert result.right_I == (3, 0, 0, 3)
    assert result.rewards == (*[1.0] * 3, *[0.0] * 3, *[None] * 3, *[1.0] * 3)
    assert result.average.value == 0.5
    assert [rollout.prompt_ids for rollout in result.rollouts[:3]] == [result.rollouts[0].prompt_ids] * 3
    assert len(result.completions) == len(result.rollouts) == 12
    assert len(result.prompts) == 4


def test_samples_differ_repeat_with_their_seed_and_change_with_another(model):
    first, again = (draw(model, Echo(), 8) for _ in range(2))
    assert first == again
    assert len(set(first.completions[:8])) > 1
    other = Sampling(max_new_tokens=3, end_ids=(1,), pad_id=0, temperature=1.0, seed=(1, "evaluation"))
    assert draw(model, Echo(), 8, other).completions != first.completions


def test_sampled_metrics_by_hand():
    """Items with 4, 1 and 0 right of 4: avg@4 = 5/12, pass@2 = (1 + 1/2 + 0) / 3."""
    rewards = (1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, None, 0.0, 0.0, 0.0, 0.0)
    rollouts = tuple(Rollout((5,), (7,) * length, (0.0,) * length, True) for length in (1, 2, 3) * 4)
    result = SampledEvaluation(4, ("a", "b", "c"), ("x",) * 12, rewards, rollouts)
    metrics = result.metrics((1, 2))
    assert metrics["eval/avg@4"] == metrics["eval/pass@1"] == pytest.approx(5 / 12)
    assert metrics["eval/pass@2"] == pytest.approx(0.5)
    assert metrics["eval/sampled_mean_length"] == 2
    assert metrics.keys() == {
        *(f"eval/{name}{end}" for name in ("avg@4", "pass@1", "pass@2") for end in ("", "_low", "_high")),
        "eval/sampled_mean_length",
    }
    assert metrics["eval/pass@2_low"] < 0.5 < metrics["eval/pass@2_high"]


def test_temperatures_that_contradict_the_evaluation_are_refused(model):
    with pytest.raises(ValueError, match="expected temperature 0, got 1"):
        evaluate(model, PagedSampler(model), words(), Echo(), Echo().held_out(), PromptFormat(), "text", DRAWN)
    with pytest.raises(ValueError, match="expected a temperature above 0"):
        draw(model, Echo(), 4, GREEDY)
    with pytest.raises(ValueError, match="at least one sample"):
        draw(model, Echo(), 0)


def test_a_model_without_its_adapter_is_not_evaluated(model):
    with adapters_off(model), pytest.raises(ModelError, match=r"adapters on.*got one inside adapters_off"):
        run(model, Echo())
    with adapters_off(model), pytest.raises(ModelError, match="adapters on"):
        draw(model, Echo(), 2)
    run(model, Echo())


def test_noise_that_is_still_there_is_named_with_its_norm(model):
    resample_noise(model, 0.0)
    check_evaluated(model)
    last = model.qerl.plan.noise[-1]
    noise = model.get_submodule(last).noise
    noise[5] = -0.25
    with pytest.raises(ModelError, match=rf"{last}: expected a norm whose noise is 0.*noise up to 0\.25"):
        check_evaluated(model)
    resample_noise(model, 0.0)


def test_a_norm_that_lost_its_noise_buffer_is_named(model):
    """Trap 2 of the released code, turned round: what cannot be silenced must not be taken for silent."""
    norm = model.get_submodule(model.qerl.plan.noise[0])
    kept = norm._buffers.pop("noise")
    try:
        with pytest.raises(ModelError, match="got no noise buffer"):
            check_evaluated(model)
    finally:
        norm._buffers["noise"] = kept


def test_the_largest_update_is_zero_until_an_adapter_changes_something(model):
    model.load_state_dict(model.fresh_state)
    assert largest_update(model) == 0
    site = model.get_submodule(next(iter(model.qerl.plan.lora)))
    with torch.no_grad():
        site.lora_B[0, 0] = -0.5
    assert largest_update(model) == 0.5
    model.load_state_dict(model.fresh_state)
