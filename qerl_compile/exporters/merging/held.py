"""What a model itself holds under the names of a dense checkpoint, experts one by one among them.

Merging and comparing with a master go by these names. transformers keeps experts as stacks [E, N, K], so the name of an
expert's matrix is a place in a stack: which expert and which rows. What is packed answers twice, with a ghost that has
the weight's shape, dtype and device, and with its codes and scales. All of it are views, so asking costs no memory.

What this module does not do: decode, add an adapter (dense.py), or answer for a name that the model lacks.
"""

from torch import Tensor, nn

from qerl_compile.expert_stacks import expert_stacks
from qerl_compile.exporters.served_experts import packed_experts, packed_stacks
from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.graph import held_tensor
from qerl_compile.passes.quantize import packed_of


class Held:
    """Looks tensors of a model up by checkpoint name; views and no copies.

    Args:
        model: a `PreTrainedModel`, transformed or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        stacks = expert_stacks(model) | {stack.name: stack for stack, _ in packed_stacks(model)}
        self._places = {path: (stack, place) for stack in stacks.values() for path, place in stack.places.items()}
        self._packed = packed_experts(model)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; of a packed weight its ghost, which has the shape, dtype and device."""
        path, _, leaf = name.rpartition(".")
        if path in self._places:
            stack, place = self._places[path]
            whole_ENK = held_tensor(self.model.get_submodule(stack.module), stack.leaf)
            return whole_ENK.detach()[place.expert, place.rows]
        return held_tensor(self.model.get_submodule(path), leaf)

    def packed(self, name: str) -> PackedNVFP4 | None:
        """Return the packed form of a weight, or None if it is dense."""
        path, _, leaf = name.rpartition(".")
        if path in self._places:
            return self._packed.get(path)
        return packed_of(self.model.get_submodule(path)) if leaf == "weight" else None
