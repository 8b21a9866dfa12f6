"""Log-probabilities and entropies of completion tokens, and their divergence from a teacher, without [B, T, V] logits.

    logp_t    = z_t[o_t] - log sum_v exp z_t[v],                     z = logits / temperature
    entropy_t = - sum_v p_t[v] log p_t[v],                           p = softmax(z)
    kl_t      = sum_v p_t[v] (log p_t[v] - log q_t[v]),              q the teacher's, at the same temperature

The divergence is the reverse one, KL(student || teacher), on the student's own samples: on-policy distillation
(arXiv 2306.13649, with lambda = 1 and beta = 1). Over the whole vocabulary its gradient is exact, where an estimate
from the sampled token alone is noisy.

Each of the three is a sum over the vocabulary for one token, so tokens can be taken a few at a time. The backbone runs
once; of its hidden states only those that predict completion tokens are kept (logit_head.py), and the head runs over
chunks of them. A chunk of logits lives until its three numbers are known. Backward makes it again from the hidden
states (`torch.utils.checkpoint`): one more product with the head, for memory that no longer grows with the batch. On
SmolLM2, whose head is a fifth of it, that is 16 % more time and, for 2048 tokens, 384 MiB behind the layers instead of
1152 (benchmarks/results/logprob_memory.md). An autograd function of our own has the same peak there and saves 8 % of
the time, but it would have to know what a LoRA branch, a packed weight or a trained one does; autograd knows.

Logits have the model's dtype and are converted to float32 before they are divided, as the rollout engine does it.

Shapes: B rows, C completion width, N completion tokens of all rows, n of a chunk, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qerl_compile.errors import ModelError
from qerl_compile.rl.logit_head import CompletionLogits, completion_logits
from qerl_compile.rl.policy_batch import MicroBatch

CHUNK_BYTES = 128 * 2**20
"""Most bytes of a chunk's float32 logits. Large enough that the head's product is efficient (220 rows of 152k), and
at its peak a chunk needs three times this (measured), with a teacher five to six times."""


def token_logps(
    model: Any, batch: MicroBatch, temperature: float, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Run the model and return log-probabilities and entropies of the completion tokens, float32 [B, C].

    Both are of the temperature-scaled distribution, as the rollout recorded it, and 0 outside the mask. Entropies, in
    nats, carry no gradient.

    Args:
        model: a causal LM, transformed or not; for a reference, the same one with its adapters off.
        batch: B rows.
        temperature: divides the logits.
        chunk_bytes: most bytes of float32 logits at a time; a single token may exceed it.
    """
    student = completion_logits(model, batch)
    logp_BC, entropy_BC, _ = _score(student, None, batch, temperature, chunk_bytes)
    return logp_BC, entropy_BC


def token_logps_and_kl(
    model: Any, teacher: Any, batch: MicroBatch, temperature: float, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `token_logps` does, and KL(model || teacher) of each completion token in nats, float32 [B, C].

    One forward of the model serves all three. The divergence has a gradient to the model and none to the teacher.

    Args:
        model: the student.
        teacher: a causal LM with the same tokens, on the same device; it runs without gradients.
        batch: B rows.
        temperature: divides the logits of both.
        chunk_bytes: most bytes of float32 logits, of each model, at a time.

    Raises:
        ModelError: the vocabularies differ in size.
    """
    with torch.no_grad():
        taught = completion_logits(teacher, batch)
    student = completion_logits(model, batch)
    if taught.vocabulary != student.vocabulary:
        raise ModelError(
            where="teacher",
            expected=f"a vocabulary of {student.vocabulary} tokens, as the model has",
            got=str(taught.vocabulary),
            do="Choose a teacher with the model's tokenizer and vocabulary size.",
        )
    return _score(student, taught, batch, temperature, chunk_bytes)


def _score(
    student: CompletionLogits,
    teacher: CompletionLogits | None,
    batch: MicroBatch,
    temperature: float,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, entropies and divergences (0 without a teacher), float32 [B, C]."""
    rows = max(1, chunk_bytes // (4 * student.vocabulary))
    ids_N = batch.ids_BS[:, -batch.mask_BC.shape[1] :][batch.mask_BC]
    features_N = student.features_NX.split(rows)
    taught_N = features_N if teacher is None else teacher.features_NX.split(rows)
    parts = []
    for features_nX, ids_n, taught_nX in zip(features_N, ids_N.split(rows), taught_N, strict=True):
        given = (student, teacher, features_nX, ids_n, taught_nX, temperature)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk, *given, use_reentrant=False))
        else:
            parts.append(_chunk(*given))
    logp_BC, entropy_BC, kl_BC = (_placed(torch.cat(values), batch.mask_BC) for values in zip(*parts, strict=True))
    return logp_BC, entropy_BC, kl_BC


def _chunk(
    student: CompletionLogits,
    teacher: CompletionLogits | None,
    features_nX: Tensor,
    ids_n: Tensor,
    taught_nX: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logp_nV = _log_softmax(student.logits(features_nX), temperature)
    logp_n = logp_nV.gather(1, ids_n[:, None]).squeeze(1)
    kl_n = torch.zeros_like(logp_n)
    if teacher is not None:
        with torch.no_grad():
            teacher_logp_nV = _log_softmax(teacher.logits(taught_nX), temperature)
        p_nV = logp_nV.exp()
        # A token of probability 0 adds nothing; its logarithms are infinite and would add NaN.
        kl_n = (p_nV * torch.where(p_nV > 0, logp_nV - teacher_logp_nV, 0.0)).sum(1)
    # Last, because a recomputation ends with the last tensor that backward needs, and entropy has no backward.
    with torch.no_grad():
        entropy_n = torch.special.entr(logp_nV.exp()).sum(1)  # 0 for probability 0, where p * log p is NaN
    return logp_n, entropy_n, kl_n


def _log_softmax(logits_nV: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits_nV.float() / temperature, dim=1)


def _placed(values_N: Tensor, mask_BC: Tensor) -> Tensor:
    """Return values [N] at the True entries of the mask and 0 elsewhere."""
    return torch.zeros(mask_BC.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BC, values_N)
