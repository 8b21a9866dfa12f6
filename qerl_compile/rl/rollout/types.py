"""What every rollout engine takes and returns.

    Sampler.generate(prompts, group_size, params) -> Rollouts

Three engines implement it: ours (paged.py), Hugging Face's `generate` (hf.py, the reference in tests) and vLLM
(vllm.py, optional). They agree on three conventions:

* *Order.* Rollouts come group after group: prompt 0's samples, prompt 1's samples, …
* *Log-probabilities* are those of the untruncated softmax of logits / temperature, in float32, recorded as the tokens
  are drawn. With top-k, top-p or min-p the tokens come from a truncated distribution, but the recorded numbers stay
  those of the whole one: importance ratios against the trainer would otherwise be off by the kept mass (design/rl.md,
  C5).
* *Randomness belongs to the sequence.* Sample j of prompt i, counted from params.first_prompt, draws from (params.seed,
  i, j) and from nothing else (vLLM from its own generator, seeded by the same path; Hugging Face's `generate` from
  torch's, a batch at a time).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, overload

from qerl_compile.errors import NotFiniteError

Seed = tuple[int | str, ...]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: longest completion, the end token included.
        end_ids: tokens that end a completion.
        pad_id: fills rows that have ended; never read.
        temperature: divides the logits; 0 is greedy.
        top_k: tokens with the k largest logits may be drawn; 0 for all.
        top_p: the smallest set of most likely tokens whose probability reaches this may be drawn; 1 for all.
        min_p: tokens at least this times as likely as the likeliest may be drawn; 0 for all.
        seed: path of the run and step; prompt position and sample index are appended.
        first_prompt: position of the first prompt, where a call gets a part of a step's prompts (ranks, rounds).
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: Seed = ()
    first_prompt: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
            "temperature >= 0": self.temperature >= 0,
            "top_k >= 0": self.top_k >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "0 <= min_p <= 1": 0 <= self.min_p <= 1,
        }
        wrong = [text for text, holds in ranges.items() if not holds]
        if wrong:
            raise ValueError(f"Sampling: expected {' and '.join(wrong)}, got {self}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens can never be drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Args:
        prompt_ids: the prompt's tokens.
        completion_ids: sampled tokens, the end token included if one came.
        logps: log-probability of each completion token under the temperature-scaled distribution (0 for greedy).
        ended: whether an end token came.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool


@dataclass(frozen=True)
class Rollouts(Sequence[Rollout]):
    """Completions, group after group, and what making them took.

    Args:
        rollouts: one per prompt and sample.
        metrics: numbers under the names that metrics.jsonl has, such as `rollout/decode_steps`; may be empty.
    """

    rollouts: tuple[Rollout, ...]
    metrics: dict[str, float] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Rollout, ...]: ...
    def __getitem__(self, index: int | slice) -> Rollout | tuple[Rollout, ...]:
        return self.rollouts[index]

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)


def not_finite(where: str) -> NotFiniteError:
    """What every engine raises where logits that tokens were sampled from are not finite."""
    return NotFiniteError(
        where=where,
        expected="finite log-probabilities of the sampled tokens",
        got="NaN or Inf, so the model's logits are not finite",
        do="Check the checkpoint, or lower train.learning_rate if training came this far.",
    )


class Sampler(Protocol):
    """A rollout engine."""

    def generate(self, prompts: Sequence[tuple[int, ...]], group_size: int, params: Sampling) -> Rollouts:
        """Sample `group_size` completions for each prompt (token ids, unpadded, none empty).

        Raises:
            ModelError: logits that tokens were sampled from are not finite, or a request cannot fit into memory.
        """
        ...
