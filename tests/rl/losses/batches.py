"""Batches for the loss tests."""

from dataclasses import replace

import torch

from qerl_compile.rl.losses import LossInputs, StepTotals

LENGTHS = (9, 4, 0, 1, 7, 6)  # the third sequence is masked out


def mixed_batch(dtype: torch.dtype = torch.float64) -> LossInputs:
    """Six sequences with everything: ratios on both sides of every bound, both signs, weights, a reference."""
    generator = torch.Generator().manual_seed(5)
    rows, width = len(LENGTHS), max(LENGTHS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    logp_BT = -normal(rows, width).abs() - 0.05
    # A shift of whole sequences, so that sequence ratios pass the bounds as well as those of tokens.
    old_logp_BT = (
        logp_BT + 0.3 * normal(rows, width) + torch.tensor([0.5, -0.5, 0, 0.6, -0.6, 0.1], dtype=dtype)[:, None]
    )
    return LossInputs(
        logp_BT.requires_grad_(),
        old_logp_BT,
        torch.tensor([1.2, -0.7, 0.9, -1.1, 0.8, -0.3], dtype=dtype),
        torch.arange(width) < torch.tensor(LENGTHS)[:, None],
        (0.5 * normal(rows, width)).exp(),
        logp_BT.detach() + 0.5 * normal(rows, width),
    )


def rows(inputs: LossInputs, cut: slice) -> LossInputs:
    """Some sequences of a batch; gradients flow back into the whole one."""
    names = ("logp_BT", "old_logp_BT", "advantages_B", "mask_BT", "weight_BT", "reference_logp_BT")
    tensors = {name: getattr(inputs, name) for name in names}
    return replace(inputs, **{name: tensor[cut] for name, tensor in tensors.items() if tensor is not None})


def totals(inputs: LossInputs, micro_batches: int = 1, max_new_tokens: int = 32) -> StepTotals:
    """Totals of a step that consists of this batch."""
    return StepTotals(int(inputs.mask_BT.sum()), len(inputs.mask_BT), micro_batches, max_new_tokens)
