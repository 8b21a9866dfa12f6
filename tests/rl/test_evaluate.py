"""Evaluation: greedy, without noise, judged by the task, with what the model wrote kept for reading."""

import pytest
import torch

from qerl_compile.errors import TaskError
from qerl_compile.rl.evaluate import Evaluation, evaluate
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.proportions import Proportion
from qerl_compile.rl.rollout import PagedSampler, Rollout, Sampling
from qerl_compile.transforming import resample_noise
from tests.rl.toy import COLOURS, Echo, toy_recipe, toy_trainer, words

GREEDY = Sampling(max_new_tokens=3, end_ids=(1,), pad_id=0, temperature=0.0)


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


def test_what_is_evaluated_is_the_model_with_its_adapter():
    trainer, _ = toy_trainer(toy_recipe(train__steps=12))
    before, after = trainer.train()
    assert before.completions != after.completions
    assert (
        run(trainer.model, Echo(), rows=trainer.held_out).rollouts[0].completion_ids[0]
        == (after.rollouts[0].completion_ids[0])
    )
