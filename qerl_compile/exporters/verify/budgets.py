"""How far an export may be from what it stands for before it is refused.

Each number lies between what is right and what is broken, as measured on SmolLM2-135M (benchmarks/results/
export_quality.md). NVFP4 costs a model of that size much; for a larger one, lower budgets say more.
"""

import math
from dataclasses import dataclass, fields

from qerl_compile.errors import ExportError


@dataclass(frozen=True)
class Budgets:
    """Limits; a value on the limit passes, NaN never does.

    Raises:
        ExportError: a limit is NaN or negative.
    """

    round_trip_kl: float = 1e-3
    """KL of an export that merges nothing to the model in memory, nats per token. The bits are the same; what remains
    is the dense rest, rounded to bf16."""
    merge_kl: float = 0.05
    """KL of a merge to the model with its adapter on, nats per token. Measured: dequantized 0.002, nvfp4 0.04. The
    merge into the bf16 master is over it on so small a model (0.15 to 0.2, what NVFP4 itself costs), and should be:
    whoever wants that function says so with this number."""
    effect_kept: float = 0.5
    """Least share of an adapter's effect on the predictions that a merge must have (logits.py). A merge that rounds a
    small adapter away is near to the adapted model and has none of it."""
    sqnr_db: float = 14.0
    """Lowest signal-to-noise ratio of a linear. Round-to-nearest has 20.4 at the lowest of SmolLM2's 210 linears; a
    matrix with a wrong scale or order has 6 or less."""
    perplexity_increase: float = 0.25
    """Over the bf16 base, relative: 0.25 is 25 per cent. Round-to-nearest has 0.17 on SmolLM2. Not asked of merges,
    which are meant to be another model."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if math.isnan(value) or value < 0:
                raise ExportError(
                    where=f"budgets.{limit.name}",
                    expected="a number of at least 0",
                    got=repr(value),
                    do="Give a number, or leave it out for the default.",
                )
