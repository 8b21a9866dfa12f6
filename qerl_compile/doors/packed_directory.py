"""The packed modules of a directory, hidden from transformers while it loads the rest, and then read into the model.

    judge    headers, config and names against the model, before anything is read      checkpoint_dir.py, layouts/
    hide     a packed module has no `weight`, and its tensors are none of transformers' business
    fill     plan, packed tensors verbatim, adapters, noise, compilation               attach.py, model.py

The steps are those of `loading.load`, and the judgements are its functions, with transformers' own loading of the dense
tensors in the middle. That is why it is not called: the model exists already, built with whatever `from_pretrained` was
told.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qerl_compile.attach import Attacher
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.checkpoint_tensors import finite_or_raise
from qerl_compile.errors import ModelError
from qerl_compile.graph import held_tensor
from qerl_compile.layouts import layout_of, positive_scalar
from qerl_compile.loading import check_tensors, refuse_uncalled
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe


class PackedDirectory:
    """A judged directory and what of it is packed.

    Args:
        root: the directory; its config.json, headers and names are judged here.
        model: the model that transformers built from its config, on the meta device.

    Raises:
        CheckpointError: the directory is damaged or hostile, or its tensors are not those of the model.
        ModelError: it holds packed experts.
    """

    def __init__(self, root: Path, model: Any) -> None:
        self.checkpoint = open_checkpoint(root)
        self.layout = layout_of(self.checkpoint)
        self._hidden: dict[str, nn.Parameter] = {}
        self._files = {name: entry.file for name, entry in self.checkpoint.tensors.items()}
        check_tensors(model, self.checkpoint, self.layout, will_be_tied=model.all_tied_weights_keys)
        modules = dict(model.named_modules())
        for path in self.layout.linears:
            if path not in modules:  # an expert; transformers would merge names that it does not find
                raise ModelError(
                    where=f"{root}: {path}",
                    expected="packed linears, for from_pretrained",
                    got="packed experts",
                    do="Use qerl_compile.load(DIRECTORY), which returns the same model.",
                )

    def hide_from(self, model: Any) -> None:
        """Take `weight` off the packed modules, so that transformers neither misses nor initialises it."""
        names = [*self.layout.kv_scales, *self.layout.unread]
        for path, linear in self.layout.linears.items():
            self._hidden[path] = model.get_submodule(path)._parameters.pop("weight")
            names += linear.names
        ignored = {rf"\.{leaf}$" for leaf in {name.rpartition(".")[2] for name in names}}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def fill(self, model: Any, recipe: Recipe | None, *, inner: str, decode: str, seed: int) -> None:
        """Read what was hidden and turn the model into a transformed one, in place.

        Raises:
            CheckpointError: NaN or Inf in a tensor, or packed tensors that break the format.
            RecipeError, FormatError, GraphError: as `load`.
        """
        recipe = Recipe() if recipe is None else recipe
        for note in self.layout.notes:
            warnings.warn(f"{self.checkpoint.root}: {note}", stacklevel=2)
        device = next(model.parameters()).device
        for name, parameter in model.named_parameters():
            finite_or_raise(name, parameter, self.checkpoint.root)
        for path, weight in self._hidden.items():
            model.get_submodule(path)._parameters["weight"] = weight
        plan = make_plan(model, recipe, packed=frozenset(self.layout.linears))
        refuse_uncalled(self.checkpoint, self.layout, plan)
        attacher = Attacher(model, plan, seed=seed)
        with torch.no_grad():
            for path in plan.quantize:
                self._attach(path, model, attacher, device)
            for name in plan.experts:  # dense in the file, and the recipe packs them
                attacher.experts(name, model.get_parameter(name).data)
            for name, (owner, leaf) in self.layout.kv_scales.items():
                scalar = positive_scalar(name, self._read([name], device), self._files)
                model.get_submodule(owner).register_buffer(leaf, scalar)
        model.tie_weights()
        plan, root = attacher.finish(), str(self.checkpoint.root)
        become_qerl(model, TransformState(recipe, plan, inner, decode, recipe.train.recompute, base_name=root))

    def _attach(self, path: str, model: nn.Module, attacher: Attacher, device: torch.device) -> None:
        weight = held_tensor(model.get_submodule(path), "weight")
        linear = self.layout.linears.get(path)
        if linear is None:  # dense in the file, and the recipe packs it
            attacher.weight(path, weight.data)
            return
        packed, input_scale = linear.assemble(self._read(linear.names, device), self._files)
        attacher.packed(path, packed, weight.dtype, input_scale=input_scale)

    def _read(self, names: Any, device: torch.device) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        read: dict[str, torch.Tensor] = {}
        for name in names:
            with safe_open(self._files[name], framework="pt", device=str(device)) as reader:
                read[name] = reader.get_tensor(name)
        return read
