"""The operators' CPU form: which of three ways a call takes.

    few rows (M <= 64)    C++ reads the packed bytes and writes y; no weight is ever decoded to memory
    many rows             C++ decodes a piece of P, torch multiplies, the piece is freed, the next one follows
    no compiler           the pieces come from cpu_products.py

Exactness. P is exact in bf16 and float32, and `decode_scale` multiplies the float32 sum: in C++, or as `alpha` of
addmm, which oneDNN applies before its one rounding to bf16. (Multiplying y afterwards rounds twice; scaling x first
rounds every x.) float16 is computed in float32: undecoded sums exceed its range, and no CPU here multiplies it
natively.

Memory. A piece has at most PIECE_ELEMENTS products: 8 MiB in bf16, whatever the weight; larger ones were slower
too. y is cut along N and dx along K, so that each piece is finished in one product and nothing is accumulated in bf16
between pieces.

Determinism. Equal calls give equal bits. A row of x gives equal y in any batch of at most 64 rows; above that oneDNN
chooses its own order of summation for each shape, so M = 64 and M = 65 differ in the last bit.

Shape legend: M activation rows, N output features, K input features, K2 = K/2 bytes, G = K/16 blocks.
"""

import functools

import torch
from torch import Tensor

from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.kernels import cpu_native, ops, weight_cache
from qerl_compile.kernels.checks import check_activation, check_dtype, check_packed
from qerl_compile.kernels.cpu_products import write_products

# Measured on Zen 4: at 64 rows bf16 is as fast either way, float32 is 20 % faster here; see docs/cpu_kernels.md.
FEW_ROWS = 64
PIECE_ELEMENTS = 2**22

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
    n, k = codes_NK2.shape[0], codes_NK2.shape[1] * 2
    check_activation("qerl::quantized_linear", "x", x, codes_NK2, k)
    native = cpu_native.load()
    x_MK, alpha = x.reshape(-1, k), decode_scale.item()
    if native is not None and x_MK.shape[0] <= FEW_ROWS and x.dtype != torch.float64:
        dtype = x.dtype if x.dtype in native.linear_dtypes else torch.float32
        y_MN = native.linear(x_MK.to(dtype), codes_NK2, block_decode_scale_NG, alpha)
    else:
        dtype = _COMPUTE_DTYPE[x.dtype]
        x_MK, y_MN = x_MK.to(dtype), torch.empty(x_MK.shape[0], n, dtype=dtype)
        step = _extent_of_a_piece(k, 1)
        if step >= n or weight_cache.active() is not None:
            _multiply(x_MK, _products(codes_NK2, block_decode_scale_NG, dtype).T, alpha, y_MN)
        else:
            for start in range(0, n, step):
                rows = slice(start, start + step)
                piece = _decode(codes_NK2[rows], block_decode_scale_NG[rows], dtype)
                _multiply(x_MK, piece.T, alpha, y_MN[:, rows])
                del piece  # before the next one is made
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
    step = _extent_of_a_piece(n, BLOCK)
    if step >= k or weight_cache.active() is not None:
        _multiply(dy_MN, _products(codes_NK2, block_decode_scale_NG, dtype), alpha, dx_MK)
    else:
        for start in range(0, k, step):
            stop = min(start + step, k)
            codes, blocks = slice(start // 2, stop // 2), slice(start // BLOCK, stop // BLOCK)
            piece = _decode(codes_NK2[:, codes], block_decode_scale_NG[:, blocks], dtype)
            _multiply(dy_MN, piece, alpha, dx_MK[:, start:stop])
            del piece  # before the next one is made
    return dx_MK.to(dy.dtype).view(*dy.shape[:-1], k)


@ops.dequantize.register_kernel("cpu")
def dequantize(codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """CPU form of `qerl::dequantize`; arguments, result and errors as there."""
    check_packed("qerl::dequantize", codes_NK2, block_decode_scale_NG, decode_scale)
    check_dtype("qerl::dequantize", dtype)
    n, k = codes_NK2.shape[0], codes_NK2.shape[1] * 2
    w_NK = torch.empty(n, k, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    step = _extent_of_a_piece(k, 1)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        w_NK[rows] = _decode(codes_NK2[rows], block_decode_scale_NG[rows], wide).mul_(decode_scale)
    return w_NK


def _extent_of_a_piece(across: int, unit: int) -> int:
    """How far to go along one axis of P, in multiples of `unit`, so that a piece has at most PIECE_ELEMENTS."""
    return max(1, PIECE_ELEMENTS // (across * unit)) * unit


def _multiply(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> None:
    """out = (a · b) · alpha, rounded once; what `out` holds before is not read."""
    torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _products(codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of P [N, K], from the cache if that is on."""
    if (cache := weight_cache.active()) is None:
        return _decode(codes_NK2, block_decode_scale_NG, dtype)
    decode = functools.partial(_decode, codes_NK2, block_decode_scale_NG, dtype)
    return cache.get(codes_NK2, block_decode_scale_NG, dtype, decode)


def _decode(codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """P [N, K] by the fastest means there is."""
    native = cpu_native.load()
    exact = torch.float32 if dtype == torch.float64 and native is not None else dtype
    products_NK = torch.empty(codes_NK2.shape[0], codes_NK2.shape[1] * 2, dtype=exact)
    write = write_products if native is None else native.products
    write(codes_NK2, block_decode_scale_NG, products_NK)
    return products_NK.to(dtype)
