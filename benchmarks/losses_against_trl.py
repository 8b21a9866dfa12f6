"""How far our losses and gradients are from TRL 1.16's own code on the same tensors: every combination of options.

    python benchmarks/losses_against_trl.py > benchmarks/results/losses_against_trl.md

The 108 cases of a loss: clip_delta none or 1.5; no KL, k3, or k3 times ratio; old log-probs given or not; no importance
weights, one a token, or one a sequence; 1, 2 or 3 micro-batches of equally many sequences. What differs on purpose is
in docs/losses.md. The tests hold a part of these cases to 1e-6 and 1e-12.
"""

import itertools
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from qerl_compile.rl.losses import LOSSES, LossOptions
from tests.rl.losses.batches import mixed_batch
from tests.rl.losses.test_losses_against_trl import AS_IN_TRL, ours_and_trls


def largest_differences(name: str, dtype: torch.dtype) -> tuple[int, float, float]:
    """Cases, and the largest difference of loss and of gradient over them."""
    cases, loss, gradient = 0, 0.0, 0.0
    kls = ((0.0, True), (0.1, False), (0.1, True))
    choices = (None, 1.5), kls, (True, False), ("none", "token", "sequence"), (1, 2, 3)
    for delta, (kl_weight, kl_unbiased), updated, weight, pieces in itertools.product(*choices):
        inputs = mixed_batch(dtype)
        if not updated:
            inputs = replace(inputs, old_logp_BT=None)
        if weight != "token" and inputs.weight_BT is not None:
            column_BT = inputs.weight_BT[:, :1].expand(inputs.logp_BT.shape)
            inputs = replace(inputs, weight_BT=None if weight == "none" else column_BT)
        options = LossOptions(clip_delta=delta, kl_weight=kl_weight, kl_unbiased=kl_unbiased)
        size = 6 // pieces
        cuts = [slice(start, start + size) for start in range(0, 6, size)]
        ours, theirs, _, _ = ours_and_trls(name, inputs, options, cuts)
        loss = max(loss, float((ours[0] - theirs[0]).abs()))
        gradient = max(gradient, float((ours[1] - theirs[1]).abs().max()))
        cases += 1
    return cases, loss, gradient


def main() -> None:
    torch.set_num_threads(1)
    date = datetime.now(UTC).date().isoformat()
    print(f"Largest absolute difference from TRL {version('trl')}, torch {version('torch')} on the CPU, {date}.\n")
    print("| loss | TRL's loss_type, level, epsilon_high | cases | float32: loss, gradient | float64: loss, gradient |")
    print("|---|---|---|---|---|")
    for name in LOSSES:
        cases, *single = largest_differences(name, torch.float32)
        _, *double = largest_differences(name, torch.float64)
        cells = [f"{one:.1e}, {two:.1e}" for one, two in (single, double)]
        print(f"| {name} | {', '.join(map(str, AS_IN_TRL[name]))} | {cases} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
