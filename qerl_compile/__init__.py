"""qerl-compile: turn a Hugging Face causal LM into a 4-bit model that you can train with RL, and then serve.

    model = qerl_compile.load("path/or/hub-id", "qerl-nvfp4-aqn")      streams weights in, packs them
    model = qerl_compile.transform(model, "nvfp4-lora")                for a model already in memory
    qerl_compile.export(model, "out", target="vllm")

Names are resolved on first use: importing this package costs no more than importing torch.

It also opens a door: transformers learns the quantization method `qerl-nvfp4`, so that `AutoModelForCausalLM.
from_pretrained` opens our directories. Its registry may not be loaded yet, and is not loaded for this; the finder below
waits for it.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qerl_compile.calibrating import calibrate
    from qerl_compile.doors.torchao_handler import QerlNVFP4Config as QerlNVFP4Config
    from qerl_compile.doors.transformers_quantizer import QerlNVFP4HfConfig as QerlNVFP4HfConfig
    from qerl_compile.exporters import export
    from qerl_compile.loading import load
    from qerl_compile.recipe import Recipe
    from qerl_compile.transforming import resample_noise, transform

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "calibrate", "export", "load", "resample_noise", "transform"]

_HOMES = {
    "Recipe": "qerl_compile.recipe",
    "calibrate": "qerl_compile.calibrating",
    "export": "qerl_compile.exporters",
    "load": "qerl_compile.loading",
    "resample_noise": "qerl_compile.transforming",
    "transform": "qerl_compile.transforming",
}
_DOORS = {  # not in __all__: each imports a library that a star import must not ask for
    "QerlNVFP4Config": "qerl_compile.doors.torchao_handler",
    "QerlNVFP4HfConfig": "qerl_compile.doors.transformers_quantizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    home = _HOMES.get(name) or _DOORS.get(name)
    if home is None:
        raise AttributeError(f"module 'qerl_compile' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


_REGISTRY = "transformers.quantizers.auto"


class _DoorOpener:
    """A finder that finds nothing itself; it has the door opened after the registry's own loader has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _ThenRegister(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
                return spec
        return None


class _ThenRegister:
    """A loader that is another one, and registers when that has run."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


def _register() -> None:
    """Register with the transformers that is loaded. One that we do not fit must still be usable without us."""
    import warnings

    try:
        importlib.import_module(_DOORS["QerlNVFP4HfConfig"]).register()
    except (ImportError, AttributeError) as fault:
        warnings.warn(f"qerl-nvfp4 is not registered with this transformers: {fault}", stacklevel=2)


if _REGISTRY in sys.modules:
    _register()
# Two of them would ask each other for ever, and a reload of this module makes another.
sys.meta_path[:] = [_DoorOpener(), *(each for each in sys.meta_path if type(each).__name__ != _DoorOpener.__name__)]
