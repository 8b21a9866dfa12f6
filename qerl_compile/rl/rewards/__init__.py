"""Reward functions with TRL's interface: built-in, from a file, and several combined.

A reward function takes keywords only and returns one number, or None for "not applicable", per completion:

    def f(prompts, completions, completion_ids, answer, **kwargs) -> list[float | None]

Every column of the task's rows except `prompt` arrives under its own name as a list. Completions are strings for
string prompts and `[{"role": "assistant", "content": ...}]` for message prompts. The assistant prefix of the prompt
is not part of the completion.
"""

from qerl_compile.rl.rewards.answer import AnswerReward, completion_text, gsm8k
from qerl_compile.rl.rewards.registry import resolve_reward, resolve_rewards
from qerl_compile.rl.rewards.score import RewardFunction, Scores, score

__all__ = [
    "AnswerReward",
    "RewardFunction",
    "Scores",
    "completion_text",
    "gsm8k",
    "resolve_reward",
    "resolve_rewards",
    "score",
]
