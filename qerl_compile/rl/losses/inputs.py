"""What a policy loss is given: the tokens of a micro-batch, the totals of the step, and the options.

A step is cut into micro-batches, and micro-batches are spread over ranks, for reasons of memory only. So that the cut
changes nothing, a loss never divides by what it happens to see: every denominator comes from `StepTotals`, which
belongs to the whole step. Losses and gradients of the pieces then *add up* to those of the step; nobody takes a mean.

What the totals count: `sequences` are all completions of the step, also those without signal and those masked out (as
in TRL); `tokens` are those in the masks (as in TRL: the tokens of a truncated completion that is masked out are not
counted). A step in which every completion is masked out has 0 tokens; its loss and gradient are 0, never 0 / 0.

Shapes: B sequences, T completion tokens, right-padded.
"""

from dataclasses import dataclass

import torch

from qerl_compile.errors import RecipeError


@dataclass(frozen=True)
class LossInputs:
    """The completion tokens of one micro-batch.

    Padding may hold anything, NaN included: it reaches neither the loss nor a gradient.

    Args:
        logp_BT: float [B, T], log-probabilities under the policy being trained, in nats, with gradient.
        old_logp_BT: float [B, T], the same before the first update on this rollout; None on the first update, where
            they are equal: the ratio is then 1, with its gradient.
        advantages_B: float [B].
        mask_BT: bool [B, T], True on completion tokens, the end token included; all False for a sequence left out.
        weight_BT: float [B, T], weights against the mismatch of sampler and trainer (`correction.py`); None for none.
        reference_logp_BT: float [B, T], log-probabilities under the reference model; None without KL.

    Raises:
        ValueError: shapes disagree, or the mask is not boolean. Broadcasting would accept both and be wrong.
    """

    logp_BT: torch.Tensor
    old_logp_BT: torch.Tensor | None
    advantages_B: torch.Tensor
    mask_BT: torch.Tensor
    weight_BT: torch.Tensor | None = None
    reference_logp_BT: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.logp_BT.shape)
        if len(shape) != 2:
            raise ValueError(f"expected logp_BT of shape [B, T], got {shape}")
        expected = {"advantages_B": shape[:1]} | dict.fromkeys(
            ("old_logp_BT", "mask_BT", "weight_BT", "reference_logp_BT"), shape
        )
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
        if self.mask_BT.dtype is not torch.bool:
            raise ValueError(f"expected a boolean mask, got {self.mask_BT.dtype}")

    @property
    def dtype(self) -> torch.dtype:
        """The type everything is computed in: float32, or float64 if the log-probabilities are."""
        return torch.promote_types(self.logp_BT.dtype, torch.float32)

    @property
    def advantages_B1(self) -> torch.Tensor:
        """[B, 1], to be multiplied with values of tokens or of sequences."""
        return self.advantages_B.to(self.dtype)[:, None]

    @property
    def lengths_B1(self) -> torch.Tensor:
        """int64 [B, 1], tokens in the mask, but at least 1: to divide by."""
        return self.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)

    def masked(self, values_BT: torch.Tensor) -> torch.Tensor:
        """The values in the type of the computation, 0 outside the mask."""
        return torch.where(self.mask_BT, values_BT.to(self.dtype), 0.0)


@dataclass(frozen=True)
class StepTotals:
    """What the losses divide by: sums over all micro-batches of all ranks of one optimizer step.

    Args:
        tokens: True entries of all masks; may be 0.
        sequences: completions, with those that are masked out or were not run for want of signal.
        micro_batches: micro-batches (`bnpo` only).
        max_new_tokens: longest completion that was allowed, in tokens (`dr_grpo` only).

    Raises:
        ValueError: a total is below 1 (`tokens`: below 0).
    """

    tokens: int
    sequences: int
    micro_batches: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 0 or min(self.sequences, self.micro_batches, self.max_new_tokens) < 1:
            raise ValueError(f"expected totals of at least 1 (tokens: 0), got {self}")


@dataclass(frozen=True)
class LossOptions:
    """Options of the losses, as in the recipe (`recipe_fields.TrainConfig`).

    Args:
        clip_low: ratios are clipped below at 1 - clip_low; not used by `cispo`.
        clip_high: ratios are clipped above at 1 + clip_high.
        clip_delta: upper bound of the ratio where the advantage is negative, above 1 + clip_high; None for none.
            Source: INTELLECT-2, arXiv 2505.07291. Not used by `cispo`, whose cap holds for both signs.
        kl_weight: weight of the KL term; 0 for none.
        kl_unbiased: multiply each token's KL by its ratio, which makes the gradient that of the KL (`kl.py`).

    Raises:
        RecipeError: clip_delta is not above 1 + clip_high; it would replace the upper clip bound instead.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_delta: float | None = None
    kl_weight: float = 0.0
    kl_unbiased: bool = True

    def __post_init__(self) -> None:
        if self.clip_delta is not None and self.clip_delta <= 1 + self.clip_high:
            raise RecipeError(
                where="train.clip_delta",
                expected=f"more than 1 + clip_high, which is {1 + self.clip_high:g}",
                got=f"{self.clip_delta:g}",
                do="Raise clip_delta, or leave it out.",
            )
