"""A model small enough to save a thousand times: two linears with LoRA, a trained norm, and steps that draw from every
generator."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM
from qerl_compile.recipe import Recipe
from qerl_compile.rl.checkpoints import Identity, Progress, identity, latest, restore, save

RECIPE = Recipe.named("bf16-lora")


class Branched(nn.Module):
    """A frozen linear with a branch, as a transformed model has it."""

    def __init__(self, n: int = 3, k: int = 4, rank: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.randn(n, k), requires_grad=False))
        self.lora_A = nn.Parameter(torch.randn(rank, k, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(n, rank, dtype=dtype))
        self.lora_rank, self.lora_alpha = rank, 4.0

    def forward(self, x_BK: Tensor) -> Tensor:
        low_BR = x_BK @ self.lora_A.float().T
        return x_BK @ self.weight.T + low_BR @ self.lora_B.float().T * self.lora_alpha / self.lora_rank


class Norm(nn.Module):
    """A norm whose weight is trained, with the base's beside it."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(d, dtype=torch.bfloat16), requires_grad=False))
        self.register_parameter(TRAINED_NORM, nn.Parameter(torch.ones(d)))

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD * self.get_parameter(TRAINED_NORM)


class Toy(nn.Module):
    """up → norm → down."""

    def __init__(self, seed: int = 0, **sizes: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.up, self.norm, self.down = Branched(3, 4, **sizes), Norm(3), Branched(4, 3, **sizes)

    def forward(self, x_BK: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x_BK)))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained(model), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)


def who(model: nn.Module, **changes: Any) -> Identity:
    return replace(identity(model, RECIPE, base="toy"), **changes)


def progress(step: int, **changes: Any) -> Progress:
    return Progress(**{"step": step, "cursor": 16 * step, "seen_tokens": 100 * step, **changes})


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """A step whose loss hangs on draws from all three generators; returns the draws."""
    x_BK = torch.randn(5, 4)
    draws = [float(x_BK.sum()), float(np.random.standard_normal()), random.random()]  # noqa: S311
    loss = (model(x_BK) * draws[1]).square().mean() + draws[2] * sum(p.float().sum() for p in trained(model))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return draws


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a restore may change, copied."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "optimizer": [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in sorted(each.items())}
            for each in (optimizer.state.get(p, {}) for p in trained(model))
        ],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "python": random.getstate(),
        "numpy": _listed(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }


def _listed(state: Any) -> tuple[Any, ...]:
    return tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in state)


def same(a: Any, b: Any) -> bool:
    """Equal types and values, tensors bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def go_on(run_dir: Path, last: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Step from the newest checkpoint, if there is one, to step `last`; save after each."""
    model = Toy()
    optimizer = adamw(model)
    me = who(model)
    seed_all(0)
    found, _ = latest(run_dir)
    first = 1 if found is None else restore(found, me, model, optimizer).step + 1
    for step in range(first, last + 1):
        one_step(model, optimizer)
        save(run_dir, me, progress(step), model, optimizer)
    return model, optimizer
