"""Greedy accuracy on held-out items, with the noise off.

The released QeRL scripts evaluated without the adapter (design/method.md, trap 3). Here the model that is evaluated is
the object that is trained; only its noise is silenced for the while, and drawn anew at the next step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qerl_compile.rl.answers import Extractor
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.proportions import Proportion
from qerl_compile.rl.rewards import AnswerReward
from qerl_compile.rl.rollout import Rollout, Sampler, Sampling
from qerl_compile.rl.tasks import Row, Task
from qerl_compile.transforming import resample_noise


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


def evaluate(
    model: Any,
    sampler: Sampler,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    prompt: PromptFormat,
    extractor: Extractor,
    sampling: Sampling,
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
    """
    resample_noise(model, 0.0)
    prompts = [prompt.encode(tokenizer, row) for row in rows]
    rollouts = sampler.generate([each.ids for each in prompts], 1, sampling)
    texts = tokenizer.batch_decode([list(r.completion_ids) for r in rollouts], skip_special_tokens=True)
    judge = AnswerReward(task, extractor).judge
    rewards = tuple(judge(text, row) for text, row in zip(texts, rows, strict=True))
    right = Proportion(rewards.count(1.0), len(rows))
    return Evaluation(right, tuple(each.text for each in prompts), tuple(texts), rewards, tuple(rollouts))
