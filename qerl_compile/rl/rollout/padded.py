"""Sample groups of completions from the transformed model, with the log-probability of every sampled token.

    prefill    each different prompt once, left-padded                       [P, T]
    repeat     its keys and values for every sample of the group             [P·G, T]
    decode     one token for all sequences per step, until all have ended    [P·G, 1]

Log-probabilities are those of the distribution that was sampled from: the untruncated softmax of logits / temperature,
in float32, recorded as the tokens are drawn. Nothing truncates it (no top-p, no top-k), since a truncated distribution
biases every importance ratio built on it (design/rl.md, C5).

**Randomness belongs to the sequence.** A token is the inverse CDF at one uniform number, and the uniform numbers of a
sequence come from a seed derived from (run seed, step, prompt position, sample index). So a sample does not depend on
what else is in the batch, up to rounding of the logits, and a resumed run draws the same numbers with no generator
state.

What this module does not do: continuous batching, CUDA graphs, other engines (rollout engine, issue 4). Rows that have
ended stay in their batch as padding until the longest one ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qerl_compile.errors import ModelError
from qerl_compile.rl.seeds import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: longest completion, the end token included.
        end_ids: tokens that end a completion.
        pad_id: fills rows that have ended; never read.
        temperature: divides the logits; 0 is greedy.
        batch: most sequences generated together.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    batch: int = 64


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Args:
        prompt_ids: the prompt's tokens.
        completion_ids: sampled tokens, the end token included if one came.
        logps: log-probability of each completion token under the sampling distribution (0 for greedy).
        ended: whether an end token came.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool


def generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    *,
    group_size: int = 1,
    seed: tuple[int | str, ...] = (),
) -> list[Rollout]:
    """Sample `group_size` completions for each prompt.

    Args:
        model: a causal LM in eval mode, transformed or not.
        prompts: token ids, unpadded.
        sampling: how.
        group_size: completions per prompt.
        seed: path of the run and step; prompt position and sample index are appended.

    Returns:
        `len(prompts) * group_size` rollouts, group after group.

    Raises:
        ModelError: logits that tokens were sampled from are not finite.
    """
    samples = min(group_size, sampling.batch)
    per_batch = sampling.batch // samples
    rollouts: list[Rollout] = []
    for start in range(0, len(prompts), per_batch):
        part = prompts[start : start + per_batch]
        for first in range(0, group_size, samples):  # more than one only where a group does not fit into a batch
            chosen = range(first, min(first + samples, group_size))
            paths = [(*seed, start + position, sample) for position in range(len(part)) for sample in chosen]
            uniform_BC = torch.stack([_uniform(path, sampling.max_new_tokens) for path in paths])
            rollouts += _generate_batch(model, part, sampling, len(chosen), uniform_BC)
    return rollouts


def _uniform(seed: tuple[int | str, ...], count: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _generate_batch(
    model: Any, prompts: Sequence[tuple[int, ...]], sampling: Sampling, group_size: int, uniform_BC: Tensor
) -> list[Rollout]:
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    ids_PT, mask_PT = left_padded(prompts, sampling.pad_id, device)
    cache = DynamicCache(config=model.config)
    logits_PV = _forward(model, ids_PT, mask_PT, cache)
    cache.batch_repeat_interleave(group_size)
    logits_BV = logits_PV.repeat_interleave(group_size, dim=0)
    mask_BS = mask_PT.repeat_interleave(group_size, dim=0)
    ends_E = torch.tensor(sampling.end_ids, device=device)
    alive_B = torch.ones(len(logits_BV), dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    logps: list[Tensor] = []
    for column in range(sampling.max_new_tokens):
        token_B, logp_B = _draw(logits_BV, sampling.temperature, uniform_BC[:, column].to(device))
        tokens.append(torch.where(alive_B, token_B, -1))
        logps.append(logp_B)
        alive_B = alive_B & ~torch.isin(token_B, ends_E)
        if column + 1 == sampling.max_new_tokens or not bool(alive_B.any()):
            break
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], dim=1)
        token_B1 = torch.where(alive_B, token_B, sampling.pad_id)[:, None]
        logits_BV = _forward(model, token_B1, mask_BS, cache)
    logps_BC = torch.stack(logps, 1)
    _check(logps_BC)
    return list(_unpack(prompts, group_size, torch.stack(tokens, 1), logps_BC, alive_B))


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


def _forward(model: Any, ids_BT: Tensor, mask_BS: Tensor, cache: Any) -> Tensor:
    """Return logits of the last position, float32 [B, V]; the cache grows by T."""
    position_ids = positions(mask_BS)[:, -ids_BT.shape[1] :]
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BS,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_positions(ids_BT, 1),
    )
    return output.logits[:, -1].float()


def _draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B, torch.zeros_like(token_B, dtype=torch.float32)
    logp_BV = torch.log_softmax(logits_BV / temperature, dim=-1)
    # In float32 the sum swallows every token below 3e-8, and a uniform number can round to 1, past the last token.
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    threshold_B1 = uniform_B[:, None] * cdf_BV[:, -1:]  # the sum is 1 only up to rounding
    token_B = torch.searchsorted(cdf_BV, threshold_B1, right=True).squeeze(1)
    token_B = token_B.clamp(max=logits_BV.shape[1] - 1)  # past the end only with NaN, which `_check` reports
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)


def _check(logps_BC: Tensor) -> None:
    if not bool(logps_BC.isfinite().all()):
        raise ModelError(
            where="rollout",
            expected="finite log-probabilities of the sampled tokens",
            got="NaN or Inf, so the model's logits are not finite",
            do="Check the checkpoint, or lower train.learning_rate if training came this far.",
        )


def _unpack(
    prompts: Sequence[tuple[int, ...]], group_size: int, tokens_BC: Tensor, logps_BC: Tensor, alive_B: Tensor
) -> Iterator[Rollout]:
    rows = zip(tokens_BC.tolist(), logps_BC.tolist(), alive_B.tolist(), strict=True)
    for row, (tokens, logps, alive) in enumerate(rows):
        length = sum(token >= 0 for token in tokens)
        yield Rollout(prompts[row // group_size], tuple(tokens[:length]), tuple(logps[:length]), ended=not alive)
