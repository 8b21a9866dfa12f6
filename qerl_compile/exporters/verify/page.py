"""The quality of an export as one HTML page: verdict, table, a chart of all linears, red where a budget is exceeded.

As in rl/report: no network and no script, every value escaped, and characters that could act or hide written out. The
chart is an image inside the page and needs matplotlib; without it the page says so and has its tables all the same.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

from qerl_compile.exporters.verify.layers import LayerQuality
from qerl_compile.exporters.verify.verification import Verification, decibels
from qerl_compile.wording import printable

PAGE = "quality.html"
WITHIN, OVER = "#0072B2", "#b00020"
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qerl-compile",  # the same numbers give the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def render(verification: Verification, title: str) -> str:
    """Return the page as HTML text that encodes to UTF-8."""
    from jinja2 import Environment, StrictUndefined

    from qerl_compile import __version__

    limit = verification.budgets.sqnr_db
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        version=__version__,
        passed=verification.passed,
        text=verification.text,
        checks=verification.checks(),
        layers=[_row(layer, limit) for layer in verification.layers],
        sqnr_against=verification.sqnr_against,
        chart=_chart(verification.layers, limit) if verification.layers else None,
        budget=f"{limit:g}",
    )


def _row(layer: LayerQuality, limit: float) -> dict[str, Any]:
    bits = {True: "equal to the model's", False: "NOT the model's", None: "–"}[layer.same_bits]
    return {"path": layer.path, "sqnr": decibels(layer.sqnr_db), "bits": bits, "failed": _failed(layer, limit)}


def _failed(layer: LayerQuality, limit: float) -> bool:
    return layer.same_bits is False or not layer.sqnr_db >= limit


def _chart(layers: tuple[LayerQuality, ...], limit: float) -> dict[str, str] | None:
    """Draw the finite values; None without matplotlib, or if there is none."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    dots = [(index, layer) for index, layer in enumerate(layers) if math.isfinite(layer.sqnr_db)]
    values = [layer.sqnr_db for _, layer in dots]
    with rc_context(SETTINGS):
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        axes = figure.subplots()
        colours = [OVER if _failed(layer, limit) else WITHIN for _, layer in dots]
        axes.scatter([index for index, _ in dots], values, c=colours, s=9)
        axes.axhline(limit, color=OVER, linewidth=0.8, linestyle=(0, (6, 2)))
        axes.set_xlabel("linear, in model order")
        axes.set_ylabel("SQNR, dB")
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(out.getvalue()).decode("ascii")
    spread = f"lowest {min(values):.1f} dB, highest {max(values):.1f} dB" if values else "none finite"
    alt = f"SQNR of {len(layers)} linears, {len(layers) - len(dots)} of them not drawn: {spread}; budget {limit:g} dB."
    return {"uri": f"data:image/svg+xml;base64,{encoded}", "alt": alt}


def _shown(value: object) -> str:
    return printable(str(value))
