"""Reward functions with TRL's interface: built-in, from a file, and several combined.

A reward function takes keywords only and returns one number, or None for "not applicable", per completion:

    def f(prompts, completions, completion_ids, answer, **kwargs) -> list[float | None]

Every column of the task's rows except `prompt` arrives under its own name as a list. Completions are strings for
string prompts and `[{"role": "assistant", "content": ...}]` for message prompts. The assistant prefix of the prompt
is not part of the completion. `trainer_state` (None), `log_metric(name, value)` and `log_extra(column, values)` come
too, as in TRL, and the function may be `async def`.

What was named on the command line runs in a process that can be killed (isolated.py), so that a score, a timeout and
an error are three outcomes; what was handed over as a Python object runs here. docs/rewards.md tells the rest.

Nothing here imports torch before it is needed, because that process imports this package too and must start fast.
"""

from qerl_compile.rl.rewards.answer import AnswerReward, gsm8k
from qerl_compile.rl.rewards.calling import RewardFunction, completion_text
from qerl_compile.rl.rewards.isolated import IsolatedReward
from qerl_compile.rl.rewards.outcomes import Outcome, Outcomes
from qerl_compile.rl.rewards.registry import close_rewards, resolve_reward, resolve_rewards
from qerl_compile.rl.rewards.score import Failure, Scores, score

__all__ = [
    "AnswerReward",
    "Failure",
    "IsolatedReward",
    "Outcome",
    "Outcomes",
    "RewardFunction",
    "Scores",
    "close_rewards",
    "completion_text",
    "gsm8k",
    "resolve_reward",
    "resolve_rewards",
    "score",
]
