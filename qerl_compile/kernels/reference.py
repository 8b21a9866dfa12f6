"""The operators in the fewest words: exact products, one matmul, one multiplication.

This is the meaning that every other kernel is tested against and what runs on a device that has no kernel of its own. Half-precision
activations are computed in float32: the sum is then rounded to the activation's dtype once, after `decode_scale`, and a
float16 sum of undecoded products (each up to 2688 · x) cannot overflow. It is slow on purpose: a full float32 weight per call.
"""

import torch
from torch import Tensor

from qerl_compile.formats import nvfp4


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantized_linear(x: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """y [..., N] = (x [..., K] · Pᵀ) · decode_scale, in x's dtype."""
    wide = compute_dtype(x.dtype)
    products_NK = nvfp4.exact_products(codes_NK2, block_decode_scale_NG, wide)
    return ((x.to(wide) @ products_NK.T) * decode_scale.to(wide)).to(x.dtype)


def quantized_linear_dx(dy: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """dx [..., K] = (dy [..., N] · P) · decode_scale, in dy's dtype."""
    wide = compute_dtype(dy.dtype)
    products_NK = nvfp4.exact_products(codes_NK2, block_decode_scale_NG, wide)
    return ((dy.to(wide) @ products_NK) * decode_scale.to(wide)).to(dy.dtype)


def dequantize(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """w [N, K] = P · decode_scale, rounded once to `dtype`."""
    wide = compute_dtype(dtype)
    products_NK = nvfp4.exact_products(codes_NK2, block_decode_scale_NG, wide)
    return (products_NK * decode_scale.to(wide)).to(dtype)
