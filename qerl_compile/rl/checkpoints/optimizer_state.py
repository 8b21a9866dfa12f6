"""The state of an optimizer, whichever it is, and the names of the parameters that it belongs to.

torch numbers parameters by their order in the optimizer. A number says nothing when the set of trained parameters has
changed, so names, dtypes and shapes are stored beside it, and another set is refused by the first name that differs.

    {"parameters": [["model.layers.0.….lora_A", "torch.float32", [32, 576]], …],
     "state_dict": optimizer.state_dict()}

`load_state_dict` casts floating state to the dtype of its parameter, which would round fp32 moments of bf16 weights;
such state is put back as it was saved. What is not judged: the shapes of the state, which only the optimizer knows. An
8-bit one hands its state to kernels that do not check them, so its shapes are judged (eight_bit_state.py).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import adapters_of, trained_norms_of
from qerl_compile.checkpoint_tensors import finite_or_raise
from qerl_compile.errors import ExportError
from qerl_compile.rl.checkpoints.eight_bit_state import is_eight_bit, refuse_other_moments
from qerl_compile.wording import refuse_checkpoint, shown


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return names and state, ready to be packed.

    Raises:
        ExportError: the optimizer trains a parameter that adapter files do not hold, or NaN or Inf in its state.
    """
    held = {id(p) for each in adapters_of(model).values() for p in (each.a_RK, each.b_NR)}
    held |= {id(p) for p in trained_norms_of(model).values()}
    names = {id(p): name for name, p in model.named_parameters()}
    for p in _parameters(optimizer):
        if id(p) not in held:
            raise ExportError(
                where=f"optimizer: {names.get(id(p), 'a parameter that is not the model’s')}",
                expected="LoRA factors and trained norms only, since these are what adapter files hold",
                got=f"another parameter of shape {list(p.shape)}",
                do="Freeze it, or save it yourself.",
            )
    state_dict = optimizer.state_dict()
    for name, tensor in _tensors(state_dict["state"], "state"):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            do = "Go back to an earlier checkpoint; this run has diverged."
            raise ExportError(where=f"optimizer: {name}", expected="finite numbers", got="NaN or Inf", do=do)
    return {"parameters": _described(model, optimizer), "state_dict": state_dict}


def judged(saved: Any, model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> dict[str, Any]:
    """Return the state_dict in `saved` if it is one of this optimizer over these parameters.

    Raises:
        CheckpointError: another set of parameters, other groups, NaN or Inf, moments that are not those of an 8-bit
            optimizer, or no state at all.
    """
    if not isinstance(saved, dict) or saved.keys() != {"parameters", "state_dict"}:
        refuse_checkpoint(where, "parameters and state_dict", shown(saved), do=_DO)
    own = _described(model, optimizer)
    there = saved["parameters"]
    if not isinstance(there, list):
        refuse_checkpoint(f"{where}: parameters", "a list", shown(there), do=_DO)
    if there != own:
        at = next((i for i, (a, b) in enumerate(zip(own, there, strict=False)) if a != b), min(len(own), len(there)))
        expected = _said(own[at]) if at < len(own) else f"{len(own)} trained parameters"
        got = _said(there[at]) if at < len(there) else f"{len(there)} trained parameters"
        do = "Resume with the recipe and the model that the run began with."
        refuse_checkpoint(f"{where}: trained parameter {at}", expected, got, do=do)
    state_dict = saved["state_dict"]
    _check_groups(state_dict, optimizer, where)
    for name, tensor in _tensors(state_dict["state"], "state"):
        finite_or_raise(name, tensor, where)
    if is_eight_bit(optimizer):
        refuse_other_moments(state_dict["state"], list(_parameters(optimizer)), where)
    return state_dict


def set_optimizer_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a judged state_dict, in the dtypes in which it was saved."""
    optimizer.load_state_dict(state_dict)
    for index, parameter in enumerate(_parameters(optimizer)):
        own = optimizer.state.get(parameter, {})
        for key, saved in state_dict["state"].get(index, {}).items():
            if isinstance(saved, Tensor) and own[key].dtype != saved.dtype:
                own[key] = saved.to(own[key].device)


_DO = "Do not use this checkpoint; another program wrote it."


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _described(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), ""), str(p.dtype), list(p.shape)] for p in _parameters(optimizer)]


def _said(described: Any) -> str:
    return " ".join(str(part) for part in described)[:200] if isinstance(described, list) else shown(described)


def _check_groups(state_dict: Any, optimizer: torch.optim.Optimizer, where: str) -> None:
    if not isinstance(state_dict, dict) or state_dict.keys() != {"state", "param_groups"}:
        refuse_checkpoint(f"{where}: state_dict", "state and param_groups", shown(state_dict), do=_DO)
    own = optimizer.state_dict()["param_groups"]
    groups, state = state_dict["param_groups"], state_dict["state"]
    count = sum(len(group["params"]) for group in own)
    if not isinstance(state, dict) or not all(
        type(key) is int and 0 <= key < count and isinstance(value, dict) for key, value in state.items()
    ):
        refuse_checkpoint(
            f"{where}: state", f"a dict for some of the parameters 0 to {count - 1}", shown(state), do=_DO
        )
    if not isinstance(groups, list) or len(groups) != len(own):
        refuse_checkpoint(f"{where}: param_groups", f"{len(own)} groups", shown(groups), do=_DO)
    for index, (group, mine) in enumerate(zip(groups, own, strict=True)):
        at = f"{where}: param_groups[{index}]"
        if not isinstance(group, dict) or group.get("params") != mine["params"]:
            refuse_checkpoint(at, f"the parameters {shown(mine['params'])}", shown(group), do=_DO)
        missing = mine.keys() ^ group.keys()
        if missing:
            do = "Resume with the optimizer that the run began with."
            refuse_checkpoint(at, f"the settings {', '.join(mine)}", f"a difference in {sorted(missing)[0]}", do=do)


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}")
