"""Sequences of different lengths as one rectangle, and where their tokens are.

Prompts are padded on the left: all of them then end in one column, and what is generated, or was, begins in the next.
The Hugging Face engine and the batches of training are laid out like that.

What this module does not do: lay out our own engine's prompts, which are packed one after the other (paged.py), or pad
completions, on the right (policy_batch.py).

Shapes: B rows, T columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [B, T], padded on the left to the longest sequence."""
    width = max(map(len, sequences))
    ids_BT = torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask_BT = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids_BT, mask_BT


def positions(mask_BT: Tensor) -> Tensor:
    """Return the position of each token in its own sequence, int64 [B, T]; padding counts as 0."""
    return (mask_BT.cumsum(-1) - 1).clamp(min=0)


def last_positions(ids_BT: Tensor, count: int) -> Tensor:
    """Return the indices of the last `count` positions, for `logits_to_keep`.

    A count would do, but transformers then slices: the head gets a strided [B, n, D], which torch multiplies by a copy
    of the head per row. On SmolLM2 that was half of a training step; indices gather into contiguous memory.
    """
    return torch.arange(ids_BT.shape[1] - count, ids_BT.shape[1], device=ids_BT.device)
