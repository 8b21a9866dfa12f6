"""NVFP4: a weight matrix as 4-bit codes, one 8-bit scale per 16 columns, one 32-bit scale per matrix.

    w[n, k]  =  e2m1(code[n, k]) * e4m3(block_decode_scale[n, k // 16]) * decode_scale

4 + 8/16 = 4.5 bits per weight. The block scale follows the largest weight of its block, so that it lands on 6, the
largest E2M1 value; the matrix scale keeps the block scales inside E4M3, the largest of them at 448. Hence the
constant 2688 = 448 * 6 below.

Which bytes? Any codes and scales that decode well are legal; we write those of compressed-tensors (llm-compressor's
`memoryless_minmax`), so that a file from us and a file from them can be compared with `cmp`. With W's own dtype, `r`
rounding to it and A the largest magnitude of the matrix (or of all matrices that share the scale):

    global_scale = r(r(1/A) * 2688)                  a *divisor*; infinite (A zero or tiny) -> 1
    block        = e4m3(min(global_scale * r(amax_of_block / 6), 448));     zero -> 0.125
    code         = e2m1(W / (block / global_scale))                         fp32, true divisions

Matrices that a serving engine fuses (q/k/v, gate/up) must share one A: vLLM and SGLang keep only one scale of the
fused matrix, so unequal ones give wrong weights there while every other reader is content. `quantize_group` does that.

A code times a block scale has at most 6 significant bits, so `exact_products` is exact in bf16: every kernel starts
from the same weights and applies `decode_scale` after accumulation.

Work is done in chunks of rows, which bounds temporaries to a few MB on CPU, where they stay in cache, and to a few
hundred on a GPU. What this module does not do: choose scales by their error (scale_search.py), swizzled layouts.
fp16 is as compressed-tensors has it: A below 0.041 overflows 2688/A in fp16, the global scale falls back to 1, and
block scales lose precision. Give such weights as bf16 or fp32.

Shape suffixes: N rows (output features), K columns (input features), G = K/16 blocks, K2 = K/2 bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from qerl_compile.errors import FormatError
from qerl_compile.formats import e2m1
from qerl_compile.formats.e2m1 import pack, unpack
from qerl_compile.formats.packed_nvfp4 import BLOCK, PackedNVFP4

__all__ = [
    "BLOCK",
    "PackedNVFP4",
    "check_weight",
    "dequantize",
    "exact_products",
    "pack",
    "quantize",
    "quantize_group",
    "unpack",
]

E4M3_MAX = 448.0
AMAX_SCALED = E4M3_MAX * e2m1.MAX_VALUE  # 2688: where the largest weight lies in units of the decode scale
ZERO_BLOCK_DECODE_SCALE = 0.125  # compressed-tensors' eps for E4M3: byte 0x20
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# 1 MB of fp32 stays in a CPU's second-level cache; a GPU wants few launches instead.
CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 2**18, 2**25


def check_weight(w_NK: Tensor, name: str = "weight") -> None:
    """Refuse what `quantize` would refuse, without quantizing: for callers that must not fail halfway.

    Raises:
        FormatError: wrong rank, dtype or K; NaN or Inf.
    """
    block_amaxes(w_NK, name)


def quantize(w_NK: Tensor, *, amax: Tensor | None = None, name: str = "weight") -> PackedNVFP4:
    """Quantize a weight to the bytes that compressed-tensors would write.

    Args:
        w_NK: bf16, fp16 or fp32 [N, K] on CPU or CUDA, K a multiple of 16. Not modified.
        amax: largest magnitude over all weights that share the global scale, one element; default: that of w_NK.
        name: what errors call the weight.

    Returns:
        codes, block scales and global scale (a divisor) on the weight's device.

    Raises:
        FormatError: wrong rank, dtype or K; NaN or Inf; amax smaller than a weight.
    """
    block_amax_NG = block_amaxes(w_NK, name)
    return _quantize(w_NK, block_amax_NG, block_amax_NG.amax() if amax is None else amax, name)


def quantize_group(weights: Mapping[str, Tensor]) -> dict[str, PackedNVFP4]:
    """Quantize weights that an engine fuses with one shared amax, hence one global scale.

    Args:
        weights: name -> [N, K]; N may differ, dtype may not.

    Returns:
        name -> packed weight, in the same order, all with equal `global_scale`.

    Raises:
        FormatError: as `quantize`; dtypes differ.
    """
    if not weights:
        return {}
    of_blocks, shared = group_amaxes(weights)
    return {name: _quantize(w, of_blocks[name], shared, name) for name, w in weights.items()}


def group_amaxes(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return name -> largest magnitude of every block [N, G], and the largest of all [], in the weights' dtype.

    Raises:
        FormatError: as `quantize`; dtypes differ.
    """
    dtypes = {name: str(w.dtype) for name, w in weights.items()}
    if len(set(dtypes.values())) > 1:
        raise FormatError(
            where=", ".join(dtypes),
            expected="one dtype for all weights that share a global scale",
            got=", ".join(dtypes.values()),
            do="Cast them to one dtype first.",
        )
    of_blocks = {name: block_amaxes(w, name) for name, w in weights.items()}
    return of_blocks, torch.stack([block_amax_NG.amax() for block_amax_NG in of_blocks.values()]).amax()


def dequantize(packed: PackedNVFP4, dtype: torch.dtype) -> Tensor:
    """Decode to a dense weight: fp32 arithmetic, then one rounding to `dtype`.

    Returns:
        `dtype` [N, K].
    """
    w_NK = torch.empty(packed.shape, dtype=dtype, device=packed.codes_NK2.device)
    decode_scale = packed.decode_scale
    for rows in row_chunks(packed.shape, w_NK.device):
        products = _products(packed.codes_NK2[rows], packed.block_decode_scale_NG[rows], torch.float32)
        w_NK[rows] = products.mul_(decode_scale)
    return w_NK


def exact_products(codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """Code times block scale, without the matrix scale: the numbers that kernels multiply with.

    A code has 2 significant bits and an E4M3 scale 4, so the product has at most 6 and lies between 2^-10 and 2688:
    exact in bf16, fp16 and fp32.

    Args:
        codes_NK2: uint8 [N, K/2].
        block_decode_scale_NG: float8_e4m3fn [N, K/16].
        dtype: bf16, fp16 or fp32.

    Returns:
        `dtype` [N, K].
    """
    w_NK = torch.empty(codes_NK2.shape[0], codes_NK2.shape[1] * 2, dtype=dtype, device=codes_NK2.device)
    for rows in row_chunks(w_NK.shape, w_NK.device):
        w_NK[rows] = _products(codes_NK2[rows], block_decode_scale_NG[rows], dtype)
    return w_NK


def _products(codes_NK2: Tensor, block_decode_scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    return e2m1.decode(codes_NK2, dtype).mul_(per_column(block_decode_scale_NG.to(dtype)))


def _quantize(w_NK: Tensor, block_amax_NG: Tensor, amax: Tensor, name: str) -> PackedNVFP4:
    """`quantize` after the checks, with the block maxima at hand."""
    global_scale = _global_scale(w_NK, block_amax_NG, amax, name)
    block_decode_scale_NG = amax_block_scales(block_amax_NG, global_scale)
    return encode_with(w_NK, block_decode_scale_NG, global_scale)


def encode_with(w_NK: Tensor, block_decode_scale_NG: Tensor, global_scale: Tensor) -> PackedNVFP4:
    """Round a weight to the nearest codes under scales that are given, however they were chosen.

    Args:
        w_NK: bf16, fp16 or fp32 [N, K].
        block_decode_scale_NG: float8_e4m3fn [N, G], positive.
        global_scale: float32 [1], a divisor.
    """
    codes_NK2 = torch.empty(w_NK.shape[0], w_NK.shape[1] // 2, dtype=torch.uint8, device=w_NK.device)
    for rows in row_chunks(w_NK.shape, w_NK.device):
        step_NK = per_column(block_decode_scale_NG[rows].float() / global_scale)
        codes_NK2[rows] = pack(e2m1.encode(w_NK[rows].detach() / step_NK))
    return PackedNVFP4(codes_NK2, block_decode_scale_NG, global_scale, "divisor")


def _global_scale(w_NK: Tensor, block_amax_NG: Tensor, amax: Tensor, name: str) -> Tensor:
    """2688 / amax in the weight's own dtype, as fp32 [1]; amax is checked against the weight's own."""
    own = block_amax_NG.amax()
    amax = amax.detach().to(w_NK.device, w_NK.dtype).reshape(())
    if not bool(amax >= own):  # also catches NaN
        raise FormatError(
            where=name,
            expected=f"amax at least as large as the weight's own {own.item():g}",
            got=f"{amax.item():g}",
            do="Pass the maximum over all weights that share the scale.",
        )
    return divisor_of(amax)


def divisor_of(amax: Tensor, scaled: float = AMAX_SCALED) -> Tensor:
    """Return the global scale that puts `amax` at `scaled`: fp32 [1], a divisor, rounded as compressed-tensors does.

    Args:
        amax: a largest magnitude, of a weight or of the inputs of a linear; one element, in the tensor's own dtype.
        scaled: where it shall lie in units of the decode scale: 2688 = 448 * 6 unless room is wanted above.
    """
    amax = amax.clamp(min=torch.finfo(amax.dtype).tiny)
    # torch computes scalar / tensor as reciprocal times scalar, with a rounding after each: part of the contract.
    divisor = (amax.reciprocal() * scaled).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    return divisor.float().reshape(1)


def amax_block_scales(block_amax_NG: Tensor, global_scale: Tensor, lands_on: float = e2m1.MAX_VALUE) -> Tensor:
    """Return the E4M3 scale that puts each block's largest weight on a value of E2M1: float8_e4m3fn [N, G], never zero.

    Args:
        block_amax_NG: largest magnitudes, in the weight's dtype.
        global_scale: float32 [1], a divisor.
        lands_on: that value, 6 or 4.
    """
    # The divisor is a tensor because CUDA replaces division by a Python number with a multiplication.
    landing = torch.full((1,), lands_on, dtype=block_amax_NG.dtype, device=block_amax_NG.device)
    wanted_NG = (block_amax_NG / landing).float() * global_scale
    rounded_NG = wanted_NG.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    return rounded_NG.masked_fill_(rounded_NG == 0, ZERO_BLOCK_DECODE_SCALE).to(torch.float8_e4m3fn)


def block_amaxes(w_NK: Tensor, name: str) -> Tensor:
    """Check the weight and return the largest magnitude of every block: w's dtype, [N, G].

    Raises:
        FormatError: as `quantize`.
    """
    _check_form(w_NK, name)
    n_rows, n_cols = w_NK.shape
    block_amax_NG = torch.empty(n_rows, n_cols // BLOCK, dtype=w_NK.dtype, device=w_NK.device)
    # Magnitudes of IEEE numbers order like their bits, Inf above all numbers and NaN above Inf, and integer
    # maxima are 3x faster than bf16 ones on CPU.
    word = torch.int16 if w_NK.dtype.itemsize == 2 else torch.int32
    magnitude_bits = torch.iinfo(word).max
    for rows in row_chunks(w_NK.shape, w_NK.device):
        bits = w_NK[rows].detach().view(word) & magnitude_bits
        block_amax_NG[rows] = bits.reshape(-1, n_cols // BLOCK, BLOCK).amax(-1).view(w_NK.dtype)
    if not bool(block_amax_NG.amax().isfinite()):
        bad = torch.nonzero(~w_NK.isfinite())
        row, col = bad[0].tolist()
        raise FormatError(
            where=name,
            expected="finite weights",
            got=f"{len(bad)} NaN or Inf, the first is {w_NK[row, col].item()} at row {row}, column {col}",
            do="Repair the checkpoint; a NaN would spread to its whole block.",
        )
    return block_amax_NG


def _check_form(w_NK: Tensor, name: str) -> None:
    def refuse(expected: str, got: str, do: str) -> NoReturn:
        raise FormatError(where=name, expected=expected, got=got, do=do)

    if w_NK.dtype not in WEIGHT_DTYPES:
        refuse("a bfloat16, float16 or float32 weight", str(w_NK.dtype), "Cast it, or leave this layer unquantized.")
    if w_NK.ndim != 2 or w_NK.numel() == 0:
        refuse("a non-empty matrix [N, K]", f"shape {list(w_NK.shape)}", "Only weights of linear layers can be NVFP4.")
    if w_NK.shape[1] % BLOCK:
        refuse(f"K (input features) a multiple of {BLOCK}", f"K = {w_NK.shape[1]}", "Leave this layer unquantized.")


def per_column(block_NG: Tensor) -> Tensor:
    """Repeat each block's number for its 16 columns: [N, G] -> [N, K]."""
    n_rows, n_blocks = block_NG.shape
    return block_NG[:, :, None].expand(n_rows, n_blocks, BLOCK).reshape(n_rows, n_blocks * BLOCK)


def row_chunks(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """Yield slices of rows whose fp32 temporaries are small on the device; see the module's essay."""
    n_rows, n_cols = shape
    step = max(1, (CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS) // n_cols)
    for start in range(0, n_rows, step):
        yield slice(start, start + step)
