"""The learning rate of each step: linear warm-up, then cosine to zero or constant.

    warm-up   lr(s) = peak * s / W                                   s = 1..W,  W = round(warmup_ratio * M)
    cosine    lr(s) = peak * (1 + cos(π (s - W - 1) / (M - W))) / 2  s = W+1..M; the first one is the peak

A pure function of the step, so a resumed run needs no scheduler state.
"""

import math

from qerl_compile.recipe import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of the 1-based `step` of `config.steps`."""
    warmup = round(config.warmup_ratio * config.steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = (step - warmup - 1) / max(config.steps - warmup, 1)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
