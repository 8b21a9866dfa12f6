"""What a run leaves behind when it stops for want of finite numbers: the batch, so that somebody can look.

RUN/bad-step-000012-rank0.json holds the step's metrics and, for each of this rank's completions, prompt and completion
as text and as tokens, the recorded log-probabilities, reward and advantage. Numbers that JSON does not know become
texts such as "nan": they are what one looks for.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qerl_compile.rl.collecting import Experience


def dump_batch(
    directory: Path, step: int, rank: int, metrics: Mapping[str, Any], experience: Experience | None
) -> Path:
    """Write the batch of a step; return the file.

    Args:
        directory: of the run.
        step: 1-based.
        rank: whose completions these are.
        metrics: of the step.
        experience: what it was trained on; None if the rollout itself failed.
    """
    completions = []
    if experience is not None:
        rewards, advantages = experience.rewards_N.tolist(), experience.advantages_N.tolist()
        for i, rollout in enumerate(experience.rollouts):
            completions.append(
                {
                    "prompt": experience.rows[i].get("prompt"),
                    "completion": experience.texts[i],
                    "prompt_ids": rollout.prompt_ids,
                    "completion_ids": rollout.completion_ids,
                    "logps": rollout.logps,
                    "ended": rollout.ended,
                    "reward": rewards[i],
                    "advantage": advantages[i],
                }
            )
    file = directory / f"bad-step-{step:06}-rank{rank}.json"
    text = json.dumps(_finite({"step": step, "metrics": dict(metrics), "completions": completions}), indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def _finite(value: Any) -> Any:
    """Return a value in which every number is one that JSON knows."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
