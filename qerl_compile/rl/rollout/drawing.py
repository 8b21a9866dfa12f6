"""One token for each row of logits: the inverse CDF at one uniform number, without a float64 copy of the vocabulary.

The numbers that decide a token have to be float64: in float32 a running sum swallows every token below 3e-8, and a
uniform number can round to 1, past the last token. A float64 running sum over [256, 152064] moves over a gigabyte,
though, and one number out of it is used. So the inverse CDF is taken in two levels, by one function:

    probabilities      float32 [B, V], softmax(logits / temperature)
    chunk masses       float32 sums over 512 tokens, then their running sum in float64        [B, V/512]
    which chunk        the first whose running sum exceeds u * total; what is left of u goes on to
    which token        the same, on that chunk's probabilities, gathered and made float64     [B, 512]

Token i is drawn iff cdf[i-1] <= u * total < cdf[i]. The cdf differs from an exact one by what float32 probabilities and
sums of 512 of them differ, a relative 1e-6 of each token's probability; because u is rescaled by the mass of the chosen
chunk, rounding can shift the border between two tokens but make none unreachable. An entry without mass is never
chosen, not even where a parallel running sum is not monotone (on a GPU its rounding depends on the tree): only entries
with mass can exceed the threshold, and the largest of them always does.

**Bytes.** Of bf16 logits [256, 152064]: converting reads 2 and writes 4 bytes a logit, softmax reads and writes 4, the
chunk sums read 4: 0.70 GB in all, where the float64 running sum over all tokens moved 2.6. A temperature adds nothing,
since dividing converts; to float32 logits it adds 8 bytes a logit. What has no V in its shape is small beside that.

**Truncation** keeps a set of tokens by their probability and draws from it in the same way, in the order and with the
sets of transformers' warpers: top-k; top-p on what top-k left, renormalised; min-p. Tokens that tie at the border stay
or go together, all three times. transformers does so for top-k and min-p; its top-p splits a tie by whatever order its
sort has, so ours may keep more there. Top-p without top-k sorts the vocabulary, by far the dearest thing here.

**Log-probabilities** are of the untruncated distribution (types.py); greedy ones are 0. A row whose logits hold a NaN
or +Inf gets some token of the vocabulary and a log-probability of NaN, in greedy too; -Inf is a token that cannot be
drawn. Nothing here waits for the device and no shape depends on values, so a CUDA graph can capture it.

Shapes: B rows, V vocabulary, N entries of a level, K tokens of a chunk.
"""

import torch
from torch import Tensor

CHUNK = 512  # near the square root of a vocabulary of 150k, so that both levels are small
BELOW_ONE = 1 - 2**-53  # times any total, it rounds to less than the total


def draw(
    logits_BV: Tensor,
    uniform_B: Tensor,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row.

    Args:
        logits_BV: of the next token, in any floating dtype; not changed.
        uniform_B: float64, in [0, 1).
        temperature: divides the logits; 0 takes the largest logit, the first of equals.
        top_k: as in `Sampling`.
        top_p: as in `Sampling`.
        min_p: as in `Sampling`.

    Returns:
        Tokens int64 [B], and their log-probabilities float32 [B].
    """
    if temperature == 0:
        largest_B, token_B = logits_BV.max(-1)
        return token_B, (largest_B - largest_B).float()  # 0, or NaN if the logit is not finite
    if temperature != 1:
        # A float32 tensor of one dimension promotes bf16 logits within the division: one pass, not two.
        logits_BV = logits_BV / torch.full((1,), temperature, dtype=torch.float32, device=logits_BV.device)
    probability_BV = torch.softmax(logits_BV, -1, dtype=torch.float32)
    kept_BV = _truncated(probability_BV, top_k, top_p, min_p)
    token_B1 = _inverse_cdf(kept_BV, uniform_B[:, None])
    return token_B1.squeeze(1), probability_BV.gather(1, token_B1).squeeze(1).log()


def _truncated(probability_BV: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return the probabilities with 0 for tokens that may not be drawn, not renormalised."""
    mass_BV, descending_BN = probability_BV, None
    if 0 < top_k < mass_BV.shape[1]:
        descending_BN = mass_BV.topk(top_k).values
        mass_BV = _at_least(mass_BV, descending_BN[:, -1:])
    if top_p < 1:
        mass_BV = _at_least(mass_BV, _top_p_border(mass_BV, descending_BN, top_p))
    if min_p > 0:
        mass_BV = _at_least(mass_BV, min_p * mass_BV.amax(-1, keepdim=True))
    return mass_BV


def _top_p_border(mass_BV: Tensor, descending_BN: Tensor | None, top_p: float) -> Tensor:
    """Return the least probability in the smallest set of the likeliest tokens that reaches `top_p` of the mass."""
    share_B1 = torch.full_like(mass_BV[:, :1], top_p, dtype=torch.float64)
    if descending_BN is None:
        descending_BN = mass_BV.sort(descending=True).values
    else:  # the mass is that of N tokens, and of all others that tie with the last
        share_B1 = share_B1 * mass_BV.sum(-1, keepdim=True) / descending_BN.sum(-1, keepdim=True)
    # The set ends where the cdf is >= share, and an inverse CDF where it is >.
    last_B1 = _inverse_cdf(descending_BN, share_B1.clamp(max=1) * BELOW_ONE)
    return descending_BN.gather(1, last_B1)


def _at_least(mass_BV: Tensor, least_B1: Tensor) -> Tensor:
    return mass_BV.masked_fill(mass_BV < least_B1, 0)


def _inverse_cdf(mass_BV: Tensor, fraction_B1: Tensor) -> Tensor:
    """Return int64 [B, 1], the first entry at which the running sum exceeds `fraction` of the total."""
    size = mass_BV.shape[1]
    whole = size - size % CHUNK
    sums = [mass_BV[:, :whole].unflatten(1, (-1, CHUNK)).sum(-1)] if whole else []  # a view, whatever the remainder
    if whole < size:
        sums.append(mass_BV[:, whole:].sum(-1, keepdim=True))
    chunk_B1, rest_B1 = _level(torch.cat(sums, 1).double(), fraction_B1)
    index_BK = chunk_B1 * CHUNK + torch.arange(CHUNK, device=mass_BV.device)
    chunk_BK = mass_BV.gather(1, index_BK.clamp(max=size - 1)).masked_fill(index_BK >= size, 0)
    within_B1, _ = _level(chunk_BK.double(), rest_B1)
    return chunk_B1 * CHUNK + within_B1


def _level(mass_BN: Tensor, fraction_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entry at `fraction` of the total, and how far into that entry the fraction reaches, in [0, 1)."""
    cdf_BN = mass_BN.cumsum(-1).masked_fill(mass_BN <= 0, 0)
    threshold_B1 = fraction_B1 * cdf_BN.amax(-1, keepdim=True)
    index_B1 = (cdf_BN > threshold_B1).int().argmax(-1, keepdim=True)  # the first of equals; 0 if there is none
    mass_B1 = mass_BN.gather(1, index_B1)
    into_B1 = threshold_B1 - (cdf_BN.gather(1, index_B1) - mass_B1)
    return index_B1, (into_B1 / mass_B1).clamp(0, BELOW_ONE)
