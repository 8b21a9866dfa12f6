"""Moments in 8 bits, as bitsandbytes' AdamW8bit saves them (0.50), and the refusal of anything else.

    {"step": 7, "__bnb_optimizer_quant_state__": {
        "state1": uint8 [as the parameter],  "absmax1": float32 [blocks of 256],  "qmap1": float32 [256],
        "state2": …,                         "absmax2": …,                        "qmap2": …}}

A parameter of fewer than 4096 elements has "state1" and "state2" only, float32. One that has had no gradient yet has no
state at all.

Why this is judged: the step hands pointers and the number of the *parameter's* elements to compiled code. A shorter
tensor would be read and written behind its end. PyTorch's own optimizers refuse such state by themselves.

Absolute maxima are finite and not negative, and so are indices by their type; the tables are taken as they are, since
they belong to the bytes that were written with them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qerl_compile.rl.optimizer import BLOCK_ELEMENTS, MIN_8BIT_ELEMENTS
from qerl_compile.wording import refuse_checkpoint, shown

MOMENTS = "__bnb_optimizer_quant_state__"
"""Under this name bitsandbytes nests what is not of a parameter's dtype, so that FSDP passes it by."""

_DO = "Do not use this checkpoint; another program, or another version of bitsandbytes, wrote it."


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of bitsandbytes, told without importing that."""
    return any(kind.__module__.partition(".")[0] == "bitsandbytes" for kind in type(optimizer).__mro__)


def refuse_other_moments(state: dict[int, Any], parameters: Sequence[Tensor], where: str) -> None:
    """Refuse state whose tensors do not have the dtypes and shapes that the parameters ask for.

    Args:
        state: by number of the parameter; some may be missing.
        parameters: in the optimizer's order.
        where: the file, for errors.

    Raises:
        CheckpointError: names the parameter's number and the tensor.
    """
    for index, saved in state.items():
        at, want = f"{where}: state of parameter {index}", _moments_of(parameters[index])
        moments = saved.get(MOMENTS) if isinstance(saved, dict) else None
        if not isinstance(moments, dict) or saved.keys() != {"step", MOMENTS} or moments.keys() != want.keys():
            refuse_checkpoint(at, f"step and the moments {', '.join(want)}", shown(saved), do=_DO)
        if type(saved["step"]) is not int or saved["step"] < 0:
            refuse_checkpoint(f"{at}: step", "an integer >= 0", shown(saved["step"]), do=_DO)
        for name, (dtype, shape) in want.items():
            tensor = moments[name]
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != shape:
                got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else shown(tensor)
                refuse_checkpoint(f"{at}: {name}", f"{dtype} {list(shape)}", got, do=_DO)
            if name.startswith("absmax") and bool((tensor < 0).any()):
                refuse_checkpoint(f"{at}: {name}", "no negative number", str(float(tensor.min())), do=_DO)


def _moments_of(parameter: Tensor) -> dict[str, tuple[torch.dtype, torch.Size]]:
    if parameter.numel() < MIN_8BIT_ELEMENTS:
        return dict.fromkeys(("state1", "state2"), (torch.float32, parameter.shape))
    blocks = torch.Size([-(-parameter.numel() // BLOCK_ELEMENTS)])
    return {
        f"{name}{number}": (dtype, shape)
        for number in (1, 2)
        for name, dtype, shape in (
            ("state", torch.uint8, parameter.shape),
            ("absmax", torch.float32, blocks),
            ("qmap", torch.float32, torch.Size([256])),
        )
    }
