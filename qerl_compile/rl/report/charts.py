"""Curves as SVG images that live inside the page.

matplotlib draws them; each becomes a `data:` URI of an <img>, because an image runs no script, keeps its ids to itself
and has an alt text. No text of a user goes into an image: names of runs stand in the page's own legend, and a curve is
known by colour and dashes. The colours are from Okabe and Ito, whose palette people of all colour visions tell apart.

The same curves give the same bytes (a fixed hash salt, no date).
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qerl_compile.errors import ExportError
from qerl_compile.rl.report.series import Points, smoothed

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
"""Those of Okabe and Ito's that stand out from white by 3 to 1; further groups are dashed."""
DASHES = ("", "6 2", "2 2", "6 2 2 2")
FEW = 6
"""Curves with bands in one chart, beyond which bands are paler, for where they overlap they add up."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qerl-compile",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Style:
    """How a curve looks: a colour, and an SVG dash pattern ("" for a solid line)."""

    colour: str
    dashes: str = ""


@dataclass(frozen=True)
class Curve:
    """A line, and the band around it if it has one.

    Args:
        label: said in the alt text.
        line: step → value.
        style: see `Style`.
        low: lower edge of the band; None for no band.
        high: upper edge.
        smooth: draw the values pale and their moving mean over them.
        marks: put a dot on every value, for values that are far apart.
    """

    label: str
    line: Points
    style: Style
    low: Points | None = None
    high: Points | None = None
    smooth: bool = False
    marks: bool = False


def style(group: int, member: int = 0) -> Style:
    """The style of a group's member: groups differ by colour, members of one group by dashes."""
    turn = group // len(COLOURS)  # a sixth group takes the first colour again, dashed
    return Style(COLOURS[group % len(COLOURS)], DASHES[(member + turn) % len(DASHES)])


def require_matplotlib() -> Any:
    """Import what draws without a screen.

    Raises:
        ExportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as fault:
        raise ExportError(
            where="report",
            expected="the package matplotlib, which draws the curves",
            got=str(fault),
            do="Run pip install 'qerl-compile[report]'.",
        ) from fault
    return Figure


def chart(curves: Sequence[Curve], unit: str) -> dict[str, str]:
    """Draw curves over steps.

    Args:
        curves: those to draw, the first one at the bottom.
        unit: of the vertical axis.

    Returns:
        `uri`, the image as a data URI, and `alt`, what it shows in words.
    """
    figure_class = require_matplotlib()
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        figure = figure_class(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _draw(axes, curve, band_opacity=0.15 if len(curves) <= FEW else 0.05)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(out.getvalue()).decode("ascii")
    return {"uri": f"data:image/svg+xml;base64,{encoded}", "alt": " ".join(map(_in_words, curves))}


def _draw(axes: Any, curve: Curve, band_opacity: float) -> None:
    steps, colour = list(curve.line), curve.style.colour
    dashes = [float(length) for length in curve.style.dashes.split()]
    options = {"color": colour, "linewidth": 1.6, "linestyle": (0, dashes) if dashes else "-"}
    if curve.low and curve.high:
        banded = [step for step in steps if step in curve.low and step in curve.high]
        axes.fill_between(
            banded,
            [curve.low[s] for s in banded],
            [curve.high[s] for s in banded],
            color=colour,
            alpha=band_opacity,
            linewidth=0,
        )
    if curve.smooth:
        axes.plot(steps, list(curve.line.values()), color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, list(smoothed(curve.line).values()), **options)
    else:
        axes.plot(steps, list(curve.line.values()), marker="o" if curve.marks else "", markersize=3, **options)
    if len(steps) == 1:
        axes.plot(steps, list(curve.line.values()), marker="o", markersize=4, color=colour)


def _in_words(curve: Curve) -> str:
    values = list(curve.line.items())
    (first, start), (last, end) = values[0], values[-1]
    low, high = min(curve.line.values()), max(curve.line.values())
    if first == last:
        return f"{curve.label}: {start:.4g} at step {first}."
    course = f"{start:.4g} at step {first} to {end:.4g} at step {last}"
    return f"{curve.label}: {course}, lowest {low:.4g}, highest {high:.4g}."
