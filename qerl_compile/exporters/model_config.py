"""The config.json and generation_config.json that every exported model has, as transformers writes them.

The class is named and the source's quantization left out, because a layout that has one writes its own. What this
module does not do: describe a packed format (compressed_tensors.py, modelopt.py).
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write_model_config(model: nn.Module, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write both files.

    Args:
        model: a transformers causal LM, transformed or not.
        directory: exists.
        dtype: of the exported floating-point tensors; None leaves what the model's config says.
    """
    source: Any = model
    config = copy.deepcopy(source.config)
    config.architectures = [type(model).__name__]
    if dtype is not None:
        config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(directory)
    if source.can_generate():
        # Not save_pretrained, which refuses settings that published models do have, such as a temperature for greedy.
        source.generation_config.to_json_file(directory / "generation_config.json")
