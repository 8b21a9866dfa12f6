"""Scales of what flows through the packed model: inputs for 4-bit activations, keys and values for an FP8 cache.

Both are measured on the layer as it will be served, with rounded weights and folded norms, on the rounded outputs of
the layers before.

    input_global_scale   on each packed linear, float32 [1]: 2688 / max |x|, a divisor. Members of a fused group read
                         the same input and get the same number. Rounded in the activations' dtype, as
                         compressed-tensors has it for weights (formats/nvfp4.py, `divisor_of`).
    k_scale, v_scale     on each attention module, float32 [1]: max / 448, multipliers. What vLLM multiplies is the key
                         as it lies in the cache, after rotary and after norms of keys, so the maxima are taken there:
                         the layer is given a cache that keeps nothing but the maxima, and whichever module hands it
                         keys is the attention module.

A linear that no token reached (an expert that was never chosen) gets no scale; an exporter that needs it will say so.

What this module does not do: percentiles or moving averages. The largest value over the text is the scale, as
llm-compressor's `static_minmax` and ModelOpt's `max` have it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.errors import GraphError
from qerl_compile.formats.nvfp4 import E4M3_MAX, divisor_of
from qerl_compile.passes.quantize import CACHE_SCALES


class LargestValues:
    """Largest magnitudes seen while a layer runs.

    Attributes:
        inputs: path of a linear → max |x|, one element, in the activations' dtype.
        keys, values: attention module → the same of what it puts into the cache.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.keys: dict[nn.Module, Tensor] = {}
        self.values: dict[nn.Module, Tensor] = {}
        self._calls: list[nn.Module] = []

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values [B, H, T, D] in the place of a cache; return them as they came."""
        attention = self._calls[-1]
        _raise(self.keys, attention, key)
        _raise(self.values, attention, value)
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """Return 0: nothing is cached."""
        return 0

    @contextmanager
    def watching(self, layer: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator["LargestValues"]:
        """Note the inputs of linears, and which of the layer's modules is being called."""
        hooks = []
        for path, linear in linears.items():
            hooks.append(linear.register_forward_pre_hook(self._noting_inputs_of(path)))
        for module in layer.modules():
            hooks.append(module.register_forward_pre_hook(self._enter))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _noting_inputs_of(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: _raise(self.inputs, path, args[0])

    def _enter(self, module: nn.Module, _: object) -> None:
        self._calls.append(module)

    def _leave(self, *_: object) -> None:
        self._calls.pop()

    def keep_cache_scales(self, layer: str) -> None:
        """Give every attention module that was seen its `k_scale` and `v_scale`.

        Raises:
            GraphError: none was seen in this layer.
        """
        if not self.keys:
            raise GraphError(
                where=layer,
                expected="a layer that puts keys and values into a cache",
                got="one that does not",
                do="Set calibration.kv_cache to none.",
            )
        for attention, key in self.keys.items():
            for leaf, amax in zip(CACHE_SCALES, (key, self.values[attention]), strict=True):
                attention.register_buffer(leaf, cache_scale(amax))


def input_scale(amax: Tensor) -> Tensor:
    """Return the divisor for inputs whose largest magnitude is `amax`: float32 [1]."""
    return divisor_of(amax)


def cache_scale(amax: Tensor) -> Tensor:
    """Return the multiplier that puts `amax` at 448: float32 [1], 1 if all was zero."""
    multiplier = amax.float().reshape(1) / torch.full((1,), E4M3_MAX, device=amax.device)
    return torch.where(multiplier > 0, multiplier, 1.0)


def _raise(largest: dict[Any, Tensor], key: Any, x: Tensor) -> None:
    if x.numel():
        amax = x.detach().abs().amax()
        largest[key] = torch.maximum(largest[key], amax) if key in largest else amax
