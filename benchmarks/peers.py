"""The competitors of benchmarks/kernels.py: each makes copies of a dense weight in its own form.

    bf16           torch.mm, which is cuBLAS, on the dense weight
    ours           qerl_compile.kernels.cuda, dispatched as the operators are
    humming        humming-kernels 0.1.19, our codes and scales in its own layout; forward only
    bitsandbytes   0.50, NF4 in blocks of 64; its backward dequantizes and multiplies, as its autograd function does
    torchao        0.18, NVFP4WeightOnlyConfig: dequantizes in eager mode at every call, milliseconds; forward only

Copies are distinct memory for every competitor, bf16 too: a graph that walks over them finds no weight in L2, as a
model's step does. What is not NVFP4 (bf16, NF4) or quantizes by itself (torchao) has another error against our exact
product, not a worse kernel.

Legend: M tokens, N output features, K input features, R rank of a LoRA branch.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qerl_compile.kernels import cuda, nvfp4_two_step, nvfp4_workspace, ops

SLOW = ("torchao",)  # milliseconds a call: few cells, few rounds, one copy


@dataclass(frozen=True)
class Linear:
    """One copy of a weight; None where the competitor has no such operation."""

    forward: Callable[[Tensor], Tensor]  # x_MK -> y_MN
    dx: Callable[[Tensor], Tensor] | None = None  # dy_MN -> dx_MK, with nothing left from a forward
    pair: Callable[[Tensor, Tensor], Tensor] | None = None  # x_MK, dy_MN -> dx_MK: recompute, then backward
    lora: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # x_MK, h_MR, B_NR -> y_MN
    held_dx: Callable[[Tensor], Tensor] | None = None  # dx from a weight that was dequantized before
    held_pair: Callable[[Tensor, Tensor], Tensor] | None = None  # both products from one dequantized weight


def bf16(w_NK: Tensor) -> Linear:
    return Linear(
        forward=lambda x: torch.mm(x, w_NK.T),
        dx=lambda dy: torch.mm(dy, w_NK),
        pair=lambda x, dy: (torch.mm(x, w_NK.T), torch.mm(dy, w_NK))[1],
        lora=lambda x, h, lora_B: torch.mm(x, w_NK.T).addmm_(h, lora_B.T),
    )


def bf16_copies(w_NK: Tensor, count: int) -> list[Linear]:
    return [bf16(w_NK.clone()) for _ in range(count)]


def ours(codes: Tensor, block: Tensor, decode_scale: Tensor) -> Linear:
    """Our operations; each forgets the dequantized weight first, which repetitions would find and a model would not."""

    def forward(x: Tensor, h: Tensor | None = None, lora_B: Tensor | None = None) -> Tensor:
        nvfp4_workspace.forget()
        return cuda.linear(x, codes, block, decode_scale, h, lora_B)

    def dx(dy: Tensor) -> Tensor:
        nvfp4_workspace.forget()
        return cuda.linear_dx(dy, codes, block, decode_scale)

    def pair(x: Tensor, dy: Tensor) -> Tensor:
        forward(x)
        return cuda.linear_dx(dy, codes, block, decode_scale)

    def held_pair(x: Tensor, dy: Tensor) -> Tensor:
        nvfp4_workspace.forget()
        nvfp4_two_step.linear(x, codes, block, decode_scale)
        return nvfp4_two_step.linear_dx(dy, codes, block, decode_scale)

    return Linear(
        forward=forward,
        dx=dx,
        pair=pair,
        lora=forward,
        held_dx=lambda dy: nvfp4_two_step.linear_dx(dy, codes, block, decode_scale),
        held_pair=held_pair,
    )


def our_copies(w_NK: Tensor, count: int) -> list[Linear]:
    codes, block, global_scale = ops.quantize(w_NK)
    return [ours(codes.clone(), block.clone(), global_scale.reciprocal()) for _ in range(count)]


def humming_copies(w_NK: Tensor, count: int) -> list[Linear]:
    from humming.layer import HummingLayer

    codes, block, global_scale = ops.quantize(w_NK)
    layer = HummingLayer(
        shape_n=w_NK.shape[0],
        shape_k=w_NK.shape[1],
        weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_tensors({"weight": codes, "weight_scale": block, "weight_scale_2": global_scale.reciprocal()})
    layer.transform()

    def linear(layer: torch.nn.Module) -> Linear:
        return Linear(forward=lambda x: layer(x), lora=lambda x, h, lora_B: layer(x).addmm_(h, lora_B.T))

    return [linear(layer), *(linear(copy.deepcopy(layer)) for _ in range(count - 1))]


def bitsandbytes(w_NK: Tensor) -> Linear:
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    packed, state = functional.quantize_4bit(w_NK, blocksize=64, quant_type="nf4")

    def forward(x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x, packed.t(), quant_state=state)

    def dx(dy: Tensor) -> Tensor:
        return dy @ functional.dequantize_4bit(packed, state)

    return Linear(forward=forward, dx=dx, pair=lambda x, dy: (forward(x), dx(dy))[1])


def bitsandbytes_copies(w_NK: Tensor, count: int) -> list[Linear]:
    return [bitsandbytes(w_NK) for _ in range(count)]


def torchao_copies(w_NK: Tensor, _count: int) -> list[Linear]:
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(w_NK.shape[1], w_NK.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    linear.weight.data.copy_(w_NK)
    model = torch.nn.Sequential(linear)
    quantize_(model, NVFP4WeightOnlyConfig())
    return [Linear(forward=lambda x: model(x))]


COLUMNS: dict[str, Callable[[Tensor, int], list[Linear]]] = {
    "bf16": bf16_copies,
    "ours": our_copies,
    "humming": humming_copies,
    "bitsandbytes": bitsandbytes_copies,
    "torchao": torchao_copies,
}
