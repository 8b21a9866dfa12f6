"""How much noise the rollouts carry at each step (Adaptive Quantization Noise, QeRL, arXiv 2510.11696, eq. 8).

A run of M steps is cut into K stages of nearly equal length. The 1-based step s is in stage k, and stage 0 explores
with the quantization error alone:

    k = min(K - 1, (s - 1) * K // M)                     sigma = 0 for k = 0
    t = (k - 1) / (K - 2)   exponent `released`, QeRL's code: the last stage runs at exactly sigma_end
    t = (k - 1) / (K - 1)   exponent `paper`, eq. 8 as printed: the last stage stays above sigma_end

With a = sigma_start and b = sigma_end, the noisy stages k = 1 .. K - 1 run at

    exponential   a * (b / a)^t                            eq. 8; the paper's best in Fig. 9
    linear        a + (b - a) * t
    cosine        b + (a - b) * (1 + cos(pi * t)) / 2      slow, fast, slow
    logarithmic   a + (b - a) * ln(1 + n*t) / ln(1 + n)    n: the denominator of t; fast, then slow

Only the exponential course has an equation in the paper, and code that was released. Figs. 9 and 15 name the other
three and plot them; the formulas here are ours, and whether they are those of the plots is not known. All four start at
a, head for b, and have no constant of their own; 1 + n*t is k, so the logarithmic one falls with the logarithm of the
stage's number.

With K = 2 there is one noisy stage, at sigma_start, where the released code divides by zero. With fewer steps than
stages some stages are passed over, and the last one is not reached. A sigma_end of 0 is for the courses that get there;
a geometric one cannot.

sigma is the standard deviation of what is added to a norm's weight; it has that weight's unit. Here is only the
number: the noise pass applies it, and the trainer sets it before each rollout.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qerl_compile.errors import RecipeError

if TYPE_CHECKING:
    from qerl_compile.recipe import NoiseConfig

Course = Literal["exponential", "linear", "cosine", "logarithmic"]
COURSES: tuple[Course, ...] = ("exponential", "linear", "cosine", "logarithmic")
EXPONENTS = ("released", "paper")


@dataclass(frozen=True)
class NoiseSchedule:
    """sigma as a function of the step; a table for a whole run is `[schedule.sigma(s) for s in range(1, M + 1)]`.

    Args:
        total_steps: M, steps of the whole run, also when it is resumed.
        stages: K, at least 2.
        sigma_start: sigma of the first noisy stage, above 0.
        sigma_end: where the course leads, from 0 to sigma_start; above 0 if it is exponential.
        course: the recipe's `noise.schedule`.
        exponent: the recipe's `noise.exponent`.

    Raises:
        RecipeError: a value is out of range.
    """

    total_steps: int
    stages: int = 10
    sigma_start: float = 1e-2
    sigma_end: float = 5e-4
    course: Course = "exponential"
    exponent: Literal["released", "paper"] = "released"

    def __post_init__(self) -> None:
        for name, least in (("total_steps", 1), ("stages", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                _refuse(name, f"a whole number >= {least}", value, f"Set {name} to {least} or more.")
        for name, value, known in (("schedule", self.course, COURSES), ("exponent", self.exponent, EXPONENTS)):
            if value not in known:
                _refuse(name, f"one of {', '.join(known)}", value, "Choose one of these.")
        if not (math.isfinite(self.sigma_start) and self.sigma_start > 0):
            do = "Give a positive number, or set noise.enabled to false for no noise."
            _refuse("sigma_start", "a finite number > 0", self.sigma_start, do)
        if not 0 <= self.sigma_end <= self.sigma_start:
            do = "Let the noise decay."
            _refuse("sigma_end", f"a number from 0 to sigma_start = {self.sigma_start}", self.sigma_end, do)
        if self.sigma_end == 0 and self.course == "exponential":
            do = "Give a positive number, or another noise.schedule: a geometric course never reaches zero."
            _refuse("sigma_end", "a number > 0 for an exponential schedule", self.sigma_end, do)

    @classmethod
    def of(cls, noise: "NoiseConfig | None", total_steps: int) -> "NoiseSchedule | None":
        """The schedule of a recipe's noise in a run of `total_steps`; None if it has none, is off, or starts at 0."""
        if noise is None or not noise.enabled or noise.sigma_start == 0:
            return None
        return cls(total_steps, noise.stages, noise.sigma_start, noise.sigma_end, noise.schedule, noise.exponent)

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
        # K = 2 leaves `released` no stage to fall over; its one noisy stage has k = 1, which is t = 0 for any n.
        n = max(self.stages - (2 if self.exponent == "released" else 1), 1)
        t, start, end = (k - 1) / n, self.sigma_start, self.sigma_end
        match self.course:
            case "exponential":
                return start * (end / start) ** t
            case "linear":
                return start + (end - start) * t
            case "cosine":
                return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
            case "logarithmic":
                return start + (end - start) * math.log(1 + n * t) / math.log(1 + n)


def _refuse(name: str, expected: str, value: object, do: str) -> None:
    raise RecipeError(where=f"noise.{name}", expected=expected, got=repr(value), do=do)
