"""Which tensors a model has when nothing is packed: what a dense Hugging Face directory of it holds.

Asked of Hugging Face and not listed here: the model is built once more from its config on the meta device, without
storage, so that no list of ours has to know every buffer that is packed, adapted or derived. Experts are named one by
one, as published checkpoints and engines name them.
"""

import copy
from typing import Any

import torch
from torch import nn

from qerl_compile.expert_stacks import expert_stacks


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the tensors that a dense checkpoint of this causal LM holds; a tied tensor is there once.

    Args:
        model: a `PreTrainedModel`, transformed or not.
    """
    from transformers import AutoModelForCausalLM

    source: Any = model
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config)
    twin.tie_weights()
    stacks = expert_stacks(twin)
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for name, tensor in twin.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in stacks:
            stack = stacks[name]
            shapes |= dict.fromkeys((f"{path}.weight" for path in stack.places), (stack.part_rows, stack.columns))
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes
