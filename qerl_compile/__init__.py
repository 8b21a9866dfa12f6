"""qerl-compile: turn a Hugging Face causal LM into a 4-bit model that you can train with RL, and then serve.

    model = qerl_compile.load("path/or/hub-id", "qerl-nvfp4-aqn")      streams weights in, packs them
    model = qerl_compile.transform(model, "nvfp4-lora")                for a model already in memory
    qerl_compile.export(model, "out", target="vllm")

Names are resolved on first use: importing this package costs no more than importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qerl_compile.exporters import export
    from qerl_compile.loading import load
    from qerl_compile.recipe import Recipe
    from qerl_compile.transforming import resample_noise, transform

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "export", "load", "resample_noise", "transform"]

_HOMES = {
    "Recipe": "qerl_compile.recipe",
    "export": "qerl_compile.exporters",
    "load": "qerl_compile.loading",
    "resample_noise": "qerl_compile.transforming",
    "transform": "qerl_compile.transforming",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qerl_compile' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
