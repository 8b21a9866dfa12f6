"""What length does to a reward: the soft penalty for overlong completions, and leaving out those that were cut off.

    penalty(n) = 0                              n <= L - B
                 - w (n - (L - B)) / B          L - B < n <= L          (DAPO, arXiv 2503.14476, equation 13)

with n tokens, L = max_new_tokens, B = overlong_buffer, w = overlong_penalty. A completion that was cut off has n = L
and loses w. DAPO's equation has the value -1 beyond L, where nothing is sampled here. The penalty is added to the
reward before advantages are taken, so a group whose answers are all right, but some of them overlong, has signal.

Leaving truncated completions out of the loss (DAPO's overlong filtering; TRL's mask_truncated_completions) is the other
way: their rewards still count in the statistics of their group, their tokens neither in the loss nor in its divisor.
"""

import torch
from torch import Tensor


def overlong_penalty(lengths_N: Tensor, max_new_tokens: int, buffer: int, penalty: float) -> Tensor:
    """Return what is added to the rewards, float64 [N], never above 0.

    Args:
        lengths_N: int [N], completion tokens, the end token included.
        max_new_tokens: L.
        buffer: B; 0 for no penalty. More than L counts from the first token.
        penalty: w.
    """
    if buffer == 0:
        return torch.zeros(len(lengths_N), dtype=torch.float64)
    over_N = (lengths_N.double() - (max_new_tokens - buffer)).clamp(min=0)
    return -penalty * over_N / buffer
