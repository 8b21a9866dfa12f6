"""AWQ: a factor per input channel, moved into the weights before they are rounded and out of the activations for free.

AWQ (Lin et al., arXiv 2306.00978): W x = (W diag(s)) (diag(1/s) x). Channels with large activations get s > 1, so
their weights are large within their blocks and lose relatively less. The reciprocal costs nothing where whatever
produces x can take it, which is a fact of the captured graph (`LayerFacts.feeds`): nothing else may read x. Two
producers can:

    a norm          w' = w / s                         and (1 + w') = (1 + w) / s where the norm computes so (Gemma)
    a linear that   W_up' = diag(1/s) W_up, b' = b/s    rows only: block scales of a row move together, so its own
    is a factor                                        rounding hardly notices (up_proj → down_proj)

Which kind a norm is, is found by calling it: with zeros for a weight the first kind returns zero, with minus ones the
second. A norm that does neither (a LayerNorm with bias) is left alone.

s is (E|x_k|)^α for α = 0, 0.1 … 1, over the square root of its largest times its smallest, and α is the one with the
least squared error of the outputs, Σ D H Dᵀ with D the change of the weight and H the Hessian of the inputs: exact
over all calibration tokens, with the recipe's own block scales, rounding to nearest. α = 0 changes nothing.

A norm's weight is stored in the model's dtype, so its new value is rounded first and s then taken as old / new: what
goes into the linears is exactly what came out of the norm. Linears are scaled in float32 and packed from there.

**What it means for the rest.** The function stays the same, the parameters do not: norm weights and packed weights
belong together, and an adapter trained on them fits this model and not the bf16 base, whose channels are scaled
otherwise. And noise on norms (passes/noise.py) has one σ for all channels, in units of the norm weight: where w' = w
/ s is smaller, the same σ is relatively more noise. AWQ therefore makes excited channels (s > 1) noisier and quiet
ones steadier; with `awq` the noise of a run is not that of the paper.

What this module does not do: v_proj → o_proj, where heads that share a value would need one factor; clipping, which the
search of block scales (`scales: mse`) does better.

Shape suffixes: N rows, K input channels.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qerl_compile.calibrating.statistics import InputStatistics
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize
from qerl_compile.graph import leaf_tensor

EXPONENTS = tuple(tenth / 10 for tenth in range(1, 11))
Pack = Callable[[dict[str, Tensor], Tensor | None], dict[str, PackedNVFP4]]


def best_factors(weights: Mapping[str, Tensor], inputs: InputStatistics, pack: Pack) -> Tensor | None:
    """Search the factor of every input channel.

    Args:
        weights: path → [N, K] of the linears that read these inputs.
        inputs: with a Hessian and at least one token.
        pack: quantizes weights, given what an error in each column counts.

    Returns:
        float32 [K], or None if no exponent is better than leaving the weights alone.
    """
    mean_K = (inputs.magnitude_K / inputs.magnitude_K.mean()).float().clamp(min=1e-4)
    best, least = None, _output_error(weights, inputs, None, pack)
    for exponent in EXPONENTS:
        factor_K = mean_K**exponent
        factor_K = factor_K / (factor_K.max() * factor_K.min()).sqrt()
        error = _output_error(weights, inputs, factor_K, pack)
        if error < least:
            best, least = factor_K, error
    return best


def _output_error(weights: Mapping[str, Tensor], inputs: InputStatistics, factor_K: Tensor | None, pack: Pack) -> float:
    """Σ over tokens and rows of (output of the rounded weight - output)²."""
    if inputs.hessian_KK is None:
        raise TypeError("the output error needs the Hessian of the inputs")
    scaled = {path: w.float() if factor_K is None else w.float() * factor_K for path, w in weights.items()}
    total = 0.0
    for path, packed in pack(scaled, inputs.importance_K(factor_K)).items():
        change_NK = dequantize(packed, torch.float32).sub_(scaled[path])
        if factor_K is not None:
            change_NK /= factor_K
        total += float(((change_NK @ inputs.hessian_KK) * change_NK).sum(dtype=torch.float64))
    return total


def fold_into_norm(norm: nn.Module, factor_K: Tensor) -> Tensor | None:
    """Divide a norm's output by a factor per channel, in place; return the factor that it took, float32 [K].

    Returns None, having changed nothing, if the norm is of neither kind.
    """
    offset = _offset(norm)
    weight = leaf_tensor(norm, "weight")
    if offset is None or weight is None:
        return None
    old_K = weight.detach().float() + offset
    new = (old_K / factor_K - offset).to(weight.dtype)
    new_K = new.float() + offset
    silent = (old_K == 0) | (new_K == 0)
    weight.data.copy_(torch.where(silent, weight.detach(), new))
    return torch.where(silent, 1.0, old_K / new_K)


def _offset(norm: nn.Module) -> float | None:
    """Return 0 for w * x̂, 1 for (1 + w) * x̂, None for anything else."""
    weight = leaf_tensor(norm, "weight")
    if weight is None or weight.dim() != 1:
        return None
    probe = torch.linspace(-1, 2, len(weight), device=weight.device, dtype=weight.dtype)[None]
    for offset in (0.0, 1.0):
        with_weight = {"weight": torch.full_like(weight, -offset)}
        if not torch.func.functional_call(norm, with_weight, (probe,)).any():
            return offset
    return None
