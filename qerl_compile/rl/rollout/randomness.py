"""The random numbers of a sequence: uniform in [0, 1), one per token, from a seed that is the sequence's own.

They are drawn on the CPU, all at once and in float64, whatever the device of the model: the same path gives the same
numbers everywhere, whatever else is in the batch, and a resumed run has no generator to restore.
"""

import torch
from torch import Tensor

from qerl_compile.rl.rollout.types import Seed
from qerl_compile.rl.seeds import derive_seed


def uniform(seed: Seed, count: int) -> Tensor:
    """Return float64 [count] for the sequence named by `seed`; a prefix is the same whatever `count` is."""
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    return torch.rand(count, generator=generator, dtype=torch.float64)
