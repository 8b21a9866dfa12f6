"""The operators' CPU form: which of three ways a call takes.

    few rows (M <= 48)    C++ reads the packed bytes and writes y; no weight is ever decoded to memory
    many rows             C++ decodes a piece of P into a scratch buffer, torch multiplies, the next piece follows
    no compiler           the pieces come from cpu_products.py

Exactness. P is exact in bf16 and float32, and `decode_scale` multiplies the float32 sum: in C++, or as `alpha` of
addmm, which oneDNN applies before its one rounding to bf16. (Multiplying y afterwards rounds twice; scaling x first
rounds every x.) float16 is computed in float32: undecoded sums exceed its range, and no CPU here multiplies it
natively.

Memory. The scratch holds at most SCRATCH_ELEMENTS products: 8 MiB in bf16, whatever the weight. y is cut along N and
dx along K, so that each piece is finished in one product and nothing is accumulated in bf16 between pieces.

Determinism. Equal calls give equal bits. A row of x gives equal y in any batch of at most 48 rows; above that oneDNN
chooses its own order of summation for each shape, so M = 48 and M = 49 differ in the last bit.

Shape legend: M activation rows, N output features, K input features, K2 = K/2 bytes, G = K/16 blocks.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.kernels import cpu_native, ops, weight_cache
from qerl_compile.kernels.checks import check_activation, check_dtype, check_packed
from qerl_compile.kernels.cpu_products import write_products

# Measured crossover on Zen 4, bf16 and float32, one and two threads: between 48 and 96 rows the two are equal.
FEW_ROWS = 48
SCRATCH_ELEMENTS = 2**22

_COMPUTE_DTYPE = {
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@ops.quantized_linear.register_kernel("cpu")
def linear(x: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """CPU form of `qerl::quantized_linear`; arguments, result and errors as there."""
    check_packed("qerl::quantized_linear", codes_NK2, block_decode_scale_NG, decode_scale)
    k = codes_NK2.shape[1] * 2
    check_activation("qerl::quantized_linear", "x", x, codes_NK2, k)
    n = codes_NK2.shape[0]
    native = cpu_native.load()
    x_MK = x.reshape(-1, k)
    if native is not None and x_MK.shape[0] <= FEW_ROWS and x.dtype != torch.float64:
        dtype = x.dtype if x.dtype in native.linear_dtypes else torch.float32
        y_MN = native.linear(x_MK.to(dtype), codes_NK2, block_decode_scale_NG, decode_scale.item())
    else:
        dtype = _COMPUTE_DTYPE[x.dtype]
        x_MK, alpha = x_MK.to(dtype), decode_scale.item()
        y_MN = torch.empty(x_MK.shape[0], n, dtype=dtype)
        for rows, products in _pieces(codes_NK2, block_decode_scale_NG, dtype, along="n"):
            torch.addmm(y_MN[:, rows], x_MK, products.T, beta=0, alpha=alpha, out=y_MN[:, rows])
    return y_MN.to(x.dtype).view(*x.shape[:-1], n)


@ops.quantized_linear_dx.register_kernel("cpu")
def linear_dx(dy: Tensor, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> Tensor:
    """CPU form of `qerl::quantized_linear_dx`; arguments, result and errors as there."""
    check_packed("qerl::quantized_linear_dx", codes_NK2, block_decode_scale_NG, decode_scale)
    n, k = codes_NK2.shape[0], codes_NK2.shape[1] * 2
    check_activation("qerl::quantized_linear_dx", "dy", dy, codes_NK2, n)
    dtype = _COMPUTE_DTYPE[dy.dtype]
    dy_MN, alpha = dy.reshape(-1, n).to(dtype), decode_scale.item()
    dx_MK = torch.empty(dy_MN.shape[0], k, dtype=dtype)
    for columns, products in _pieces(codes_NK2, block_decode_scale_NG, dtype, along="k"):
        torch.addmm(dx_MK[:, columns], dy_MN, products, beta=0, alpha=alpha, out=dx_MK[:, columns])
    return dx_MK.to(dy.dtype).view(*dy.shape[:-1], k)


@ops.dequantize.register_kernel("cpu")
def dequantize(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """CPU form of `qerl::dequantize`; arguments, result and errors as there."""
    check_packed("qerl::dequantize", codes_NK2, block_decode_scale_NG, decode_scale)
    check_dtype("qerl::dequantize", dtype)
    w_NK = torch.empty(codes_NK2.shape[0], codes_NK2.shape[1] * 2, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, products in _pieces(codes_NK2, block_decode_scale_NG, wide, along="n"):
        w_NK[rows] = products * decode_scale
    return w_NK


def _pieces(
    codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype, along: Literal["n", "k"]
) -> Iterator[tuple[slice, Tensor]]:
    """Cut P along one axis; each piece is valid until the next is asked for. With the cache on, P is one piece."""
    n, k = codes_NK2.shape[0], codes_NK2.shape[1] * 2
    extent, across, unit = (n, k, 1) if along == "n" else (k, n, BLOCK)
    if (cache := weight_cache.active()) is not None:
        yield slice(0, extent), _cached(cache, codes_NK2, block_decode_scale_NG, dtype)
        return
    step = min(extent, max(1, SCRATCH_ELEMENTS // (across * unit)) * unit)
    scratch = torch.empty(step * across, dtype=dtype)
    for start in range(0, extent, step):
        stop = min(start + step, extent)
        if along == "n":
            codes, blocks = codes_NK2[start:stop], block_decode_scale_NG[start:stop]
        else:
            codes = codes_NK2[:, start // 2 : stop // 2]
            blocks = block_decode_scale_NG[:, start // BLOCK : stop // BLOCK]
        piece = scratch[: (stop - start) * across].view(codes.shape[0], -1)
        _write_products(codes, blocks, piece)
        yield slice(start, stop), piece


def _cached(
    cache: weight_cache.WeightCache, codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype
) -> Tensor:
    def decode() -> Tensor:
        products_NK = torch.empty(codes_NK2.shape[0], codes_NK2.shape[1] * 2, dtype=dtype)
        _write_products(codes_NK2, block_decode_scale_NG, products_NK)
        return products_NK

    return cache.get(codes_NK2, block_decode_scale_NG, dtype, decode)


def _write_products(codes_NK2: Tensor, block_decode_scale_NG: Tensor, out_NK: Tensor) -> None:
    native = cpu_native.load()
    if native is None:
        write_products(codes_NK2, block_decode_scale_NG, out_NK)
    elif out_NK.dtype == torch.float64:
        narrow_NK = torch.empty_like(out_NK, dtype=torch.float32)
        native.products(codes_NK2, block_decode_scale_NG, narrow_NK)
        out_NK.copy_(narrow_NK)
    else:
        native.products(codes_NK2, block_decode_scale_NG, out_NK)
