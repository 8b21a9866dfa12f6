"""Experts as files know them: every one a linear of its own, in views of the model's stacks.

    packed stack    the state of passes/experts.py      →  model.layers.0.mlp.experts.3.gate_proj: codes, scales
    dense stack     a parameter [E, N, K]               →  model.layers.0.mlp.experts.3.gate_proj.weight

Engines build their experts from these names, those of published checkpoints (expert_stacks.py says which). A router is
a matrix too; transformers has it in a module that is no nn.Linear, engines make a linear of it, so it is listed among
those that stay dense.

What this module does not do: stacks for which transformers has no names. They are refused for engines.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from qerl_compile.errors import ExportError, FormatError
from qerl_compile.expert_stacks import Place, Stack, expert_stacks
from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.grouped_nodes import stacked_parameters
from qerl_compile.model import QerlModel
from qerl_compile.passes.experts import SCALARS, PackedStack, packed_stack_of


def packed_experts(model: nn.Module) -> dict[str, PackedNVFP4]:
    """Return what is packed of a model's experts, by the path of each virtual linear; views, no copies.

    Raises:
        ExportError: a packed expert breaks the format.
    """
    packed: dict[str, PackedNVFP4] = {}
    for stack, held in packed_stacks(model):
        for path, place in stack.places.items():
            try:
                packed[path] = held.part(place.expert, place.rows.start // stack.part_rows)
            except FormatError as fault:
                raise overwritten(path, fault) from None
    return packed


def overwritten(path: str, fault: FormatError) -> ExportError:
    """Return the refusal of packed weights that break the format now, though they did not when they were packed."""
    return ExportError(
        where=f"{path}: {fault.where}",
        expected=fault.expected,
        got=fault.got,
        do="Load the model again; its packed weights were overwritten.",
    )


def packed_stacks(model: nn.Module) -> Iterator[tuple[Stack, PackedStack]]:
    """Yield the packed stacks of a transformed model."""
    if isinstance(model, QerlModel):
        for stack, _ in model.qerl.plan.experts.values():
            held = packed_stack_of(model.get_submodule(stack.module), stack.leaf)
            if held is not None:
                yield stack, held


def names_of_stacks(model: nn.Module) -> set[str]:
    """Return the names in the model's state_dict under which packed stacks lie."""
    leaves = ("packed", "scale", *SCALARS.values())
    return {f"{stack.name}_{leaf}" for stack, _ in packed_stacks(model) for leaf in leaves}


def dense_experts(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return dense stacks by name, each as path of a virtual linear → weight [N/P, K]; views, no copies."""
    return {
        name: {path: _view(model.get_parameter(name), place) for path, place in stack.places.items()}
        for name, stack in expert_stacks(model).items()
    }


def _view(stack_ENK: Tensor, place: Place) -> Tensor:
    return stack_ENK.detach()[place.expert, place.rows]


def routers(model: nn.Module) -> list[str]:
    """Return the modules that hold a matrix as `weight` and are neither linears nor embeddings."""
    found: list[str] = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Linear | nn.Embedding):
            found.append(path)
    return found


def refuse_nameless_stacks(model: nn.Module) -> None:
    """Refuse parameters [E, N, K] for which transformers has no names of single experts.

    Raises:
        ExportError: naming the first.
    """
    known = expert_stacks(model).keys() | names_of_stacks(model)
    for name, parameter in stacked_parameters(model):
        if name not in known:
            raise ExportError(
                where=name,
                expected="experts that transformers knows by the names of a published checkpoint",
                got=f"experts stacked into one tensor {list(parameter.shape)}, of which it splits no name",
                do="Serve this model from its own checkpoint, with the adapter (target peft).",
            )
