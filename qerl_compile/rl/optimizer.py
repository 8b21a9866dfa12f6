"""The optimizer of a run: AdamW over adapters and trained norms, its moments in float32 or in 8 bits.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = (1 - lr wd) w - lr m^ / (sqrt(v^) + eps)        (AdamW)

    train.optimizer     bytes a parameter      whose
    adamw               8                      torch.optim.AdamW
    adamw_8bit          2.03                   bitsandbytes' AdamW8bit (Dettmers et al., arXiv 2110.02861)

The second stores each moment as one byte an element, an index into a table of 256 numbers, times the largest absolute
value of its block of 256; a step decodes, updates in float32 and encodes again. Parameters of fewer than 4096 elements
(most trained norms) keep float32 moments. Weights stay float32 in both.

**What it is worth.** 5.97 bytes a parameter: of Qwen2.5-32B at rank 32 on all seven linears, 268 million parameters, it
saves 1.60 GB (1.49 GiB), beside 20 GB of packed weights and tens of activations and keys. It is the last knob to turn.

**Why bitsandbytes.** Its step is one CUDA kernel a parameter, nothing is compiled, it has a CPU form (0.50), and its
state is plain tensors that checkpoints hold as they are. torchao's AdamW8bit keeps tensor subclasses, which neither
copy.deepcopy nor clone takes (0.18), and compiles its step for every shape of parameter.

**Weight decay** pulls factors of LoRA towards zero and must not pull norm weights there; they get none.

**Ranks** make the same state from the same summed gradient: encoding rounds to the nearest entry and draws nothing.

What this module does not do: clip, schedule, or decide whether a step is taken (updating.py).
"""

import importlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qerl_compile.adapter_files import trained_norms_of
from qerl_compile.errors import ModelError, RecipeError
from qerl_compile.recipe import TrainConfig

OLDEST = (0, 50)
"""Of bitsandbytes: with an 8-bit step on the CPU, and with the state_dict that checkpoints judge."""

MIN_8BIT_ELEMENTS = 4096
"""Parameters with fewer keep float32 moments; bitsandbytes' default, written down since checkpoints depend on it."""

BLOCK_ELEMENTS = 256
"""Elements that share an absolute maximum (bitsandbytes' AdamW, not adjustable there)."""


def check_optimizer(config: TrainConfig) -> None:
    """Find the package that the optimizer comes from, before anything else is done.

    Raises:
        RecipeError: it is not installed, or too old.
    """
    if config.optimizer == "adamw_8bit":
        _bitsandbytes()


def make_optimizer(model: nn.Module, parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over parameters, with weight decay on all but norms.

    Args:
        model: a transformed model.
        parameters: those that are trained, float32, on their final device.
        config: optimizer, learning_rate, betas and weight_decay are read.

    Raises:
        RecipeError: the package of an 8-bit optimizer is not installed, or too old.
        ModelError: it cannot take a step on the device of the parameters.
    """
    of_norms = {id(weight_D) for weight_D in trained_norms_of(model).values()}
    factors = [parameter for parameter in parameters if id(parameter) not in of_norms]
    norms = [parameter for parameter in parameters if id(parameter) in of_norms]
    groups = [{"params": factors}, {"params": norms, "weight_decay": 0.0}]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    used = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(used, **settings)
    library = _bitsandbytes()
    _try_a_step(library, parameters[0].device)
    return library.optim.AdamW8bit(used, **settings, min_8bit_size=MIN_8BIT_ELEMENTS)


def moment_bytes(sizes: Sequence[int], optimizer: str) -> int:
    """Return the bytes of the moments of parameters with `sizes` elements, under a name of `train.optimizer`."""
    if optimizer == "adamw":
        return sum(8 * size for size in sizes)
    return sum(8 * n if n < MIN_8BIT_ELEMENTS else 2 * (n + 4 * -(-n // BLOCK_ELEMENTS)) for n in sizes)


def _bitsandbytes() -> Any:
    where, expected = "train.optimizer=adamw_8bit", f"the package bitsandbytes, {'.'.join(map(str, OLDEST))} or newer"
    do = "Run `pip install 'qerl-compile[bnb]'`, or set train.optimizer=adamw."
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as fault:
        raise RecipeError(where=where, expected=expected, got=str(fault), do=do) from fault
    if tuple(map(int, re.findall(r"\d+", library.__version__)[:2])) < OLDEST:
        raise RecipeError(where=where, expected=expected, got=library.__version__, do=do)
    return library


def _try_a_step(library: Any, device: torch.device) -> None:
    """Take a step on something small: where its binary lacks the device, bitsandbytes says so only then."""
    trial = nn.Parameter(torch.zeros(MIN_8BIT_ELEMENTS, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        library.optim.AdamW8bit([trial], lr=1.0).step()
        moved = bool((trial < 0).all())
    except (RuntimeError, NotImplementedError, AttributeError) as fault:
        moved, reason = False, str(fault).strip().splitlines()[0]
    else:
        reason = "no change of the parameter"
    if not moved:
        raise ModelError(
            where=f"train.optimizer=adamw_8bit on {device}",
            expected="an 8-bit step of bitsandbytes that works there",
            got=reason,
            do="Install a bitsandbytes for this device (`python -m bitsandbytes` says what it found), or set "
            "train.optimizer=adamw.",
        )
