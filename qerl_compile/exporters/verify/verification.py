"""What was found about an export, and the verdict: every number beside its budget.

A check without a budget informs and cannot fail. One comparison with NaN is false, so NaN fails every budget.
"""

import math
from dataclasses import dataclass

from qerl_compile.errors import ExportError
from qerl_compile.exporters.verify.budgets import Budgets
from qerl_compile.exporters.verify.layers import LayerQuality
from qerl_compile.exporters.verify.logits import Comparison
from qerl_compile.wording import listed

EFFECT = "Adapter's effect on predictions that is kept"


@dataclass(frozen=True)
class Check:
    """One line of the quality table.

    Attributes:
        what: what was measured.
        value: as text, with its unit.
        budget: the limit as text, "" for none.
        passed: None for a line that only informs.
    """

    what: str
    value: str
    budget: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Verification:
    """Everything that was measured on an exported directory.

    Attributes:
        target: what it was exported for.
        merge: the merge mode, "" for none.
        schema_problems: what the engine's table refuses; None where the directory has nothing of ours in it.
        layers: every packed or merged linear, in model order.
        sqnr_against: what their weights were compared with, in words.
        to_model: its predictions beside the model's in memory, with its adapter if it was merged; None for an adapter.
        effect_kept: share of the adapter's effect that a merge has, None for no merge.
        to_base: its predictions beside the bf16 base's, None if that was not at hand.
        base_note: why not, "" if it was.
        text: what the predictions were measured on, in words.
        budgets: the limits.
        unequal_factors: names of adapter tensors that are not the model's; for an exported adapter.
    """

    target: str
    merge: str
    schema_problems: tuple[str, ...] | None
    layers: tuple[LayerQuality, ...]
    sqnr_against: str
    to_model: Comparison | None
    effect_kept: float | None
    to_base: Comparison | None
    base_note: str
    text: str
    budgets: Budgets
    unequal_factors: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check that has a budget is within it."""
        return all(check.passed is not False for check in self.checks())

    def checks(self) -> list[Check]:
        """Return the lines of the quality table."""
        return [*self._file_checks(), *self._model_checks(), *self._base_checks()]

    def refuse(self, where: str) -> None:
        """Raise if it has not passed.

        Raises:
            OverBudgetError: names every check that failed.
        """
        if not self.passed:
            raise OverBudgetError(self, where)

    def _file_checks(self) -> list[Check]:
        problems, checks = self.schema_problems, list[Check]()
        if problems is not None:
            found = "; ".join(problems) or "nothing to object"
            checks.append(Check(f"Schema of {self.target}", found, "no problem", not problems))
        if self.to_model is None:
            same = not self.unequal_factors
            value = "equal" if same else f"{len(self.unequal_factors)} differ: {listed(self.unequal_factors)}"
            return [*checks, Check("Adapter tensors against the model's", value, "equal", same)]
        compared = [layer for layer in self.layers if layer.same_bits is not None]
        if compared:
            other = [layer.path for layer in compared if not layer.same_bits]
            value = (
                f"{len(other)} of {len(compared)} differ: {listed(other)}" if other else f"all {len(compared)} equal"
            )
            checks.append(Check("Codes and scales against the model's", value, "equal", not other))
        if self.layers:
            worst = min(self.layers, key=lambda layer: -math.inf if math.isnan(layer.sqnr_db) else layer.sqnr_db)
            limit = self.budgets.sqnr_db
            what = f"Lowest SQNR of a linear, against {self.sqnr_against}"
            value = f"{decibels(worst.sqnr_db)} ({worst.path})"
            checks.append(Check(what, value, f"≥ {limit:g} dB", worst.sqnr_db >= limit))
        return checks

    def _model_checks(self) -> list[Check]:
        found = self.to_model
        if found is None:
            return []
        limit = self.budgets.merge_kl if self.merge else self.budgets.round_trip_kl
        to = "the model with its adapter" if self.merge else "the model in memory"
        kept, least = self.effect_kept, self.budgets.effect_kept
        effect: list[Check] = []
        if kept is not None:
            share = "none: the adapter does nothing" if math.isnan(kept) else f"{kept:.0%}"
            effect = [Check(EFFECT, share, f"≥ {least:.0%}", kept >= least)]
        return [
            Check(f"KL to {to}", f"{found.kl:.2e} nats per token", f"≤ {limit:g}", found.kl <= limit),
            *effect,
            Check("Largest difference of a logit", f"{found.logit_error:.3g}"),
            Check("Same likeliest token", f"{found.top1:.1%}"),
            Check("Perplexity, model → export", f"{found.reference_perplexity:.3f} → {found.perplexity:.3f}"),
        ]

    def _base_checks(self) -> list[Check]:
        found = self.to_base
        if found is None:
            return [Check("Against the bf16 base", f"not measured: {self.base_note}")]
        limit = self.budgets.perplexity_increase
        values = f"{found.reference_perplexity:.3f} → {found.perplexity:.3f} ({found.perplexity_increase:+.1%})"
        if self.merge:
            perplexity = Check("Perplexity, bf16 base → export", values)
        else:
            within = found.perplexity_increase <= limit
            perplexity = Check("Perplexity, bf16 base → export", values, f"≤ +{limit:.0%}", within)
        return [
            perplexity,
            Check("KL to the bf16 base", f"{found.kl:.2e} nats per token"),
            Check("Same likeliest token as the bf16 base", f"{found.top1:.1%}"),
        ]


class OverBudgetError(ExportError):
    """An export is further from its model than its budgets allow; `verification` holds all numbers."""

    def __init__(self, verification: Verification, where: str) -> None:
        self.verification = verification
        failed = [check for check in verification.checks() if check.passed is False]
        super().__init__(
            where=where,
            expected="; ".join(f"{check.what}: {check.budget}" for check in failed),
            got="; ".join(check.value for check in failed),
            do="Nothing was published. Choose another merge mode or recipe, or raise this budget if you accept it.",
        )


def decibels(value: float) -> str:
    """Return a ratio in dB as text."""
    return "equal" if value == math.inf else f"{value:.1f} dB"
