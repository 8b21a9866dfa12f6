"""Where dense weights come from while a model is calibrated: memory, or a checkpoint that is read layer by layer.

A model in memory has its weights already. From a checkpoint the model is built on the meta device, everything outside
the decoder layers is read first, and a layer's tensors come when its turn does. Once a layer is packed its dense
weights are gone, so that at most one layer of them exists.

Headers are judged before a tensor is read (checkpoint_dir.py), names and shapes are compared with the model's, and
every tensor is checked for NaN and Inf as it arrives.

What this module does not do: read packed checkpoints. Their full weights are gone, so there is nothing to calibrate.
"""

from collections.abc import Collection
from contextlib import closing
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qerl_compile.checkpoint_dir import CheckpointDirectory, open_checkpoint
from qerl_compile.checkpoint_tensors import finite_or_raise
from qerl_compile.errors import ModelError
from qerl_compile.formats.nvfp4 import check_weight
from qerl_compile.graph import held_tensor
from qerl_compile.layouts import layout_of
from qerl_compile.loading import check_tensors, meta_model, model_directory, move_buffers, put_dense, usable_device
from qerl_compile.plan import Plan
from qerl_compile.tensor_reading import read_tensors
from qerl_compile.transforming import refuse_unsuitable


class DenseWeights(Protocol):
    """Gives a model its dense weights. `name` is where they came from."""

    name: str

    def outside(self, plan: Plan) -> None:
        """Provide everything outside the decoder layers."""
        ...

    def layer(self, path: str) -> None:
        """Provide one decoder layer."""
        ...


class InMemory:
    """A model that has its weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))

    def outside(self, plan: Plan) -> None:
        """Look for NaN and Inf in what will be packed or trained, before any of it is.

        Raises:
            FormatError: naming the first.
        """
        for path in (*plan.quantize, *plan.trained_weights):
            check_weight(held_tensor(self.model.get_submodule(path), "weight"), path)

    def layer(self, path: str) -> None:
        """Do nothing."""


class FromCheckpoint:
    """A model on the meta device, filled from a dense checkpoint.

    Args:
        model: parameters on meta; tied ones are tied.
        checkpoint: judged.
        device: where tensors go.
        name: what the user called it.

    Raises:
        CheckpointError: a name or shape is not the model's, or a tensor is of a type that no dense weight has.
    """

    def __init__(self, model: Any, checkpoint: CheckpointDirectory, device: torch.device, name: str) -> None:
        self.model, self.checkpoint, self.device, self.name = model, checkpoint, device, name
        tied = check_tensors(model, checkpoint, layout_of(checkpoint))
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items() if name not in tied}

    def outside(self, plan: Plan) -> None:
        """Read everything outside the decoder layers, and move the buffers that the model computed itself."""
        inside = tuple(f"{layer}." for layer in plan.layers)
        self._read({name for name in self.dtypes if not name.startswith(inside)})
        move_buffers(self.model, self.device)
        self.model.tie_weights()

    def layer(self, path: str) -> None:
        """Read one decoder layer."""
        self._read({name for name in self.dtypes if name.startswith(f"{path}.")})

    def _read(self, names: Collection[str]) -> None:
        entries = {name: entry for name, entry in self.checkpoint.tensors.items() if name in names}
        with closing(read_tensors(entries, self.device)) as tensors:
            for name, tensor in tensors:
                put_dense(self.model, name, finite_or_raise(name, tensor, entries[name].file), self.dtypes[name])


def opened(
    model_or_path: nn.Module | str | PathLike[str],
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    *,
    trust_remote_code: bool,
) -> tuple[Any, Any, DenseWeights]:
    """Return the model, its tokenizer and its weights; arguments as of `calibrate`.

    Raises:
        ModelError: a model in memory without a tokenizer, or with a device or dtype; a packed checkpoint.
        CheckpointError: as `load`.
    """
    if isinstance(model_or_path, nn.Module):
        refuse_unsuitable(model_or_path)
        surplus = [name for name, value in (("device", device), ("dtype", dtype)) if value is not None]
        if surplus or tokenizer is None:
            raise ModelError(
                where="calibrate",
                expected="a tokenizer, and a model that is on its device in its dtype",
                got=f"{surplus[0]}= with a model in memory" if surplus else "a model in memory without a tokenizer",
                do=f"Move the model before, and leave out {surplus[0]}=." if surplus else "Pass tokenizer=.",
            )
        return model_or_path, tokenizer, InMemory(model_or_path)
    root = model_directory(model_or_path)
    checkpoint = open_checkpoint(root, trust_remote_code=trust_remote_code)
    if layout_of(checkpoint).linears:
        raise ModelError(
            where=str(root),
            expected="a dense checkpoint",
            got="a packed one, whose full weights are gone",
            do="Calibrate the bf16 checkpoint of this model.",
        )
    place = usable_device(device)
    model = meta_model(checkpoint.root, dtype)
    weights = FromCheckpoint(model, checkpoint, place, str(model_or_path))
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(root)
    return model, tokenizer, weights
