"""The states of the generators that a process draws from: Python's, numpy's, torch's on the CPU and on each GPU.

Our own draws need none of them: training rows, samples and noise come from seeds that are a function of the recipe's
seed, the step and the position (seeds.py), so the noise of a resumed step is the same without a stored generator. The
global generators are kept for what is not ours: reward functions, tasks, a teacher, a user's own loop.

GPUs that this process has not used have no state worth keeping, and asking for it would start CUDA. States are judged
on generators made for that before the global ones are touched.
"""

import random
from typing import Any

import numpy as np
import torch

from qerl_compile.wording import refuse_checkpoint


def random_states() -> dict[str, Any]:
    """Return the states as plain values: {"python", "numpy", "torch", "cuda": one uint8 tensor for each GPU}."""
    state = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**state, "state": {**state["state"], "key": [int(word) for word in state["state"]["key"]]}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def judged(states: Any, where: str) -> dict[str, Any]:
    """Return the states if each is one that its generator takes.

    Raises:
        CheckpointError: a state is missing or no such state.
    """
    try:
        if states.keys() != {"python", "numpy", "torch", "cuda"}:
            raise ValueError(f"the keys {list(states)}")
        random.Random().setstate(states["python"])  # noqa: S311  # no secret is drawn
        np.random.RandomState().set_state(_numpy_state(states["numpy"]))
        torch.Generator().set_state(states["torch"])
        if not all(isinstance(state, torch.Tensor) and state.dtype == torch.uint8 for state in states["cuda"]):
            raise ValueError("a CUDA state that is no tensor of bytes")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as fault:
        refuse_checkpoint(
            where,
            "the states of Python's, numpy's and torch's generators",
            f"{type(fault).__name__}: {fault}",
            do="Do not use this checkpoint; another program wrote it.",
        )
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators into judged states; states of GPUs that this machine lacks are passed over."""
    random.setstate(states["python"])
    np.random.set_state(_numpy_state(states["numpy"]))
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"]):
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)


def _numpy_state(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {**state["state"], "key": np.array(state["state"]["key"], dtype=np.uint32)}}
