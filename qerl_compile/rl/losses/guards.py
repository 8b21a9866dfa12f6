"""The guard of every exp of a difference of log-probabilities.

Rollouts and trainer may disagree wildly about one token in a million, and exp makes an infinity of it, which spoils the
gradient of a whole step. Differences are therefore clamped to [-10, 10] before exp: a ratio is at most 22026
(torchtitan clamps at the same value). Beyond it the gradient is zero, which is what clipping does long before, for all
but large ratios with negative advantage.

The other guard is `LossInputs.masked`: tokens outside the mask are replaced *before* exp. Multiplying by a zero mask
afterwards would turn an infinite or NaN padding value into a NaN gradient.

Neither hides a NaN at a completion token: that reaches the loss, where the trainer sees it and leaves the step out.
"""

import torch

MAX_LOG_RATIO = 10.0


def bounded_ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of the clamped argument, in its shape and type."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
