"""Rollouts as tensors for the trainer: which rows to run, how to cut them, and the log-probabilities of their tokens.

Two things make a step affordable.

*Only groups with signal run.* A group whose rewards are equal has advantage 0, so its tokens add nothing to the
gradient of a loss without KL term; they count in the denominator and nowhere else. On easy tasks that is 45 to 90 % of
all groups (design/rl.md, B3), and leaving them out changes no gradient.

*Only completions need logits.* `logits_to_keep` asks the model for the last C + 1 positions, so the [B, T, V] tensor
that would dwarf everything else never exists.

Shapes: B rows, T prompt width (left-padded), C completion width (right-padded), V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qerl_compile.rl.rollout import Rollout
from qerl_compile.rl.rollout.padding import last_positions, left_padded, positions


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward and backward.

    Args:
        ids_BS: int64 [B, T + C], prompts padded left, completions padded right.
        attention_BS: int64 [B, T + C], 1 on real tokens.
        mask_BC: bool [B, C], completion tokens.
        sampling_logp_BC: float32 [B, C], recorded while sampling; 0 on padding.
        advantages_B: float32 [B].
    """

    ids_BS: Tensor
    attention_BS: Tensor
    mask_BC: Tensor
    sampling_logp_BC: Tensor
    advantages_B: Tensor


def micro_batches(
    rollouts: Sequence[Rollout], advantages_N: Tensor, *, max_tokens: int, pad_id: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Cut the rows with a non-zero advantage into batches of at most `max_tokens` tokens, padding included.

    Rows are sorted by length, so that padding is small; the loss is a sum over rows and does not depend on the order.
    """
    rows = [row for row in range(len(rollouts)) if float(advantages_N[row]) != 0.0]
    rows.sort(key=lambda row: (len(rollouts[row].prompt_ids), len(rollouts[row].completion_ids)))
    while rows:
        count, prompt, completion = 0, 0, 0
        for row in rows:
            prompt = max(prompt, len(rollouts[row].prompt_ids))
            completion = max(completion, len(rollouts[row].completion_ids))
            if count and (count + 1) * (prompt + completion) > max_tokens:
                break
            count += 1
        taken, rows = rows[:count], rows[count:]
        yield _micro_batch([rollouts[row] for row in taken], advantages_N[taken], pad_id, device)


def _micro_batch(rollouts: Sequence[Rollout], advantages_B: Tensor, pad_id: int, device: torch.device) -> MicroBatch:
    prompts_BT, prompt_mask_BT = left_padded([rollout.prompt_ids for rollout in rollouts], pad_id, device)
    width = max(len(rollout.completion_ids) for rollout in rollouts)
    completions_BC = _right_padded([rollout.completion_ids for rollout in rollouts], width, pad_id, torch.long, device)
    ones = [[1] * len(rollout.completion_ids) for rollout in rollouts]
    mask_BC = _right_padded(ones, width, 0, torch.bool, device)
    return MicroBatch(
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


def token_logps(model: Any, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Run the model and return log-probabilities and entropies of the completion tokens, float32 [B, C].

    Both are of the temperature-scaled distribution, as the rollout recorded it. Entropies carry no gradient.
    """
    columns = batch.mask_BC.shape[1]
    output = model(
        input_ids=batch.ids_BS,
        attention_mask=batch.attention_BS,
        position_ids=positions(batch.attention_BS),
        use_cache=False,
        logits_to_keep=last_positions(batch.ids_BS, columns + 1),
    )
    logits_BCV = output.logits[:, :-1].float() / temperature
    logp_BCV = torch.log_softmax(logits_BCV, dim=-1)
    with torch.no_grad():
        entropy_BC = torch.special.entr(logp_BCV.exp()).sum(-1)  # 0 for probability 0, where p * log p is NaN
    return logp_BCV.gather(2, batch.ids_BS[:, -columns:, None]).squeeze(2), entropy_BC
