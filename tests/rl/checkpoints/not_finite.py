"""Put a number that is not finite into a step of training, at a place and a moment drawn at random."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qerl_compile.errors import QerlError
from qerl_compile.rl.rollout import Rollouts
from qerl_compile.rl.trainer import Trainer
from tests.rl.checkpoints.training import recipe
from tests.rl.checkpoints.world import same, state_of
from tests.rl.toy import toy_trainer

VALUES = (math.nan, math.inf, -math.inf)


@contextmanager
def in_hidden_states_of_rollouts(trainer: Trainer, value: float, draw: random.Random) -> Iterator[None]:
    """One feature of what the head reads, so that every logit of the rollout is hit."""
    yield from _hooked(trainer, value, draw, training=False)


@contextmanager
def in_hidden_states_of_the_update(trainer: Trainer, value: float, draw: random.Random) -> Iterator[None]:
    """The same in the forward that gradients are taken of."""
    yield from _hooked(trainer, value, draw, training=True)


def _hooked(trainer: Trainer, value: float, draw: random.Random, *, training: bool) -> Iterator[None]:
    def poison(module: Any, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() != training:
            return hidden
        spread = torch.zeros_like(hidden)
        spread[..., feature] = value
        return hidden + spread

    feature = draw.randrange(trainer.model.config.hidden_size)
    hook = trainer.model.model.norm.register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def in_a_gradient(trainer: Trainer, value: float, draw: random.Random) -> Iterator[None]:
    """One element of the gradient of one factor."""

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[draw.randrange(gradient.numel())] = value
        return gradient

    hook = draw.choice(trainer.parameters).register_hook(poison)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def in_sampling_logps(trainer: Trainer, value: float, draw: random.Random) -> Iterator[None]:
    """One log-probability that the sampler reports."""
    engine = trainer.engine
    generate = engine.generate

    def poisoned(*arguments: Any) -> Any:
        rollouts = generate(*arguments)
        at = draw.randrange(len(rollouts))
        logps = list(rollouts[at].logps)
        logps[draw.randrange(len(logps))] = value
        changed = [*rollouts[:at], replace(rollouts[at], logps=tuple(logps)), *rollouts[at + 1 :]]
        return Rollouts(tuple(changed), rollouts.metrics)

    engine.generate = poisoned
    try:
        yield
    finally:
        del engine.generate


@contextmanager
def in_a_reward(trainer: Trainer, value: float, draw: random.Random) -> Iterator[None]:
    """What one completion gets from a reward function."""
    function = trainer.rewards[0]

    def poisoned(**columns: Any) -> list[Any]:
        scores = list(function(**columns))
        scores[draw.randrange(len(scores))] = value
        return scores

    trainer.rewards = [poisoned]
    try:
        yield
    finally:
        trainer.rewards = [function]


PLACES: tuple[Callable[..., Any], ...] = (
    in_hidden_states_of_rollouts,
    in_hidden_states_of_the_update,
    in_a_gradient,
    in_sampling_logps,
    in_a_reward,
)


@dataclass(frozen=True)
class Injections:
    """What injected numbers did, by the name of the place.

    Args:
        injected: how many.
        unchanged: after how many every parameter and all optimizer state but the learning rate had the same bits.
        counted: how many steps were reported as bad.
        finite: after how many every parameter was finite.
        refused: how many ended the run with an error of ours that says what is wrong.
        trained: steps without an injection, in between, that changed parameters.
    """

    injected: dict[str, int]
    unchanged: dict[str, int]
    counted: dict[str, int]
    finite: dict[str, int]
    refused: dict[str, int]
    trained: int


def inject_often(count: int, folder: Path, seed: int = 0) -> Injections:
    """Run steps of the toy; poison about two of three."""
    draw = random.Random(seed)  # noqa: S311
    trainer, _ = toy_trainer(recipe(10**6, train__max_bad_steps=10_000, train__correction="truncate"), directory=folder)
    names = ("injected", "unchanged", "counted", "finite", "refused")
    tallies: dict[str, Counter[str]] = {name: Counter() for name in names}
    trained = step = 0
    while tallies["injected"].total() < count:
        step += 1
        if draw.random() < 1 / 3:
            before = state_of(trainer.model, trainer.optimizer)
            trainer.step(step)
            trained += not same(before["parameters"], state_of(trainer.model, trainer.optimizer)["parameters"])
            continue
        place, value = draw.choice(PLACES), draw.choice(VALUES)
        name = place.__name__
        before = state_of(trainer.model, trainer.optimizer)
        with place(trainer, value, draw):
            try:
                row = trainer.step(step)
            except QerlError:
                row = {"update/bad_steps": 0}
                tallies["refused"][name] += 1
        after = state_of(trainer.model, trainer.optimizer)
        tallies["injected"][name] += 1
        tallies["counted"][name] += row["update/bad_steps"] > 0
        is_same = same(before["parameters"], after["parameters"]) and same(before["optimizer"], after["optimizer"])
        tallies["unchanged"][name] += is_same
        tallies["finite"][name] += all(bool(p.isfinite().all()) for p in trainer.parameters)
    return Injections(**{name: dict(tally) for name, tally in tallies.items()}, trained=trained)
