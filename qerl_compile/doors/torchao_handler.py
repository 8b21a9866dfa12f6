"""torchao's `quantize_` with our config: each linear that its filter selects becomes a `PackedLinear`, in place.

    quantize_(model, QerlNVFP4Config())                                            every nn.Linear
    quantize_(model, QerlNVFP4Config(), filter_fn=lambda m, name: "mlp" in name)

Why a module that computes by itself, where `transform` leaves ghosts and rewrites graphs: torchao hands over one module
at a time, in any model, and knows nothing of layers. A `PackedLinear` calls `qerl::quantized_linear`, one operator that
torch.compile sees as one node; it trains what comes before it, since gradients reach its input, and its bias.

What is lost against `transform`: linears are quantized one by one, so q/k/v and gate/up get different scalars, which
engines that fuse them cannot serve (the exporters refuse); no fused products, no noise, no adapters in the graph. For
RL on a causal LM use `transform`.

The object stays the same and changes its class, as `transform` does with models: hooks and references to it keep
working, and a model that is itself one linear can be quantized, which torchao cannot do by replacing.

torchao's registry maps a config's type to a handler. Nobody can pass our config without importing this module, so there
is nothing to hook: the import registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from qerl_compile.errors import FormatError, ModelError
from qerl_compile.formats.nvfp4 import quantize
from qerl_compile.kernels import ops as _ops  # noqa: F401  # registers the qerl:: operators

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as fault:
    raise ModelError(
        where="qerl_compile.QerlNVFP4Config",
        expected="torchao with a registry of handlers (0.18 was tried)",
        got=str(fault),
        do="Run `pip install torchao`, or use qerl_compile.transform, which does not need it.",
    ) from fault

OWNED = ("weight_packed", "weight_scale", "weight_global_scale")


@dataclass
class QerlNVFP4Config(AOBaseConfig):
    """NVFP4 weights, activations as they are. There is nothing to choose: the bytes are those of compressed-tensors."""


class PackedLinear(nn.Module):
    """A linear layer y = x · Wᵀ + b whose weight [N, K] is NVFP4 and frozen.

    State: `weight_packed` uint8 [N, K/2], `weight_scale` float8_e4m3fn [N, K/16], both Parameters without gradient;
    `weight_global_scale` float32 [1], a divisor, a buffer; `bias` as it was. They keep their dtypes in `to`, `half` and
    the like, which change the bias only.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_global_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N] for [..., K], in x's dtype."""
        decode_scale = self.weight_global_scale.reciprocal()
        y = torch.ops.qerl.quantized_linear(x, self.weight_packed, self.weight_scale, decode_scale)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return what nn.Linear shows, and the format."""
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{features}, bias={self.bias is not None}, nvfp4"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        owned = {id(held) for leaf in OWNED if (held := getattr(self, leaf)) is not None}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in owned or tensor.dtype == torch.uint8:
                return fn(tensor)
            # as bytes, which no cast of floating-point tensors touches
            return fn(tensor.detach().view(torch.uint8)).view(tensor.dtype)

        return super()._apply(moved, recurse)


@register_quantize_module_handler(QerlNVFP4Config)
def pack_linear(module: nn.Module, config: QerlNVFP4Config) -> nn.Module:
    """Turn a linear into a `PackedLinear`, in place.

    Args:
        module: an nn.Linear in bf16, fp16 or fp32, K a multiple of 16, with its weight in memory.
        config: of the registered type.

    Returns:
        The same object.

    Raises:
        FormatError: not such a linear, or NaN or Inf in its weight.
    """
    weight = module._parameters.get("weight")
    if type(module) is not nn.Linear or weight is None or weight.is_meta:
        raise FormatError(
            where="quantize_",
            expected="an nn.Linear with its weight in memory",
            got=f"a {type(module).__name__}" + (" on the meta device" if weight is not None and weight.is_meta else ""),
            do="Leave it out with filter_fn=lambda module, name: ...",
        )
    packed = quantize(weight.data, name=f"weight of a Linear({module.in_features}, {module.out_features})")
    del module._parameters["weight"]
    changed: Any = module
    changed.weight_packed = nn.Parameter(packed.codes_NK2, requires_grad=False)
    changed.weight_scale = nn.Parameter(packed.block_decode_scale_NG, requires_grad=False)
    module.register_buffer("weight_global_scale", packed.global_scale)
    changed.__class__ = PackedLinear
    return module
