"""Rollouts as tensors for the trainer: which rows to run, and how to cut them into micro-batches.

*Only groups with signal run.* A group whose rewards are equal has advantage 0, so its tokens add nothing to the
gradient of a policy loss; they count in the denominator and nowhere else. On easy tasks that is 45 to 90 % of all
groups (design/rl.md, B3), and leaving them out changes no gradient. A KL term to a reference or a teacher has a
gradient everywhere: `every_row` takes all rows.

*Rows are sorted by length*, so padding is small. Losses are sums over rows and do not depend on the order; what was
computed per row finds its rollout again by `MicroBatch.rows`.

A micro-batch holds token ids and a few numbers per token, no activations: a step's list of them can be kept over
several updates, with the log-probabilities of the first (`dataclasses.replace(batch, old_logp_BC=...)`). One that did
not fit into memory is halved by `split`, and the halves carry all of this with them.

What this module does not do: run the model (token_logps.py).

Shapes: N rollouts, B rows, T prompt width (left-padded), C completion width (right-padded).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qerl_compile.errors import ModelError
from qerl_compile.rl.rollout import Rollout
from qerl_compile.rl.rollout.padding import left_padded


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward and backward. Every field has one entry per row, or is None.

    Args:
        rows: which rollouts these are: indices into what `micro_batches` was given.
        ids_BS: int64 [B, T + C], prompts padded left, completions padded right.
        attention_BS: int64 [B, T + C], 1 on real tokens.
        mask_BC: bool [B, C], completion tokens.
        sampling_logp_BC: float32 [B, C], recorded while sampling; 0 on padding.
        advantages_B: float32 [B].
        old_logp_BC: float32 [B, C], of the policy before the first update on these rollouts; None if nobody asked.
        reference_logp_BC: float32 [B, C], of the model without its adapter; None if nobody asked.
        weight_BC: float32 [B, C], weights against the mismatch of sampler and trainer; None for none.
    """

    rows: tuple[int, ...]
    ids_BS: Tensor
    attention_BS: Tensor
    mask_BC: Tensor
    sampling_logp_BC: Tensor
    advantages_B: Tensor
    old_logp_BC: Tensor | None = None
    reference_logp_BC: Tensor | None = None
    weight_BC: Tensor | None = None


def micro_batches(
    rollouts: Sequence[Rollout],
    advantages_N: Tensor,
    *,
    max_tokens: int,
    pad_id: int,
    device: torch.device,
    every_row: bool = False,
) -> Iterator[MicroBatch]:
    """Cut the rows into batches of at most `max_tokens` tokens, padding included; a longer row goes alone.

    Args:
        rollouts: N of them.
        advantages_N: float32 [N].
        max_tokens: budget of a batch.
        pad_id: fills ids; never attended to.
        device: where the tensors go.
        every_row: whether rows with advantage 0 come too.
    """
    rows = [row for row in range(len(rollouts)) if every_row or float(advantages_N[row]) != 0.0]
    rows.sort(key=lambda row: (len(rollouts[row].prompt_ids), len(rollouts[row].completion_ids)))
    while rows:
        count, prompt, completion = 0, 0, 0
        for row in rows:
            prompt = max(prompt, len(rollouts[row].prompt_ids))
            completion = max(completion, len(rollouts[row].completion_ids))
            if count and (count + 1) * (prompt + completion) > max_tokens:
                break
            count += 1
        if len(rows) - count == 1 and count > 2:
            count -= 1  # one row left over would be compiled once more: torch specialises a batch of one (22 s at 7B)
        taken, rows = tuple(rows[:count]), rows[count:]
        yield _micro_batch(taken, [rollouts[row] for row in taken], advantages_N[list(taken)], pad_id, device)


def split(batch: MicroBatch) -> tuple[MicroBatch, MicroBatch]:
    """Return the first and the second half of the rows; the tensors are views, padding stays as it is.

    Raises:
        ModelError: there is only one row.
    """
    count, tokens = batch.ids_BS.shape
    if count < 2:
        raise ModelError(
            where=f"micro-batch of rollout {batch.rows[0]}",
            expected="at least two rows to halve",
            got=f"one row of {tokens} tokens",
            do="Set train.recompute=true, or lower train.max_new_tokens.",
        )
    middle = (count + 1) // 2
    return _rows_of(batch, slice(None, middle)), _rows_of(batch, slice(middle, None))


def _rows_of(batch: MicroBatch, rows: slice) -> MicroBatch:
    fields: dict[str, Any] = {name: None if value is None else value[rows] for name, value in vars(batch).items()}
    return MicroBatch(**fields)


def _micro_batch(
    rows: tuple[int, ...], rollouts: Sequence[Rollout], advantages_B: Tensor, pad_id: int, device: torch.device
) -> MicroBatch:
    prompts_BT, prompt_mask_BT = left_padded([rollout.prompt_ids for rollout in rollouts], pad_id, device)
    width = max(len(rollout.completion_ids) for rollout in rollouts)
    completions_BC = _right_padded([rollout.completion_ids for rollout in rollouts], width, pad_id, torch.long, device)
    ones = [[1] * len(rollout.completion_ids) for rollout in rollouts]
    mask_BC = _right_padded(ones, width, 0, torch.bool, device)
    return MicroBatch(
        rows=rows,
        ids_BS=torch.cat([prompts_BT, completions_BC], dim=1),
        attention_BS=torch.cat([prompt_mask_BT, mask_BC.long()], dim=1),
        mask_BC=mask_BC,
        sampling_logp_BC=_right_padded([r.logps for r in rollouts], width, 0.0, torch.float32, device),
        advantages_B=advantages_B.to(device),
    )


def _right_padded(
    rows: Sequence[Sequence[float]], width: int, fill: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device=device)
