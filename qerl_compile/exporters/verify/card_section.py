"""The quality table of a model card, in Markdown.

One row for each check, failed ones in bold, the verdict in the heading: a reader of the hub's page should not have to
look for it. A row without a budget only informs. What comes from outside (names, values, the name of the text) is made
printable, and bars in cells are escaped, so that it cannot change the table.

What this module does not do: measure (verifying.py), judge (verification.py), or show single layers (page.py).
"""

from qerl_compile.exporters.verify.verification import Verification
from qerl_compile.wording import printable


def quality_section(verification: Verification, *, page: str) -> str:
    """Return the section "Quality" of a card.

    Args:
        verification: what was measured.
        page: file name of the page beside the card.
    """
    verdict = "within all budgets" if verification.passed else "**over budget**"
    rows = [
        f"| {_cell(check.what)} | {_cell(check.value)} | {check.budget or '–'} | {_WORDS[check.passed]} |"
        for check in verification.checks()
    ]
    parts = [f"## Quality: {verdict}", "\n".join(["| measured | value | budget | |", "|---|---|---|---|", *rows])]
    if verification.merge:
        parts.insert(1, f"A LoRA adapter was merged into these weights (`{verification.merge}`).")
    if verification.text:
        about = "Noise off, activations in 16 bits."
        parts.append(f"Predictions are over {printable(verification.text)}. {about} Layer by layer: `{page}`.")
    return "\n\n".join(parts)


_WORDS = {True: "passed", False: "**FAILED**", None: ""}


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
