"""Accuracy on held-out items: greedy, and of several samples per item; always with the noise off and the adapter on.

    evaluate           one greedy answer per item            accuracy, Wilson's interval             proportions.py
    evaluate_sampled   n answers per item at a temperature   avg@n and pass@k, bootstrap over items  pass_at_k.py

The released QeRL scripts evaluated without the adapter (design/method.md, trap 3). Here the model that is evaluated is
the object that is trained; only its noise is silenced for the while, and drawn anew at the next step. That it is
silent is looked up after silencing, on every norm that the plan says has noise, and so is whether the adapters are on:
an evaluation that would be of another model raises.

An answer on which the task's judge failed counts as wrong, and is told apart in `rewards`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qerl_compile.adapters_off import adapters_are_off
from qerl_compile.errors import ModelError
from qerl_compile.rl.answers import Extractor
from qerl_compile.rl.pass_at_k import Mean, mean_over_items, pass_at_k
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.proportions import Proportion
from qerl_compile.rl.rewards import close_rewards, resolve_reward
from qerl_compile.rl.rewards.registry import TIMEOUT_S
from qerl_compile.rl.rewards.score import ask
from qerl_compile.rl.rollout import Rollout, Sampler, Sampling
from qerl_compile.rl.tasks import Row, Task, columns
from qerl_compile.transforming import resample_noise, state_of


@dataclass(frozen=True)
class Evaluation:
    """Accuracy with its interval, and what the model wrote.

    Args:
        accuracy: right answers among all held-out rows.
        prompts: the rows' prompts as text, assistant prefix included.
        completions: what the model wrote, without special tokens.
        rewards: 1 right, 0 wrong, None where the task's judge failed (which counts as wrong).
        rollouts: the same as tokens.
    """

    accuracy: Proportion
    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    rewards: tuple[float | None, ...]
    rollouts: tuple[Rollout, ...]

    def metrics(self) -> dict[str, float]:
        """Return the numbers under the names that metrics.jsonl has."""
        low, high = self.accuracy.interval
        lengths = [len(rollout.completion_ids) for rollout in self.rollouts]
        return {
            "eval/accuracy": self.accuracy.rate,
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/items": self.accuracy.total,
            "eval/mean_length": sum(lengths) / len(lengths),
        }

    def samples(self, count: int) -> list[dict[str, str | float | None]]:
        """Return the first `count` rows as prompt, completion and reward; they are the same items every time."""
        rows = zip(self.prompts, self.completions, self.rewards, strict=True)
        return [dict(zip(("prompt", "completion", "reward"), row, strict=True)) for row in islice(rows, count)]


@dataclass(frozen=True)
class SampledEvaluation:
    """n answers per item, item after item.

    Args:
        samples: n.
        prompts: one text per item, assistant prefix included.
        completions: n texts per item: the first n are of the first item.
        rewards: as many numbers: 1 right, 0 wrong, None where the task's judge failed (which counts as wrong).
        rollouts: the same as tokens.
    """

    samples: int
    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    rewards: tuple[float | None, ...]
    rollouts: tuple[Rollout, ...]

    @property
    def right_I(self) -> tuple[int, ...]:
        """How many of each item's n answers are right."""
        starts = range(0, len(self.rewards), self.samples)
        return tuple(self.rewards[start : start + self.samples].count(1.0) for start in starts)

    @property
    def average(self) -> Mean:
        """avg@n: the mean accuracy of a single answer."""
        return mean_over_items([right / self.samples for right in self.right_I])

    def pass_at(self, k: int) -> Mean:
        """pass@k: the share of items of which one answer in k is right.

        Raises:
            ValueError: k is not in 1..n.
        """
        return mean_over_items([pass_at_k(self.samples, right, k) for right in self.right_I])

    def metrics(self, ks: Sequence[int] = ()) -> dict[str, float]:
        """Return `eval/avg@n` and a `eval/pass@k` for each k, each with `_low` and `_high`, and the mean length."""
        lengths = [len(rollout.completion_ids) for rollout in self.rollouts]
        metrics = self.average.metrics(f"eval/avg@{self.samples}")
        for k in ks:
            metrics |= self.pass_at(k).metrics(f"eval/pass@{k}")
        return {**metrics, "eval/sampled_mean_length": sum(lengths) / len(lengths)}


def evaluate(
    model: Any,
    sampler: Sampler,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    prompt: PromptFormat,
    extractor: Extractor,
    sampling: Sampling,
    *,
    timeout: float = TIMEOUT_S,
) -> Evaluation:
    """Answer each held-out row greedily and count the right answers.

    Args:
        model: a transformed model; its noise is zero afterwards.
        sampler: a rollout engine of this model.
        tokenizer: of the model.
        task: judges the answers.
        rows: held-out rows.
        prompt: how rows become prompts.
        extractor: how the answer is found in a completion.
        sampling: `temperature` must be 0.
        timeout: seconds that the judge may take for all answers, where it runs in a process of its own.

    Raises:
        ModelError: the model's noise cannot be silenced, or its adapters are off.
        ValueError: the temperature is not 0.
    """
    if sampling.temperature != 0:
        raise ValueError(f"evaluate: expected temperature 0, got {sampling.temperature}")
    prompts, texts, rewards, rollouts = _answers(
        model, sampler, tokenizer, task, rows, prompt, extractor, 1, sampling, timeout
    )
    return Evaluation(Proportion(rewards.count(1.0), len(rows)), prompts, texts, rewards, rollouts)


def evaluate_sampled(
    model: Any,
    sampler: Sampler,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    prompt: PromptFormat,
    extractor: Extractor,
    sampling: Sampling,
    samples: int,
    *,
    timeout: float = TIMEOUT_S,
) -> SampledEvaluation:
    """Draw several answers to each held-out row; the other arguments are those of `evaluate`.

    Args:
        model: see `evaluate`.
        sampler: see `evaluate`.
        tokenizer: see `evaluate`.
        task: see `evaluate`.
        rows: see `evaluate`.
        prompt: see `evaluate`.
        extractor: see `evaluate`.
        sampling: `temperature` must be above 0; `seed` decides the draws.
        samples: n, answers per row.
        timeout: see `evaluate`.

    Raises:
        ModelError: as `evaluate`.
        ValueError: the temperature is 0, where all n answers would be the same one.
    """
    if sampling.temperature == 0 or samples < 1:
        got = f"temperature {sampling.temperature}, {samples} samples"
        raise ValueError(f"evaluate_sampled: expected a temperature above 0 and at least one sample, got {got}")
    return SampledEvaluation(
        samples, *_answers(model, sampler, tokenizer, task, rows, prompt, extractor, samples, sampling, timeout)
    )


def _answers(
    model: Any,
    sampler: Sampler,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    prompt: PromptFormat,
    extractor: Extractor,
    samples: int,
    sampling: Sampling,
    timeout: float,
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[float | None, ...], tuple[Rollout, ...]]:
    """Prompts of the rows, then texts, rewards and rollouts of `samples` answers to each."""
    resample_noise(model, 0.0)
    check_evaluated(model)
    prompts = [prompt.encode(tokenizer, row) for row in rows]
    judge = resolve_reward("answer", task, extractor, timeout=timeout)  # starts while answers are drawn
    try:
        rollouts = sampler.generate([each.ids for each in prompts], samples, sampling)
        texts = tokenizer.batch_decode([list(r.completion_ids) for r in rollouts], skip_special_tokens=True)
        repeated = [row for row in rows for _ in range(samples)]
        given = {"completions": texts, **columns(repeated)}
        rewards = tuple(outcome.value for outcome in ask(judge, len(texts), given).each)
    finally:
        close_rewards([judge])
    return tuple(each.text for each in prompts), tuple(texts), rewards, tuple(rollouts)


def check_evaluated(model: Any) -> None:
    """Refuse a model that would not be the trained one: with noise, or inside `adapters_off`.

    Args:
        model: a transformed model.

    Raises:
        ModelError: names the first module with noise, or the model whose adapters are off.
    """
    if adapters_are_off(model):
        raise ModelError(
            where="evaluation",
            expected="a model with its adapters on, since they are what was trained",
            got="one inside adapters_off",
            do="Evaluate outside of that block.",
        )
    for path in state_of(model).plan.noise:
        noise = getattr(model.get_submodule(path), "noise", None)
        if noise is None or bool(noise.any()):
            raise ModelError(
                where=path,
                expected="a norm whose noise is 0 during an evaluation",
                got="no noise buffer" if noise is None else f"noise up to {float(noise.abs().max()):.3g}",
                do="Silence it with resample_noise(model, 0.0), and do not set or remove noise by hand.",
            )


def largest_update(model: Any) -> float:
    """The largest |lora_B| of a model's adapters; 0 when they change nothing, as untrained ones do.

    Args:
        model: a transformed model.
    """
    sites = (model.get_submodule(path) for path in state_of(model).plan.lora)
    return max((float(site.lora_B.detach().abs().max()) for site in sites), default=0.0)
