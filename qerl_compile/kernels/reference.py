"""The operators in the fewest words: exact products, one matmul, one multiplication.

This is the meaning that every other kernel is tested against and what runs on a device that has no kernel of its own.
Half-precision activations are computed in float32: the sum is then rounded to the activation's dtype once, after
`decode_scale`, and a float16 sum of undecoded products (each up to 2688 · x) cannot overflow. It is slow on purpose:
a full float32 weight per call.
"""

import torch
from torch import Tensor

from qerl_compile.formats import nvfp4


def quantized_linear(x: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """y [..., N] = (x [..., K] · Pᵀ) · decode_scale, in x's dtype."""
    products_NK = _wide_products(codes_NK2, block_decode_scale_NG, x.dtype)
    return ((x.to(products_NK.dtype) @ products_NK.T) * decode_scale).to(x.dtype)


def quantized_linear_dx(dy: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """dx [..., K] = (dy [..., N] · P) · decode_scale, in dy's dtype."""
    products_NK = _wide_products(codes_NK2, block_decode_scale_NG, dy.dtype)
    return ((dy.to(products_NK.dtype) @ products_NK) * decode_scale).to(dy.dtype)


def dequantize(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """w [N, K] = P · decode_scale, rounded once to `dtype`."""
    return (_wide_products(codes_NK2, block_decode_scale_NG, dtype) * decode_scale).to(dtype)


def _wide_products(codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """P in float64 for float64 and in float32, where it is just as exact, for everything narrower."""
    products_NK = nvfp4.exact_products(codes_NK2, block_decode_scale_NG, torch.float32)
    return products_NK.to(torch.float64) if dtype == torch.float64 else products_NK
