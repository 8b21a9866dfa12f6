"""The parity gate: before the first step, the sampler and the trainer must be the same policy.

A few prompts are rolled out without noise, and the trainer computes the log-probabilities of what was sampled. The two
differ by rounding: 0.02 nats on average for a small bf16 model, 0.07 for a random 7B one whose layers amplify it
(benchmarks/results/rollout.md). A mean beyond the recipe's `parity_limit` is not rounding: an adapter that only one of
them has, noise that was left on, another temperature, another prompt template. Trained on, such rollouts teach nothing
that looks like an error; so the run stops here instead.

The prompts are held-out ones and the random numbers their own, so the gate leaves no trace in the run.
"""

from collections.abc import Sequence
from typing import Any

import torch

from qerl_compile.errors import ModelError
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.rollout import Sampler, Sampling
from qerl_compile.rl.token_logps import token_logps

PROMPTS = 4
SAMPLES = 2


def check_parity(
    model: Any,
    sampler: Sampler,
    prompts: Sequence[tuple[int, ...]],
    params: Sampling,
    *,
    limit: float,
    max_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Compare sampler and trainer and return the mean and largest difference of log-probabilities, in nats.

    Args:
        model: what the trainer trains, its noise off.
        sampler: the rollout engine.
        prompts: token ids of a few prompts, such as PROMPTS of them.
        params: the temperature of the run.
        limit: largest mean.
        max_tokens: of a micro-batch.
        device: of the model.

    Raises:
        ModelError: the mean is above the limit, or not a number.
    """
    rollouts = sampler.generate(prompts, SAMPLES, params)
    batches = micro_batches(
        rollouts, torch.zeros(len(rollouts)), max_tokens=max_tokens, pad_id=params.pad_id, device=device, every_row=True
    )
    differences = []
    with torch.no_grad():
        for batch in batches:
            logp_BC, _ = token_logps(model, batch, params.temperature)
            differences.append((logp_BC - batch.sampling_logp_BC)[batch.mask_BC].abs().double().cpu())
    difference_N = torch.cat(differences)
    mean, largest = float(difference_N.mean()), float(difference_N.max())
    if not mean <= limit:
        raise ModelError(
            where="parity of rollouts and trainer, before step 1",
            expected=f"log-probabilities that differ by {limit:g} nats per token or less on average",
            got=f"{mean:.3g} on average over {len(difference_N)} tokens, {largest:.3g} at most",
            do="Check the rollout engine and the adapter; train.parity_limit sets the bound.",
        )
    return {"parity/difference_mean": mean, "parity/difference_max": largest}
