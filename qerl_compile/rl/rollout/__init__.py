"""Rollouts: sample groups of completions from a policy. `types.py` has the interface that all engines share."""

from qerl_compile.rl.rollout.paged import PagedSampler as PagedSampler
from qerl_compile.rl.rollout.types import Rollout as Rollout
from qerl_compile.rl.rollout.types import Rollouts as Rollouts
from qerl_compile.rl.rollout.types import Sampler as Sampler
from qerl_compile.rl.rollout.types import Sampling as Sampling
