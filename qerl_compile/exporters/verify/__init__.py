"""Verification: what an export is worth, measured and written on it.

verifying.py      load the directory back, compare with the model in memory and with the bf16 base
layers.py         weights: bits and decibels
logits.py         function: KL, top-1, perplexity
budgets.py        how far is too far, and why
verification.py   the numbers and the verdict
card_section.py   the table in the model card
page.py           the table and a chart as an HTML page
publish.py        export, verify, and publish what passes
"""

from qerl_compile.exporters.verify.budgets import Budgets
from qerl_compile.exporters.verify.publish import check_verified, export_verified
from qerl_compile.exporters.verify.verification import Check, OverBudgetError, Verification
from qerl_compile.exporters.verify.verifying import verify

__all__ = ["Budgets", "Check", "OverBudgetError", "Verification", "check_verified", "export_verified", "verify"]
