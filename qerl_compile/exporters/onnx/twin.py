"""The plain Hugging Face model that a transformed one computes like, without a single weight.

A transformed model is no input for torch.export: its decoder layers are compiled calls, its packed weights are ghosts,
and its cache is late-bound. What it computes is simple though. It is the model of its config with other numbers in its
weights and a low-rank branch beside some linears. So the twin is built anew from the class and the config, in float32,
with attention written out (`eager`: MatMul, Add, Softmax, which every runtime has), and its parameters are fake: they
have shapes and no storage. Tracing needs no memory for weights, and none can be folded away that is to stay packed.

    forward(input_ids [B, S], attention_mask [B, P+S], past: L pairs [B, J, P, D])
        -> logits [B, S, V], L pairs [B, J, P+S, D]

Positions follow from the mask, as in `generate`: a row's first 1 has position 0. So left padding needs no further
input. Every layer's cache grows, also that of a layer that sees a window: the mask hides what lies before the window.
That costs memory in long texts and saves a runtime from cropping.

What this module does not do: models whose state is no growing cache of keys and values (recurrent layers).

Shape legend: B batch, S new tokens, P cached tokens, L layers with a cache, J key-value heads, D head size, V
vocabulary.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import Adapter
from qerl_compile.errors import ExportError
from qerl_compile.model import QerlModel
from qerl_compile.peft_face import PeftFace

PREFIX = "causal_lm."
"""What the twin's tensors are called in the trace, before their name in the checkpoint."""

Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Twin:
    """A module to trace and the arguments to trace it with; all tensors are fake.

    Attributes:
        module: `forward` as in the module's essay.
        example: (input_ids, attention_mask, past).
    """

    module: nn.Module
    example: tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def make_twin(model: nn.Module, branches: Mapping[str, Adapter]) -> Twin:
    """Build the twin of a causal LM.

    Args:
        model: a transformers causal LM, transformed or not; only its class, its config and its buffers are read.
        branches: adapters that stay in the graph as low-rank branches, by module path.

    Raises:
        ExportError: no transformers model, or one without a growing cache of keys and values.
    """
    from torch._subclasses import FakeTensorMode

    causal_lm = _empty(model)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode, torch.no_grad():
        _make_fake(causal_lm, fake_mode.from_tensor)
        for path, adapter in branches.items():
            _add_branch(causal_lm.get_submodule(path), adapter)
        module = _WithCache(causal_lm).eval()
        batch, new, cached = 2, 3, 5  # unlike each other and unlike 0 and 1, which torch.export takes for constants
        ids = torch.zeros(batch, new, dtype=torch.long)
        mask = torch.ones(batch, cached + new, dtype=torch.long)
        past = [
            (torch.zeros(batch, heads, cached, size), torch.zeros(batch, heads, cached, value_size))
            for heads, size, value_size in _cache_sizes(causal_lm)
        ]
    return Twin(module, (ids, mask, past))


class _WithCache(nn.Module):
    """A causal LM with its cache as plain tensors."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Pairs) -> tuple[Tensor, Pairs]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for keys, values in past:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        new = input_ids.shape[1]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        out = self.causal_lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        layers: Any = cache.layers
        return out.logits, [(layer.keys, layer.values) for layer in layers]


class _Branch:
    """Forward hook that adds `linear(linear(x, A) * alpha / r, B)`, in the order of passes/lora.py."""

    def __init__(self, scaling: float) -> None:
        self.scaling = scaling

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        linear = nn.functional.linear
        hidden = linear(args[0], module.get_parameter("lora_A")) * self.scaling
        return out + linear(hidden, module.get_parameter("lora_B"))


def own_class(model: nn.Module) -> type[nn.Module]:
    """Return the transformers class of a model, also of a transformed one.

    Raises:
        ExportError: it has none.
    """
    from transformers import PreTrainedModel

    for cls in type(model).__mro__:
        if issubclass(cls, PreTrainedModel) and not issubclass(cls, (QerlModel, PeftFace)):
            return cls
    raise ExportError(
        where=type(model).__name__,
        expected="a transformers causal LM",
        got="a class that is not derived from PreTrainedModel",
        do="Pass what qerl_compile.load or transform returns.",
    )


def _empty(model: Any) -> nn.Module:
    from accelerate import init_empty_weights

    cls = own_class(model)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        twin: Any = cls(config)
    twin.tie_weights()
    return twin


def _make_fake(twin: nn.Module, fake: Callable[[Tensor], Tensor]) -> None:
    """Put fake float32 parameters in the place of those on meta, and fake buffers in the place of the real ones."""
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), requires_grad=False)
                module._parameters[leaf] = made.setdefault(id(parameter), fresh)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = fake(buffer)


def _add_branch(linear: nn.Module, adapter: Adapter) -> None:
    for leaf, factor in (("lora_A", adapter.a_RK), ("lora_B", adapter.b_NR)):
        linear.register_parameter(leaf, nn.Parameter(torch.empty(factor.shape), requires_grad=False))
    linear.register_forward_hook(_Branch(adapter.alpha / adapter.rank))


def _cache_sizes(twin: nn.Module) -> list[tuple[int, int, int]]:
    """Return (heads, key size, value size) of every layer that caches, found by running the twin once."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    ids = torch.zeros(2, 3, dtype=torch.long)
    twin(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    sizes = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            sizes.clear()
            break
        sizes.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    if not sizes:
        raise ExportError(
            where=type(twin).__name__,
            expected="layers that cache keys and values of every token, [B, heads, tokens, size]",
            got="none, or layers with another kind of state",
            do="Export this model for another target.",
        )
    return sizes
