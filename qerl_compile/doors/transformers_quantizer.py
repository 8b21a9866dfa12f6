"""The method `qerl-nvfp4` in transformers' registry of quantizers.

    import qerl_compile
    model = AutoModelForCausalLM.from_pretrained(DIR)                                                     # packed
    model = AutoModelForCausalLM.from_pretrained(DIR, quantization_config=QerlNVFP4HfConfig("nvfp4-lora"))
    model = AutoModelForCausalLM.from_pretrained(DENSE, quantization_config=QerlNVFP4HfConfig("nvfp4-lora"))

What comes back is what `qerl_compile.load(DIR, recipe)` gives: the same class, the same bytes, nothing left of the
quantizer on it. DIR is written by `export(..., target="transformers")`: compressed-tensors' tensors, under a method
name of our own because transformers' own reader of that format decodes the weights on the first call, and because
`nvfp4` is taken.

How a packed directory is read. transformers reads what is dense; the packed modules have no `weight` when it looks, so
there is nothing to fill or to initialise. It is told not to wonder about their tensors, and these are read here,
verbatim, by the reader that `load` uses. transformers would otherwise cast them: it takes every floating-point tensor
of a file to the dtype of the model, block scales included. Before it reads anything the directory is judged as `load`
does it.

How a dense directory is read. transformers loads it whole, then `transform` packs it in place. The peak is therefore
the dense model; `qerl_compile.load` streams and needs the packed one.

Why the config is a CompressedTensorsConfig. When a directory and the caller both have a quantization config,
transformers keeps the directory's, and lets the caller's replace "loading attributes" only for the types in a list of
its own. Ours are the recipe and the compiler options, and the directory is compressed-tensors'.

Devices: none given is the CPU, as everywhere in transformers; "auto" is the current CUDA device if there is one. A map
over several devices is refused, and so is an offload to disk.

What this module does not do: save. `save_pretrained` writes a PEFT adapter if there is one, and names the exporters if
not (model.py). Training adapters that exist already is `load(DIR, adapter=...)`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from qerl_compile.errors import CheckpointError, ModelError, RecipeError
from qerl_compile.layouts import OWN_METHOD


class QerlNVFP4HfConfig(CompressedTensorsConfig):
    """What `from_pretrained` is told.

    Args:
        recipe: a `Recipe`, a mapping, a built-in name or a YAML file; needed for a dense directory. None adds nothing
            to a packed one.
        inner: inner compiler: "inductor", "aot_eager" or "eager".
        decode: "regional" or "whole", see `transform`.
        seed: of the adapters' initial values.
        fields: what a packed directory's config.json says, kept as it is.
    """

    def __init__(
        self,
        recipe: Any = None,
        *,
        inner: str = "inductor",
        decode: str = "regional",
        seed: int = 0,
        quant_method: str = OWN_METHOD,
        **fields: Any,
    ) -> None:
        # The base's __init__ would parse the fields and set its own method; only its type is wanted, see the essay.
        self.recipe, self.inner, self.decode, self.seed = recipe, inner, decode, seed
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]  # a str enum there
        self.fields = fields
        self.dequantize = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a config.json's section, or a mapping that a caller wrote; a recipe in it is a mapping or a name.

        Raises:
            RecipeError: the recipe is a path: a file that was downloaded does not choose what is read here.
        """
        from qerl_compile.recipe import builtin_names

        recipe = config_dict.get("recipe")
        if isinstance(recipe, str) and recipe not in builtin_names():
            raise RecipeError(
                where="quantization_config.recipe",
                expected="a mapping, or a built-in name: " + ", ".join(builtin_names()),
                got=repr(recipe),
                do="Pass quantization_config=QerlNVFP4HfConfig(recipe=PATH) for a file.",
            )
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the directory's fields, the method and the options, as plain values."""
        from qerl_compile.recipe import Recipe

        recipe = None if self.recipe is None else Recipe.resolve(self.recipe).model_dump(mode="json")
        options = {"recipe": recipe, "inner": self.inner, "decode": self.decode, "seed": self.seed}
        return {"quant_method": str(self.quant_method), **self.fields, **options}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`: there is no default to differ from."""
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a caller's config puts in the place of the directory's."""
        return {"recipe": self.recipe, "inner": self.inner, "decode": self.decode, "seed": self.seed}


class QerlHfQuantizer(HfQuantizer):
    """Turns the model that `from_pretrained` builds into a transformed one; see the module's essay."""

    quantization_config: QerlNVFP4HfConfig

    def __init__(self, quantization_config: QerlNVFP4HfConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # pyright: ignore[reportArgumentType]  # a CompressedTensorsConfig
        self._checkpoint: Any = None

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  # None by their `...`
        """True: adapters train on packed weights."""
        return True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  # likewise
        """Return False: exporters write packed models."""
        return False

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Judge the options before a model is built.

        Raises:
            ModelError, RecipeError: an unknown option, a faulty recipe, or none for a dense directory.
        """
        from qerl_compile.recipe import Recipe
        from qerl_compile.transforming import check_options

        config = self.quantization_config
        check_options(config.inner, config.decode)
        if config.recipe is not None:
            config.recipe = Recipe.resolve(config.recipe)
        elif not self.pre_quantized:
            raise RecipeError(
                where="quantization_config",
                expected="a recipe, since this directory is not packed yet",
                got="none",
                do="Pass quantization_config=QerlNVFP4HfConfig(recipe='nvfp4-lora').",
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Return a map to one device.

        Raises:
            ModelError: the map names several, or a place that is no device.
        """
        if device_map is None:
            return None
        if device_map == "auto":
            return {"": torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"}
        places = set(map(str, device_map.values())) if isinstance(device_map, Mapping) else {str(device_map)}
        if len(places) != 1 or places & {"disk", "meta", "balanced", "balanced_low_0", "sequential"}:
            raise ModelError(
                where="device_map",
                expected="one device for the whole model",
                got=", ".join(sorted(places)),
                do='Pass device_map="auto", "cpu" or "cuda:0".',
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise CheckpointError(
                where="from_pretrained",
                expected="a directory with the packed tensors",
                got="a state_dict or no files",
                do="Pass the directory that export(..., target='transformers') wrote.",
            )
        from qerl_compile.doors.packed_directory import PackedDirectory

        self._checkpoint = PackedDirectory(Path(checkpoint_files[0]).parent, model)
        self._checkpoint.hide_from(model)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        self.remove_quantization_config(model)
        for module in model.modules():  # _assign_is_quantized marked each config; models read its mere presence
            vars(getattr(module, "config", self)).pop("_is_quantized", None)
        options = {"inner": config.inner, "decode": config.decode, "seed": config.seed}
        if self.pre_quantized:
            self._checkpoint.fill(model, config.recipe, **options)
            self._checkpoint = None
        else:
            from qerl_compile.transforming import transform

            transform(model, config.recipe, **options)
        return model


def register() -> None:
    """Register method and config with transformers, unless they are; a reloaded registry is a new one."""
    if OWN_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(OWN_METHOD)(QerlNVFP4HfConfig)
        auto.register_quantizer(OWN_METHOD)(QerlHfQuantizer)
