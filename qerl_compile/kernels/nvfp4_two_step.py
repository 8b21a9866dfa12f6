"""Many tokens: dequantize once into scratch, multiply with cuBLAS, forward and backward alike.

Above about a thousand tokens the arithmetic is all that counts (the ridge is at 184 tokens), and one pass of
2.56 bytes per weight costs less than any in-loop decoding: at most 81 % of bfloat16 at 1024 tokens, 95 % at 4096. The
scratch is shared by all layers (nvfp4_workspace.py) and keeps the last weight, so recompute and backward of a
checkpointed layer share one pass where they meet.

Here, and only here, decode_scale is in the weight (rounded to bfloat16) and not applied after the sum: cuBLAS has no
place for it that does not cost a second pass over the output.
"""

import torch
from torch import Tensor

from qerl_compile.kernels.nvfp4_arithmetic import STANDARD
from qerl_compile.kernels.nvfp4_dequantize import dequantize_into
from qerl_compile.kernels.nvfp4_workspace import dense_weight, turn


def linear(
    x_MK: Tensor, codes_NK2: Tensor, block_NG: Tensor, decode_scale: Tensor, *, layout: int = STANDARD
) -> Tensor:
    """y [M, N] = x [M, K] · wᵀ in bfloat16."""
    with turn(x_MK.device):
        return torch.mm(x_MK, _weight(codes_NK2, block_NG, decode_scale, layout).T)


def linear_dx(
    dy_MN: Tensor, codes_NK2: Tensor, block_NG: Tensor, decode_scale: Tensor, *, layout: int = STANDARD
) -> Tensor:
    """dx [M, K] = dy [M, N] · w in bfloat16."""
    with turn(dy_MN.device):
        return torch.mm(dy_MN, _weight(codes_NK2, block_NG, decode_scale, layout))


def _weight(codes_NK2: Tensor, block_NG: Tensor, decode_scale: Tensor, layout: int) -> Tensor:
    def fill(w_NK: Tensor) -> None:
        dequantize_into(w_NK, codes_NK2, block_NG, decode_scale, layout=layout)

    return dense_weight(codes_NK2, decode_scale, fill)
