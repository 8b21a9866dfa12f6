"""What the first training step will run, from a recipe alone; and its kernels compiled before it comes.

A rollout decodes at the batch sizes of `schedule.buckets`, prefills up to `PREFILL_TOKENS` at a time, and an update
runs micro-batches of up to `micro_batch_tokens`. Kernels are chosen by buckets of tokens (kernels/dispatch.py), so one
number a bucket stands for all. warm_up.py says how they are compiled, and why that costs a run nothing if it fails.

What this module does not do: compile graphs. Dynamo captures them when they first run.
"""

from typing import Any

import torch

from qerl_compile.kernels.dispatch import BUCKETS
from qerl_compile.plan import Plan
from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.rollout.paged import PAGE_TOKENS, PREFILL_TOKENS
from qerl_compile.rl.rollout.schedule import buckets
from qerl_compile.warm_up import Rehearsal, cores, rehearse

PROMPT_TOKENS = 512  # assumed: longer prompts change how many stretches a row's keys are read in, a form or two
FEWEST_TOKENS = 128  # of a prefill or micro-batch that a rehearsal prepares for


def rehearse_first_step(
    model: Any, plan: Plan, config: TrainConfig, device: torch.device, *, ranks: int = 1
) -> Rehearsal | None:
    """Start compiling the kernels of a run's rollouts and updates; return at once.

    Args:
        model: the policy, or its skeleton on meta.
        plan: the policy's.
        config: of the run.
        device: where it will run.
        ranks: processes that share the run's prompts, and this machine.

    Returns:
        A handle that nobody has to keep, or None where nothing is to be compiled (warm_up.py).
    """
    samples = -(-config.prompts_per_step // ranks) * config.group_size
    rows = max(2, min(config.rollout_batch, samples))
    return rehearse(
        model,
        plan,
        device,
        decode_rows=buckets(rows)[1:],
        prefill_tokens=_up_to(PREFILL_TOKENS),
        training_tokens=_up_to(config.micro_batch_tokens),
        positions=PROMPT_TOKENS + config.max_new_tokens,
        page_tokens=PAGE_TOKENS["cuda"],
        processes=max(1, (cores() - 2) // ranks),
    )


def _up_to(tokens: int) -> tuple[int, ...]:
    """Return one number of tokens for each bucket that up to `tokens` fall into, the largest first."""
    below = [bucket for bucket in BUCKETS if FEWEST_TOKENS <= bucket < tokens]
    return (tokens, *reversed(below))
