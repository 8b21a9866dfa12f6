"""Two models on the same tokens: how differently they predict.

    KL            Σ_v p(v) · (log p(v) - log q(v)), mean over all tokens, in nats: what a sampler would notice
    |Δlogit|      the largest difference of a logit anywhere: catches one broken row that a mean hides
    top-1         share of tokens after which both models find the same token likeliest: what greedy decoding notices
    perplexity    of both on the text itself
    kept          how much of an adapter's effect a merge has, see `effect_kept`

p is the reference. The reference's logits are recorded first, on the CPU and in the dtype that the model gave, so that
the two models never need to be in memory together: 2048 tokens of a vocabulary of 150,000 are 0.6 GB in bf16.
Differences are taken in float32, which leaves a KL of equal logits at exactly 0 and of nearly equal ones uncertain by
some 1e-7 nats.

Shape suffixes: T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.perplexity import row_chunks, token_nats, window_logits

MAX_TOKENS = 2048


@dataclass(frozen=True)
class Comparison:
    """How a candidate predicts beside a reference; NaN where a model gave NaN.

    Attributes:
        tokens: how many predictions were compared.
        kl: mean KL(reference ‖ candidate) in nats per token.
        kl_worst: of the token where it is largest.
        logit_error: largest |Δlogit|.
        top1: share of tokens with the same likeliest next token.
        reference_perplexity: of the text.
        perplexity: the candidate's.
    """

    tokens: int
    kl: float
    kl_worst: float
    logit_error: float
    top1: float
    reference_perplexity: float
    perplexity: float

    @property
    def perplexity_increase(self) -> float:
        """Relative to the reference: 0.05 is five per cent more."""
        return self.perplexity / self.reference_perplexity - 1


def record_logits(model: nn.Module, windows: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits [T, V] of every window on the CPU, in the model's dtype."""
    return [window_logits(model, ids_T).cpu() for ids_T in windows]


def compare(reference: Sequence[Tensor], model: nn.Module, windows: Sequence[Tensor]) -> Comparison:
    """Compare a model with recorded logits.

    Args:
        reference: `record_logits` of the same windows.
        model: the candidate.
        windows: int64 [T] each.
    """
    kls: list[Tensor] = []
    nats: list[tuple[float, float]] = []
    logit_errors: list[Tensor] = []
    same = 0
    for expected_TV, ids_T in zip(reference, windows, strict=True):
        found_TV = window_logits(model, ids_T)
        expected_TV = expected_TV.to(found_TV.device)
        for rows in row_chunks(len(ids_T)):
            p_TV, q_TV = expected_TV[rows].float(), found_TV[rows].float()
            logit_errors.append((p_TV - q_TV).abs().max())
            same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
            log_p_TV, log_q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
            kls.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).cpu())
        nats.append((_total(expected_TV, ids_T), _total(found_TV, ids_T)))
    kl_T = torch.cat(kls).clamp(min=0)  # below 0 only by rounding; NaN stays
    predicted = sum(len(ids_T) - 1 for ids_T in windows)
    expected_nats, found_nats = (sum(each) / predicted for each in zip(*nats, strict=True))
    return Comparison(
        tokens=len(kl_T),
        kl=float(kl_T.double().mean()),
        kl_worst=float(kl_T.max()),
        logit_error=float(torch.stack(logit_errors).max()),
        top1=same / len(kl_T),
        reference_perplexity=_exp(expected_nats),
        perplexity=_exp(found_nats),
    )


@torch.no_grad()
def effect_kept(
    adapted: Sequence[Tensor],
    plain: Sequence[Tensor],
    merged_plain: Sequence[Tensor],
    merged: nn.Module,
    windows: Sequence[Tensor],
) -> float:
    """Return how much of what an adapter does to the predictions is done by the merged model too: 1 all, 0 nothing.

    With a = log p(adapted) - log p(plain) and m the same difference for the merged model and its own base,

        kept = Σ_t Σ_v p(v)·a(v)·m(v)  /  Σ_t Σ_v p(v)·a(v)²          p of the adapted model

    which is the coefficient of a in m, in the inner product in which KL is a squared length, to second order. A mean KL
    cannot tell a merge that lost a small adapter from one that has it: both are near to the adapted model.

    Args:
        adapted: recorded logits of the model with its adapter.
        plain: of the model without it.
        merged_plain: of what the merge started from: the base's for bf16-master, otherwise `plain`.
        merged: the merged model.
        windows: int64 [T] each.
    """
    shared, whole = 0.0, 0.0
    for adapted_TV, plain_TV, start_TV, ids_T in zip(adapted, plain, merged_plain, windows, strict=True):
        merged_TV = window_logits(merged, ids_T)
        for rows in row_chunks(len(ids_T)):
            log_p_TV, off_TV, start, found = (
                each[rows].to(merged_TV.device).float().log_softmax(-1)
                for each in (adapted_TV, plain_TV, start_TV, merged_TV)
            )
            weighted_TV = log_p_TV.exp() * (log_p_TV - off_TV)
            shared += float((weighted_TV * (found - start)).sum())
            whole += float((weighted_TV * (log_p_TV - off_TV)).sum())
    return shared / whole if whole else math.nan


def _total(logits_TV: Tensor, ids_T: Tensor) -> float:
    return float(token_nats(logits_TV, ids_T).double().sum())


def _exp(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)  # exp overflows beyond; NaN passes and is refused later
