"""How much noise the rollouts carry at each step (Adaptive Quantization Noise, QeRL, arXiv 2510.11696, eq. 8).

A run of M steps is cut into K stages of nearly equal length. For the 1-based step s:

    k = min(K - 1, (s - 1) * K // M)
    sigma = 0                                                          for k = 0
    sigma = sigma_start * (sigma_end / sigma_start) ** ((k-1) / (K-2))   for k = 1 .. K - 1

So the first stage explores with the quantization error alone, the second starts at sigma_start, and the last one runs
at exactly sigma_end. The exponent is that of QeRL's released code; the paper's (k - 1) / (K - 1) never reaches
sigma_end. With K = 2 there is one noisy stage, at sigma_start, where the released code divides by zero. With fewer
steps than stages some stages are passed over, and the last one is not reached.

sigma is the standard deviation of what is added to a norm's weight; it has that weight's unit. Here is only the
number: the noise pass applies it, and the trainer sets it before each rollout.
"""

import math
from dataclasses import dataclass

from qerl_compile.errors import RecipeError


@dataclass(frozen=True)
class NoiseSchedule:
    """sigma as a function of the step; a table for a whole run is `[schedule.sigma(s) for s in range(1, M + 1)]`.

    Args:
        total_steps: M, steps of the whole run, also when it is resumed.
        stages: K, at least 2.
        sigma_start: sigma of the first noisy stage, above 0.
        sigma_end: sigma of the last stage, above 0.

    Raises:
        RecipeError: a value is out of range.
    """

    total_steps: int
    stages: int = 10
    sigma_start: float = 1e-2
    sigma_end: float = 5e-4

    def __post_init__(self) -> None:
        for name, least in (("total_steps", 1), ("stages", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                do = f"Set {name} to {least} or more."
                raise RecipeError(where=f"noise.{name}", expected=f"a whole number >= {least}", got=repr(value), do=do)
        for name in ("sigma_start", "sigma_end"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                do = "Give a positive number, or leave the noise rule out for no noise."
                raise RecipeError(where=f"noise.{name}", expected="a finite number > 0", got=repr(value), do=do)

    def stage(self, step: int) -> int:
        """k of the 1-based step, 0 to K - 1."""
        if not 1 <= step <= self.total_steps:
            raise ValueError(f"step must be in 1..{self.total_steps}, got {step}")
        return min(self.stages - 1, (step - 1) * self.stages // self.total_steps)

    def sigma(self, step: int) -> float:
        """Standard deviation of the noise in the rollouts of the 1-based step."""
        k = self.stage(step)
        if k == 0:
            return 0.0
        fraction = (k - 1) / max(self.stages - 2, 1)
        return self.sigma_start * (self.sigma_end / self.sigma_start) ** fraction
