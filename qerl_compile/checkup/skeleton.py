"""What config.json promises: the linears of the model and the tensors that it needs, from an empty model.

The model is built by transformers without storage. A config that transformers does not know, or that is not worth
building, gives no skeleton and a note: the rest of the inspection goes on with what the headers say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qerl_compile.checkpoint_dir import CheckpointDirectory
from qerl_compile.wording import shown


@dataclass(frozen=True)
class Skeleton:
    """The model as its config describes it.

    Attributes:
        linears: module path → (N, K), tied heads included.
        head: path of the output head, or "".
        shapes: tensor name → shape, of what a dense checkpoint must hold.
        optional: names of tied tensors, which may be absent.
        fused_experts: whether it keeps experts in one tensor; published files keep them apart, under other names.
    """

    linears: Mapping[str, tuple[int, int]]
    head: str
    shapes: Mapping[str, tuple[int, ...]]
    optional: frozenset[str]
    fused_experts: bool


def skeleton_of(checkpoint: CheckpointDirectory) -> Skeleton | str:
    """Return the skeleton, or why there is none."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    depths = [depth for depth in _depths(checkpoint.config) if depth > len(checkpoint.tensors)]
    if depths:
        return f"config.json promises {depths[0]} layers, the files hold {len(checkpoint.tensors)} tensors"
    try:
        config = AutoConfig.from_pretrained(checkpoint.root)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        return _described(model)
    except Exception as fault:  # a stranger's config, through the code of every model family: any exception may come
        return f"config.json is not that of a causal LM which transformers can build: {shown(str(fault))}"


def _described(model: Any) -> Skeleton:
    linears = {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    output = model.get_output_embeddings()
    head = next((path for path, module in model.named_modules() if module is output), "")
    shapes: dict[str, tuple[int, ...]] = {}
    optional: set[str] = set()
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            optional.add(name)
        seen.add(id(tensor))
        shapes[name] = tuple(tensor.shape)
    fused = any(parameter.dim() > 2 for parameter in model.parameters())
    return Skeleton(linears, head, shapes, frozenset(optional), fused)


def _depths(config: Mapping[str, Any]) -> list[int]:
    """Return the numbers of layers in a config and in the configs inside it."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    numbers = [each.get(key) for each in (config, *inner) for key in ("num_hidden_layers", "n_layer", "num_layers")]
    return [number for number in numbers if isinstance(number, int)]
