"""Attention as a GPU's fused kernels see it, for graphs that are looked at and never run.

    attention(q, k, v, bias)                 → out [B, H, S, D], logsumexp float32 [B, H, S]
    attention_backward(dout, q, k, v, …)     → dq, dk, dv, and a workspace float32 [B, H, S, D] that dies at once

On the meta device torch decomposes `scaled_dot_product_attention` into matrices of scores [B, H, S, S], which no GPU
run holds: flash and memory-efficient kernels keep q, k, v, the output and one number per row for backward, and add up
dq in float32 (FlashAttention-2, arXiv 2307.08691, algorithm 2). These two operators have shapes and a derivative and
nothing else; a layer's graph that holds them in place of torch's saves what a run on a GPU saves.

Neither updates nor prefills pass a mask. A layer that makes one for itself (a sliding window) may: a boolean one
becomes an additive bias in the dtype of q, as in torch's own dispatch, and is counted.

Shapes: B rows, H query heads, J kv heads, S queries, T keys, D head size.
"""

from typing import Any

import torch
from torch import Tensor

torch.library.define("qerl_footprint::attention", "(Tensor q, Tensor k, Tensor v, Tensor? bias) -> (Tensor, Tensor)")
torch.library.define(
    "qerl_footprint::attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("qerl_footprint::attention")
def _(q_BHSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q_BHSD.shape
    # The kernels lay their result out as [B, S, H, D], so that what follows is a view.
    out_BSHD = q_BHSD.new_empty(batch, queries, heads, v_BJTD.shape[-1])
    return out_BSHD.transpose(1, 2), q_BHSD.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.register_fake("qerl_footprint::attention_backward")
def _(
    dout: Tensor, q_BHSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    workspace_BHSD = torch.empty_like(q_BHSD, dtype=torch.float32)
    return torch.empty_like(q_BHSD), torch.empty_like(k_BJTD), torch.empty_like(v_BJTD), workspace_BHSD


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(q, k, v, *output, *([bias] if bias is not None else []))


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, out, lse, *bias = ctx.saved_tensors
    given = bias[0] if ctx.with_bias else None
    dq, dk, dv, _ = torch.ops.qerl_footprint.attention_backward(dout, q, k, v, given, out, lse)
    return dq, dk, dv, None


torch.library.register_autograd("qerl_footprint::attention", _backward, setup_context=_save)


def planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What a graph calls in place of `scaled_dot_product_attention`; arguments are those of torch's.

    Returns:
        [B, H, S, D] in the dtype of `query`.
    """
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    return torch.ops.qerl_footprint.attention(query, key, value, bias)[0]
