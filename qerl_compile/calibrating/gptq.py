"""GPTQ on NVFP4: columns are rounded one by one, and those still to come make up for the error.

GPTQ (Frantar et al., arXiv 2210.17323) minimizes ‖(W - Q) X‖² for Q on a grid. With H = X Xᵀ and U the upper Cholesky
factor of H⁻¹ (H⁻¹ = Uᵀ U), column j in order is

    q_j  =  s_j · e2m1(w_j / s_j)          e = (w_j - q_j) / U_jj          w_k -= e · U_jk   for all k > j

What is NVFP4's own: the grid of a column is fixed before, matrix scale and block scales alike, by whichever method
the recipe names (formats/scale_search.py) on the weight as it came. So columns need not be taken in the order in
which they lie: the most excited inputs come first (largest H_jj), while most columns can still make up for them, and
codes go back to their places; serving engines see no permutation. Members of a group (q/k/v, gate/up) share H, and
are rows of one matrix here.

Updates are delayed within 128 columns, as in the paper. H gets 1 % of its mean diagonal added to its diagonal, and
ten times that if Cholesky fails. An input that was always zero has no say: its column is rounded to nearest and
disturbs none.

With a mask (2:4 sparsity), masked weights are rounded to zero whatever they are, and their whole value is an error that
later columns make up for: SparseGPT's update (arXiv 2301.00774) with a mask that is fixed before.

What this module does not do: choose scales anew as columns change, which costs a search per block and gains little with
blocks of 16; nor take the layer's linears in turn: all of a layer are rounded on the inputs of the dense layer.

Shape suffixes: N rows, K columns, K2 = K/2 bytes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qerl_compile.calibrating.statistics import FLOOR
from qerl_compile.formats import e2m1
from qerl_compile.formats.nvfp4 import PackedNVFP4, pack, per_column

COLUMNS_AT_ONCE = 128


def gptq_group(
    weights: Mapping[str, Tensor],
    scaled: Mapping[str, PackedNVFP4],
    hessian_KK: Tensor,
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, PackedNVFP4]:
    """Round the weights of one group with error feedback, under the scales of `scaled`.

    Args:
        weights: name → float [N, K], on one device.
        scaled: name → a packed form whose scales are kept and whose codes are replaced.
        hessian_KK: Σ x xᵀ of their common input, float32 [K, K].
        kept: name → bool [N, K], False where the weight must become zero.

    Returns:
        name → packed weight with the same scales.
    """
    steps = {name: per_column(p.block_decode_scale_NG.float() * p.decode_scale) for name, p in scaled.items()}
    w_NK = torch.cat([weights[name].detach().float() for name in scaled])
    mask_NK = None if kept is None else torch.cat([kept[name] for name in scaled])
    order = hessian_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = _inverse_factor(hessian_KK[order][:, order])
    mask_NK = None if mask_NK is None else mask_NK[:, order]
    in_order_NK = _rounded(w_NK[:, order], torch.cat(list(steps.values()))[:, order], factor_KK, mask_NK)
    codes_NK = torch.empty_like(in_order_NK)
    codes_NK[:, order] = in_order_NK
    rows = codes_NK.split([len(step) for step in steps.values()])
    return {
        name: PackedNVFP4(pack(mine), p.block_decode_scale_NG, p.global_scale, p.direction)
        for (name, p), mine in zip(scaled.items(), rows, strict=True)
    }


def _inverse_factor(hessian_KK: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse: fp32 [K, K]."""
    diagonal_K = hessian_KK.diagonal()
    silent_K = diagonal_K == 0
    mean = diagonal_K.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = FLOOR * mean
    while True:
        damped = hessian_KK + torch.diag(torch.where(silent_K, mean, 0.0) + damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        damping = damping * 10


def _rounded(w_NK: Tensor, step_NK: Tensor, factor_KK: Tensor, kept_NK: Tensor | None) -> Tensor:
    """Return codes, uint8 [N, K]; `w_NK` is used up."""
    values = torch.tensor(e2m1.VALUES, device=w_NK.device)
    codes_KN = torch.empty(w_NK.shape[1], w_NK.shape[0], dtype=torch.uint8, device=w_NK.device)
    w_KN, step_KN = w_NK.T.contiguous(), step_NK.T.contiguous()  # columns one after the other in memory
    kept_KN = None if kept_NK is None else kept_NK.T
    columns = len(w_KN)
    for start in range(0, columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, columns)
        errors_BN = torch.empty_like(w_KN[start:end])
        for j in range(start, end):
            code_N = e2m1.encode(w_KN[j] / step_KN[j])
            if kept_KN is not None:
                code_N = code_N.masked_fill_(~kept_KN[j], 0)
            codes_KN[j] = code_N
            error_N = (w_KN[j] - values[code_N.int()] * step_KN[j]) / factor_KK[j, j]
            errors_BN[j - start] = error_N
            w_KN[j + 1 : end].addr_(factor_KK[j, j + 1 : end], error_N, alpha=-1)
        w_KN[end:].addmm_(factor_KK[start:end, end:].T, errors_BN, alpha=-1)
    return codes_KN.T.contiguous()
