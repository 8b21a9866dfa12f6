"""A transformed model with an adapter, as PEFT's users and trainers know such models.

Trainers ask one question, `isinstance(model, PeftModel)`, and on a yes they save the adapter alone, resume through
`load_adapter`, and take the model with its adapter disabled as the reference of a KL term. On a no, transformers'
Trainer cannot resume from adapter files, and TRL loads a second, dense copy of the base model. So the class of a
transformed model that has adapters derives from PeftModel as well, and does itself what PeftModel leaves to its tuner:

    disable_adapter, active_adapter(s), peft_config, get_base_model, get_nb_trainable_parameters, …       as in PEFT
    save_pretrained      adapter_model.safetensors and adapter_config.json, in PEFT's format
    load_adapter         such a directory into the adapter that is there; modules and ranks are the recipe's
    add_adapter          a frozen copy of the adapter as it is now; this is how TRL keeps the policy that training
                         started from (`beta > 0`). In PEFT it would start as the identity, and TRL would copy
    merge_*, unload, …   raise with the reason

**The order of the bases.** PreTrainedModel lists nn.Module before PushToHubMixin and PeftModel lists them the other way
round, so Python finds no order by itself. `_Both` states one: all of the Hugging Face model first, PeftModel last.
Nothing of PeftModel that the model has is then reached, its `__getattr__` least of all.

**The head.** Trainers multiply hidden states by `get_output_embeddings().weight`. A head that is packed (its weight is
a ghost, NaN) or has an adapter (which would be left out, silently) is not handed out.

What this module does not do: merge, train several adapters, load from a hub, or wrap a model (`get_peft_model` of a
transformed model is no use: it has its adapter).
"""

import secrets
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qerl_compile.adapter_files import (
    CONFIG,
    adapter_tensors,
    peft_config,
    write_adapter,
    write_adapter_files,
)
from qerl_compile.adapter_reading import read_adapter
from qerl_compile.adapters_off import adapters_are_off, adapters_off, learned_parameters
from qerl_compile.errors import ModelError
from qerl_compile.graph import leaf_tensor
from qerl_compile.staged_write import staged_directory, sync

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from qerl_compile.model import TransformState

DEFAULT = "default"
"""PEFT's name for the adapter that a model has; ours is saved and loaded under it."""


@dataclass
class _Named:
    """Which adapter the parameters hold, and the numbers of the others, in the order of `learned_parameters`."""

    active: str = DEFAULT
    others: dict[str, list[Tensor]] = field(default_factory=dict)


def _refused(name: str, expected: str, got: str, do: str) -> Callable[..., Any]:
    def method(self: nn.Module, *_: Any, **__: Any) -> Any:
        raise ModelError(where=f"{type(self).__name__}.{name}", expected=expected, got=got, do=do)

    method.__name__ = name
    method.__doc__ = f"Refuse: expected {expected}. {do}"
    return method


def _no_merge(name: str) -> Callable[..., Any]:
    return _refused(
        name,
        "an adapter that stays beside its base",
        "a merge, whose sum would be rounded to 4 bits again and lose what was learned (axolotl#3803, peft#2321)",
        "Call save_pretrained(DIR) and serve the adapter beside the base, or merge DIR into the bf16 base with PEFT.",
    )


def _one_adapter(name: str) -> Callable[..., Any]:
    return _refused(
        name,
        "the one adapter that the recipe's lora rules gave the model",
        "a request to rebuild or inspect PEFT layers, of which there are none",
        "Write lora rules and transform the base anew.",
    )


def _in_a_block(name: str) -> Callable[..., Any]:
    return _refused(
        name,
        "a block that ends, so that the adapter cannot stay off by mistake",
        "a switch",
        "Write `with model.disable_adapter():`.",
    )


class PeftFace(nn.Module):
    """Mixed in before the model's own class; see the module's essay."""

    if TYPE_CHECKING:
        qerl: TransformState

    peft_type = "LORA"

    merge_adapter = _no_merge("merge_adapter")
    unmerge_adapter = _no_merge("unmerge_adapter")
    merge_and_unload = _no_merge("merge_and_unload")
    unload = _no_merge("unload")
    disable_adapters = _in_a_block("disable_adapters")
    enable_adapters = _in_a_block("enable_adapters")
    disable_adapter_layers = _in_a_block("disable_adapter_layers")
    enable_adapter_layers = _in_a_block("enable_adapter_layers")
    enable_peft_hotswap = _one_adapter("enable_peft_hotswap")
    get_layer_status = _one_adapter("get_layer_status")
    get_model_status = _one_adapter("get_model_status")
    get_prompt = _one_adapter("get_prompt")
    get_prompt_embedding_to_save = _one_adapter("get_prompt_embedding_to_save")
    prepare_model_for_gradient_checkpointing = _one_adapter("prepare_model_for_gradient_checkpointing")

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a block in which the model computes as without its adapter, and records no gradients."""
        return adapters_off(self)

    def get_base_model(self) -> nn.Module:
        """Return the model itself: there is no wrapper around it, and its adapter is in its graphs."""
        return self

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that the model computes with."""
        return self._named.active

    @property
    def active_adapters(self) -> list[str]:
        """The same, as a list."""
        return [self._named.active]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether the model computes with an adapter now."""
        return not adapters_are_off(self)

    @property
    def peft_config(self) -> "dict[str, LoraConfig]":
        """PEFT's description of each adapter, by name; a new object each time, changing it changes nothing."""
        names = [DEFAULT, *(name for name in (self._named.active, *self._named.others) if name != DEFAULT)]
        return {name: peft_config(self, self.qerl.base_name) for name in names}

    @peft_config.setter
    def peft_config(self, _: Any) -> None:
        raise ModelError(  # PEFT sets it on a model whose linears it has just wrapped
            where=f"{type(self).__name__}.peft_config",
            expected="the one adapter that the recipe's lora rules gave the model",
            got="PEFT's layers around it, as get_peft_model or PeftModel.from_pretrained put them",
            do="Load the model anew and train the adapter that it has; load_adapter(DIR) fills it.",
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trained, and how many there are; two 4-bit codes count as two."""
        trainable = total = 0
        for name, parameter in self.named_parameters():
            if name.endswith(".weight_scale"):
                continue  # describes weights that are counted by their codes
            total += parameter.numel() * (2 if name.endswith(".weight_packed") else 1)
            trainable += parameter.numel() if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line about them."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        sys.stdout.write(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}\n")

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the adapter that the model computes with.

        Raises:
            ModelError: another adapter is named.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._only_active(name, "set_requires_grad")
        for parameter in learned_parameters(self):
            parameter.requires_grad_(requires_grad)

    def add_adapter(self, adapter_name: str, peft_config: "PeftConfig | None" = None, *_: Any, **__: Any) -> None:
        """Keep a frozen copy of the adapter under another name; see the module's essay.

        Args:
            adapter_name: a new name.
            peft_config: must be the model's own; another one cannot be obeyed.

        Raises:
            ModelError: the name exists, or the configuration asks for another adapter.
        """
        where = f"{type(self).__name__}.add_adapter"
        if not isinstance(adapter_name, str):
            raise ModelError(
                where=where,
                expected="a name, then a configuration: the order of PeftModel, not of transformers' mixin",
                got=type(adapter_name).__name__,
                do=f"Call add_adapter(NAME, model.peft_config[{DEFAULT!r}]).",
            )
        if adapter_name in self.peft_config:
            raise ModelError(where=where, expected="a new name", got=repr(adapter_name), do="Choose another.")
        asked, own = (_what_matters(config) for config in (peft_config, self.peft_config[DEFAULT]))
        if asked != own:
            raise ModelError(
                where=where,
                expected=f"the model's own configuration, {own}",
                got=str(asked if asked is not None else type(peft_config).__name__),
                do=f"Pass model.peft_config[{DEFAULT!r}]; other ranks or modules need other lora rules.",
            )
        self._refuse_off("add_adapter")
        self._named.others[adapter_name] = [factor.detach().clone() for factor in learned_parameters(self)]

    def set_adapter(self, adapter_name: str, *_: Any, **__: Any) -> None:
        """Compute with another adapter that was added: the two change places, number by number.

        Raises:
            ModelError: no adapter has this name.
        """
        named = self._named
        if adapter_name == named.active:
            return
        if adapter_name not in named.others:
            raise ModelError(
                where=f"{type(self).__name__}.set_adapter",
                expected=f"one of {', '.join(self.peft_config)}",
                got=repr(adapter_name),
                do="Name one of these.",
            )
        self._refuse_off("set_adapter")
        stored = named.others.pop(adapter_name)
        for factor, other in zip(learned_parameters(self), stored, strict=True):
            mine = factor.detach().clone()
            factor.data.copy_(other)  # as in adapters_off: a graph recorded before stays valid once it is set back
            other.copy_(mine)
        named.others[named.active] = stored
        named.active = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter that was added.

        Raises:
            ModelError: it is the one in use, or unknown.
        """
        if self._named.others.pop(adapter_name, None) is None:
            raise ModelError(
                where=f"{type(self).__name__}.delete_adapter",
                expected=f"an adapter that is not in use, of {', '.join(self._named.others) or 'which there is none'}",
                got=repr(adapter_name),
                do="Leave it: the model cannot be without the adapter of its recipe.",
            )

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        is_main_process: bool = True,
        selected_adapters: list[str] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the adapter as PEFT files: a new directory whole or not at all, in an old one each file at once.

        Args:
            save_directory: made if it does not exist.
            is_main_process: False writes nothing.
            selected_adapters: None or ["default"]; copies that were added are not saved.
            push_to_hub: refused.
            **_: PEFT's and transformers' other options, which have no meaning for two small files that are read from
                the model itself: state_dict, save_function, max_shard_size, …

        Raises:
            ModelError: the adapter is off or not in use, or something else than the adapter is to be saved.
            ExportError: NaN or Inf in the adapter.
        """
        if push_to_hub or selected_adapters not in (None, [DEFAULT]):
            raise ModelError(
                where=f"{type(self).__name__}.save_pretrained",
                expected=f"the adapter {DEFAULT!r} in a directory",
                got=f"push_to_hub={push_to_hub}, selected_adapters={selected_adapters}",
                do="Save without these, then upload the directory.",
            )
        self._refuse_off("save_pretrained")
        self._only_active(DEFAULT, "save_pretrained")
        if is_main_process:
            _write(self, Path(save_directory).absolute(), self.qerl.base_name)

    def load_adapter(
        self, model_id: str | PathLike[str] | None = None, adapter_name: str | None = None, *_: Any, **__: Any
    ) -> None:
        """Replace the adapter's numbers by those of a directory; whether it is trained stays as it is.

        Args:
            model_id: the directory. Nothing is downloaded.
            adapter_name: None or the adapter in use.

        Raises:
            ModelError: the adapter is off, another name, or no directory.
            CheckpointError: the files are damaged or hold an adapter that is not this model's; nothing has changed.
        """
        if model_id is None or not Path(model_id).is_dir():
            raise ModelError(
                where=f"{type(self).__name__}.load_adapter",
                expected="a directory with the files of an adapter",
                got=repr(model_id),
                do="Download the adapter first, and pass its directory.",
            )
        self._refuse_off("load_adapter")
        self._only_active(adapter_name or DEFAULT, "load_adapter")
        read_adapter(self, model_id)

    def get_adapter_state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Return the adapter under its names in PEFT's file, float32 on the CPU."""
        return adapter_tensors(self)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, whose weight may be multiplied by directly.

        Raises:
            ModelError: the head is packed or has an adapter.
        """
        head = super().get_output_embeddings()  # pyright: ignore[reportAttributeAccessIssue]  # of PreTrainedModel
        added = [
            name for name in ("weight_packed", "lora_A") if head is not None and leaf_tensor(head, name) is not None
        ]
        if added:
            raise ModelError(
                where=f"{type(self).__name__}.get_output_embeddings",
                expected="a head that is a plain linear, since trainers multiply hidden states by its weight",
                got=f"a head with {' and '.join(added)}, of which its weight knows nothing",
                do="Leave the head out of the recipe's quantize and lora rules.",
            )
        return head

    @property
    def _named(self) -> _Named:
        return vars(self).setdefault("qerl_named_adapters", _Named())

    def _only_active(self, name: str, method: str) -> None:
        if name != self._named.active:
            raise ModelError(
                where=f"{type(self).__name__}.{method}",
                expected=f"the adapter in use, {self._named.active!r}",
                got=repr(name),
                do=f"Call set_adapter({name!r}) first." if name in self.peft_config else "Name that one, or none.",
            )

    def _refuse_off(self, method: str) -> None:
        if adapters_are_off(self):
            raise ModelError(
                where=f"{type(self).__name__}.{method}",
                expected="an adapter that is on",
                got="a call inside disable_adapter(), where its B factors are zero",
                do="Call it after the block.",
            )


class _Both(type):
    """Metaclass of models that are PeftModels too: it orders their bases; see the module's essay."""

    def mro(cls) -> list[type]:
        from peft import PeftModel

        *bases, last = cls.__bases__
        if last is not PeftModel:  # a subclass of such a class, which inherits its order
            return super().mro()
        model = type(cls.__name__, tuple(bases), {}).__mro__[1:-1]
        return [cls, *model, *(base for base in last.__mro__ if base not in model)]


def peft_class(name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    """Make a class of a transformers model that is a PeftModel too, and behaves as PeftFace."""
    from peft import PeftModel

    return _Both(name, (PeftFace, *bases, PeftModel), body)


def _what_matters(config: Any) -> dict[str, Any] | None:
    """What of a LoraConfig decides about an adapter's shape and function; None of anything else."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        return None
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")
    return {"target_modules": sorted(config.target_modules or ()), **{key: getattr(config, key) for key in keys}}


def _write(model: nn.Module, directory: Path, base_name: str) -> None:
    if not directory.is_dir():
        write_adapter(model, directory, base_name=base_name)
        return
    tensors = adapter_tensors(model)
    written = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    with staged_directory(written) as stage:
        write_adapter_files(model, stage, tensors, base_name=base_name)
    for file in sorted(written.iterdir(), key=lambda file: file.name == CONFIG):  # the weights, then what says they are
        file.replace(directory / file.name)
    written.rmdir()
    sync(directory)
