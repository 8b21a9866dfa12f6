"""Signal to quantization noise: how much weight there is per rounding error.

    sqnr = 10 · log10( |w|² / |w - ŵ|² )  dB

6 dB are one bit. Round-to-nearest NVFP4 of a Gaussian matrix has 20.4 dB, a relative error of 0.095.
"""

import torch
from torch import Tensor


def sqnr_db(expected_NK: Tensor, found_NK: Tensor) -> float:
    """Return 10·log10(|w|² / |w - ŵ|²) in dB; infinite if equal, NaN if either holds NaN.

    Args:
        expected_NK: w, float32 [N, K].
        found_NK: ŵ, float32 [N, K].
    """
    noise = (expected_NK - found_NK.to(expected_NK.device)).square_().sum(dtype=torch.float64)
    signal = expected_NK.square().sum(dtype=torch.float64)
    return float("inf") if float(noise) == 0 else float(10 * torch.log10(signal / noise))
