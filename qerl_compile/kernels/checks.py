"""What the operators demand of their arguments, said before any work starts.

Each check is one chain of comparisons that costs under two microseconds when all is well; the sentence is only built
when something is wrong. The same functions run under FakeTensorMode: they look at dtype, shape and device, never at
data, and they never compare a batch size, so a symbolic batch gets no guard from them. Dynamo turns an exception
raised while tracing into one of its own; the located sentence then stands inside it.
"""

import torch
from torch import Tensor

from qerl_compile.errors import FormatError
from qerl_compile.formats.nvfp4 import BLOCK, WEIGHT_DTYPES

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def check_packed(where: str, codes_NK2: Tensor, block_decode_scale_NG: Tensor, decode_scale: Tensor) -> None:
    """Refuse packed tensors that do not describe one [N, K] matrix.

    Args:
        where: operator name for the message.
        codes_NK2: must be uint8 [N, K/2] with K a multiple of 16.
        block_decode_scale_NG: must be float8_e4m3fn [N, K/16].
        decode_scale: must be float32, 0-dim or [1].

    Raises:
        FormatError: naming the first tensor that does not fit.
    """
    if codes_NK2.dtype != torch.uint8 or codes_NK2.dim() != 2 or codes_NK2.shape[1] % (BLOCK // 2) != 0:
        raise FormatError(
            where=where,
            expected="codes_NK2 uint8 [N, K/2] with K a multiple of 16",
            got=describe(codes_NK2),
            do="Pass the codes as formats.nvfp4.quantize packs them.",
        )
    n, k2 = codes_NK2.shape
    if (
        block_decode_scale_NG.dtype != torch.float8_e4m3fn
        or block_decode_scale_NG.dim() != 2
        or block_decode_scale_NG.shape[0] != n
        or block_decode_scale_NG.shape[1] != k2 // (BLOCK // 2)
    ):
        raise FormatError(
            where=where,
            expected=f"block_decode_scale_NG float8_e4m3fn [{n}, {k2 // (BLOCK // 2)}] for codes [{n}, {k2}]",
            got=describe(block_decode_scale_NG),
            do="Pass the block scales that belong to these codes, not viewed as uint8 and not swizzled.",
        )
    if decode_scale.dtype != torch.float32 or decode_scale.dim() > 1 or decode_scale.numel() != 1:
        raise FormatError(
            where=where,
            expected="decode_scale float32, 0-dim or [1]",
            got=describe(decode_scale),
            do="Pass PackedNVFP4.decode_scale (the multiplier, not the divisor that checkpoints store).",
        )
    if codes_NK2.device != block_decode_scale_NG.device or codes_NK2.device != decode_scale.device:
        raise FormatError(
            where=where,
            expected=f"all packed tensors on {codes_NK2.device}",
            got=f"block scales on {block_decode_scale_NG.device}, decode_scale on {decode_scale.device}",
            do="Move the packed tensors to one device.",
        )


def check_activation(where: str, name: str, x: Tensor, weight: Tensor, features: int) -> None:
    """Refuse an activation that the matrix cannot be multiplied with.

    Args:
        where: operator name for the message.
        name: what the operator calls this argument.
        x: must be floating point, [..., features], on the device of `weight`.
        weight: codes or weight matrix, for its device.
        features: extent that the last dimension must have.

    Raises:
        FormatError: with the dtype, shape or device found.
    """
    if x.dtype not in ACTIVATION_DTYPES:
        raise FormatError(
            where=where,
            expected=f"{name} in float16, bfloat16, float32 or float64",
            got=describe(x),
            do=f"Cast {name} first.",
        )
    if x.dim() == 0 or x.shape[-1] != features:
        raise FormatError(
            where=where,
            expected=f"{name} [..., {features}]",
            got=describe(x),
            do=f"Check which layer's weight met this {name}.",
        )
    if x.device != weight.device:
        raise FormatError(
            where=where,
            expected=f"{name} on {weight.device}, where the weight is",
            got=f"{name} on {x.device}",
            do=f"Move {name}; packed weights stay where they were loaded.",
        )


def check_dtype(where: str, dtype: torch.dtype) -> None:
    """Refuse an output dtype that cannot hold the products exactly.

    Args:
        where: operator name for the message.
        dtype: must be float16, bfloat16, float32 or float64.

    Raises:
        FormatError: with the dtype found.
    """
    if dtype not in ACTIVATION_DTYPES:
        raise FormatError(
            where=where,
            expected="dtype float16, bfloat16, float32 or float64",
            got=str(dtype).removeprefix("torch."),
            do="Dequantize to one of these and cast the result.",
        )


def check_weight(where: str, w_NK: Tensor) -> None:
    """Refuse a weight that has no NVFP4 form.

    Args:
        where: operator name for the message.
        w_NK: must be float16, bfloat16 or float32, [N, K] with K a multiple of 16.

    Raises:
        FormatError: with the dtype or shape found.
    """
    if w_NK.dtype not in WEIGHT_DTYPES or w_NK.dim() != 2 or w_NK.shape[1] % BLOCK != 0:
        raise FormatError(
            where=where,
            expected="w_NK float16, bfloat16 or float32 [N, K] with K a multiple of 16",
            got=describe(w_NK),
            do="Leave this layer out of the quantize rules, or pad its input features.",
        )


def describe(tensor: Tensor) -> str:
    """`float32 [3, 5]`: what an error message shows of a tensor."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
