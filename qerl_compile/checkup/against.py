"""Signal to noise of a packed linear against the dense base, and what explains it if there is none.

    SQNR = 10 log10( sum w² / sum (w - ŵ)² )  dB

Rounding to NVFP4 leaves about 20 dB. Weights that have nothing to do with the base have less than 3: two independent
matrices of one size give -3. Then the two mistakes that make every value wrong and no tensor conspicuous are tried on
the first rows: swapped nibbles, and a scalar the wrong way up.
"""

import math

import torch
from torch import Tensor

from qerl_compile.checkup.findings import Fault
from qerl_compile.formats import e2m1
from qerl_compile.formats.nvfp4 import BLOCK

NOTHING_IN_COMMON_DB = 3.0
PLAIN_ROUNDING_DB = 12.0
CHUNK_ELEMENTS = 1 << 21
SAMPLE_ROWS = 256


def sqnr_db(base_NK: Tensor, codes_NK2: Tensor, bits_NG: Tensor, decode_scale: float) -> float:
    """Return the signal to noise ratio in dB; infinite if both are equal, NaN if a block scale is.

    Args:
        base_NK: floating point [N, K].
        codes_NK2: uint8 [N, K/2].
        bits_NG: uint8 [N, K/16], bits of E4M3.
        decode_scale: multiplies.
    """
    signal = noise = 0.0
    rows, columns = base_NK.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        w_NK = base_NK[part].float()
        decode_scale_NG = bits_NG[part].view(torch.float8_e4m3fn).float() * decode_scale
        decoded_NK = e2m1.decode(codes_NK2[part].contiguous(), torch.float32)
        decoded_NK = (decoded_NK.unflatten(1, (-1, BLOCK)) * decode_scale_NG[..., None]).flatten(1)
        signal += w_NK.square().sum(dtype=torch.float64).item()
        noise += (w_NK - decoded_NK).square().sum(dtype=torch.float64).item()
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def base_fault(
    path: str, sqnr: float, base_NK: Tensor, codes_NK2: Tensor, bits_NG: Tensor, decode_scale: float
) -> Fault | None:
    """Return what the ratio says about a linear, or None if it is what rounding leaves. Arguments as `sqnr_db`."""
    if sqnr >= PLAIN_ROUNDING_DB:
        return None
    found = f"SQNR {sqnr:.1f} dB"
    if sqnr >= NOTHING_IN_COMMON_DB:
        return Fault("far-from-base", path, found)
    base, codes, bits = base_NK[:SAMPLE_ROWS], codes_NK2[:SAMPLE_ROWS], bits_NG[:SAMPLE_ROWS]
    swapped = (codes << 4) | (codes >> 4)
    if (better := sqnr_db(base, swapped, bits, decode_scale)) >= PLAIN_ROUNDING_DB:
        return Fault("nibbles-swapped", path, f"{found}; {better:.1f} dB with the halves of every byte swapped")
    if decode_scale and (better := sqnr_db(base, codes, bits, 1 / decode_scale)) >= PLAIN_ROUNDING_DB:
        return Fault("scale-reciprocal", path, f"{found}; {better:.1f} dB with the reciprocal of the scalar")
    return Fault("differs-from-base", path, found)
