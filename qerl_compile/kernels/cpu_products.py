"""P = e2m1(code) · e4m3(block) in torch operators only, for machines without a C++ compiler.

A byte of codes and a byte of block scale have 2^16 combinations, and each stands for two bf16 products, one 32-bit
word: a table of 256 KiB of which an ordinary weight touches half, small enough for a second-level cache. So decoding
is one index computation and one `index_select`, 1.8 times as fast as decoding the codes and multiplying by the
repeated scale: in ATen repeating a scale sixteen times costs more than the multiplication. Indices are int32; int64
would double the traffic.

It is still ten times slower than cpu_native.cpp. What was tried and was slower stands in docs/cpu_kernels.md.

Shape legend: N output features, K input features, K2 = K/2 bytes, G = K/16 blocks.
"""

import functools

import torch
from torch import Tensor

from qerl_compile.formats import e2m1

BLOCK_BYTES = 8  # 16 codes


@functools.cache
def product_pairs() -> Tensor:
    """int32 [65536]: at scale_byte · 256 + code_byte, the two bf16 products of a code byte, the even column low."""
    block_decode_scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = e2m1.decode(torch.arange(256, dtype=torch.uint8)[:, None], torch.float32)  # [256, 2]
    return (block_decode_scale[:, None, None] * values).to(torch.bfloat16).view(torch.int32).flatten()


def write_products(codes_NK2: Tensor, block_decode_scale_NG: Tensor, out_NK: Tensor) -> None:
    """Write P, exact in every dtype that `out_NK` may have.

    Args:
        codes_NK2: uint8 [N, K/2], any strides.
        block_decode_scale_NG: float8_e4m3fn [N, K/16], any strides.
        out_NK: bfloat16, float32 or float64 [N, K], contiguous; every element is overwritten.
    """
    index = codes_NK2.to(torch.int32, memory_format=torch.contiguous_format).view(-1, BLOCK_BYTES)
    scale_byte = block_decode_scale_NG.view(torch.uint8).to(torch.int32).reshape(-1, 1)
    index.add_(scale_byte, alpha=256)
    if out_NK.dtype == torch.bfloat16:
        torch.index_select(product_pairs(), 0, index.view(-1), out=out_NK.view(torch.int32).view(-1))
    else:
        pairs = product_pairs().index_select(0, index.view(-1))
        out_NK.copy_(pairs.view(torch.bfloat16).view(out_NK.shape))
