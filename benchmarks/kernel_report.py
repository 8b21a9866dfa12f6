"""What benchmarks/kernels.py says: the targets and whether they are met, grids of ratios, defeats, tables in full.

Pure functions of the result, so that the arithmetic of a verdict is tested without a GPU. A result is

    {"device": ..., "ceilings": {...}, ..., "cells": [cell, ...]}
    cell = {"direction", "layer", "n", "k", "m", COLUMN: {"replay": times, "plain": times, "host": µs, "error": ...}}

with times = [median, least, most] in µs. Directions: forward, dx, pair (recompute, then dx) and lora.

Targets in microseconds are for an H200. On another card the memory-bound ones (M <= 16) are scaled by its measured copy
bandwidth and say so; ratios need no scaling, for both sides ran in the same rounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LAYER = "32B gate/up"  # 27648 x 5120, the layer that the targets name
H200_COPY = 4.16  # TB/s that the H200 copied in the run that set the targets
MODES = ("replay", "plain")
FACTS = ("direction", "layer", "n", "k", "m")
Result = dict[str, Any]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What one cell of `LAYER` is to reach: `rival` / ours >= bound, or ours <= bound µs where rival is "µs"."""

    direction: str
    m: int
    mode: str
    rival: str
    bound: float
    column: str = "ours"
    memory_bound: bool = True

    @property
    def what(self) -> str:
        """The first column of the verdict."""
        column = "" if self.column == "ours" else f" ({self.column.removeprefix('ours, ')})"
        return f"{self.direction} M={self.m} {self.mode}{column}"


HELD = "ours, one dequantize"
TARGETS = (
    *(Target("forward", m, "replay", "µs", 27.0) for m in (1, 8, 16)),
    *(Target("forward", m, "replay", "bf16", 2.9) for m in (1, 8, 16)),
    *(Target("forward", m, "replay", "humming", 1.4) for m in (1, 8, 16)),
    Target("forward", 64, "replay", "µs", 45.0, memory_bound=False),
    Target("forward", 256, "replay", "µs", 115.0, memory_bound=False),
    Target("forward", 1024, "plain", "bf16", 0.78),
    Target("forward", 4096, "plain", "bf16", 0.93),
    Target("dx", 4096, "plain", "bf16", 0.92),
    Target("pair", 1024, "plain", "bf16", 0.85),
    Target("pair", 1024, "plain", "bf16", 0.85, HELD),
    Target("pair", 4096, "plain", "bf16", 0.97, HELD),
    Target("dx", 4096, "plain", "bf16", 0.95, HELD),
)


def find(result: Result, direction: str, layer: str, m: int) -> Cell:
    """That cell, or an empty one."""
    facts = (direction, layer, m)
    return next((c for c in result["cells"] if (c["direction"], c["layer"], c["m"]) == facts), {})


def median(cell: Cell, column: str, mode: str) -> float | None:
    """Microseconds, None where not measured."""
    times = cell.get(column, {}).get(mode)
    return times[0] if times else None


def columns(cell: Cell) -> list[str]:
    """The competitors that were measured here."""
    return [name for name in cell if name not in FACTS]


def ratio(cell: Cell, mode: str, rival: str, column: str = "ours") -> float | None:
    """How many times faster `column` is than `rival`."""
    theirs, our = median(cell, rival, mode), median(cell, column, mode)
    return theirs / our if theirs and our else None


def bound_on(target: Target, result: Result) -> tuple[float, str]:
    """The target on this card, and a remark if it was scaled."""
    if target.rival != "µs" or not target.memory_bound or "H200" in result["device"]:
        return target.bound, ""
    scaled = target.bound * H200_COPY / result["ceilings"]["copy_tb_per_s"]
    return scaled, f" (scaled from {target.bound:g} by copy bandwidth)"


def verdict(result: Result) -> list[str]:
    """The table of targets, in markdown."""
    lines = ["| 27648 x 5120 | µs | target | measured | verdict |", "|---|---|---|---|---|"]
    for target in TARGETS:
        cell = find(result, target.direction, LAYER, target.m)
        our = median(cell, target.column, target.mode)
        bound, remark = bound_on(target, result)
        if target.rival == "µs":
            value, text, met = our, f"≤ {bound:.1f} µs{remark}", our is not None and our <= bound
        else:
            value = ratio(cell, target.mode, target.rival, target.column)
            text, met = f"≥ {bound:g}x {target.rival}", value is not None and value >= bound
        measured = "-" if value is None else f"{value:.1f}" if target.rival == "µs" else f"{value:.2f}x"
        judged = "not measured" if value is None else "met" if met else "**missed**"
        lines.append(f"| {target.what} | {'-' if our is None else f'{our:.1f}'} | {text} | {measured} | {judged} |")
    return lines


def defeats(result: Result, mode: str, rival: str) -> tuple[list[str], int]:
    """Forward and backward cells where the rival is faster, and how many were compared."""
    lost, compared = [], 0
    for cell in result["cells"]:
        factor = ratio(cell, mode, rival)
        if factor is None:
            continue
        compared += 1
        if factor >= 1:
            continue
        ours, theirs = cell["ours"][mode], cell[rival][mode]
        near = " within spread" if ours[1] < theirs[2] else ""
        direction = "" if cell["direction"] == "forward" else f" {cell['direction']}"
        lost.append(f"{cell['n']}x{cell['k']}{direction} M={cell['m']} {ours[0]:.1f} v {theirs[0]:.1f}{near}")
    return lost, compared


def peers(result: Result) -> list[str]:
    """Competitors that are neither ours nor the unquantized one."""
    names = dict.fromkeys(name for cell in result["cells"] for name in columns(cell))
    return [name for name in names if name != "bf16" and not name.startswith("ours")]


def defeat_lines(result: Result) -> Iterator[str]:
    """Per mode and peer: cells where it is faster than ours."""
    for rival in peers(result):
        for mode in MODES:
            lost, compared = defeats(result, mode, rival)
            if compared:
                yield f"- slower than {rival}, {mode}: {len(lost)} of {compared}. " + "; ".join(lost)


def grid(result: Result, direction: str, mode: str, rivals: tuple[str, ...]) -> list[str]:
    """Ratios rival / ours: a row per layer, a column per M; more than 1 is faster than the rival."""
    cells = [c for c in result["cells"] if c["direction"] == direction and median(c, "ours", mode) is not None]
    if not cells:
        return []
    tokens = sorted({cell["m"] for cell in cells})
    lines = [f"| {direction}, {mode}: {' · '.join(rivals)} / ours | {' | '.join(f'M={m}' for m in tokens)} |"]
    lines.append("|---" * (len(tokens) + 1) + "|")
    for layer in dict.fromkeys(cell["layer"] for cell in cells):
        row = []
        for m in tokens:
            factors = [ratio(find(result, direction, layer, m), mode, rival) for rival in rivals]
            row.append(" · ".join("-" if factor is None else f"{factor:.2f}" for factor in factors))
        first = next(cell for cell in cells if cell["layer"] == layer)
        lines.append(f"| {layer} {first['n']}x{first['k']} | {' | '.join(row)} |")
    return [*lines, ""]


def head(result: Result) -> list[str]:
    """Where, when, with what, and what the card reached."""
    smi, ceilings = result.get("smi", {}), result["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        f"{result['device']}, driver {smi.get('driver_version', '?')}, {versions}; commit {result['commit']}, "
        f"{result['date']}; SM clock {smi.get('clocks.sm', '?')} of {smi.get('clocks.max.sm', '?')}, "
        f"power limit {smi.get('power.limit', '?')}.",
        f"This card in this run: copy {ceilings['copy_tb_per_s']:.2f} TB/s, "
        f"bf16 {ceilings['bf16_tflop_per_s']:.0f} TFLOP/s at 8192³.",
    ]


def sections(result: Result) -> list[list[str]]:
    """What answers whether the targets are met: head, verdict, defeats, grids."""
    directions = {"forward": ("bf16", "humming"), "dx": ("bf16",), "pair": ("bf16",)}
    grids: list[str] = []
    for direction, rivals in directions.items():
        for mode in MODES:
            grids += grid(result, direction, mode, rivals)
    return [[*head(result), ""], [*verdict(result), ""], [*defeat_lines(result), ""], grids]


def closing(result: Result) -> str:
    """The same for a terminal that shows the end: what matters most comes last."""
    return "\n".join(line for section in reversed(sections(result)) for line in section)


def table(result: Result, direction: str, layer: str) -> list[str]:
    """All columns of a layer: replay / plain, median (least–most)."""
    rows = [c for c in result["cells"] if c["direction"] == direction and c["layer"] == layer]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in columns(row)))
    lines = [f"### {layer}, {rows[0]['n']} x {rows[0]['k']}, {direction}", ""]
    lines += ["| M | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        texts = [" / ".join(spread(row[name][mode]) for mode in MODES if mode in row.get(name, {})) for name in names]
        lines.append(f"| {row['m']} | " + " | ".join(text or "-" for text in texts) + " |")
    return [*lines, ""]


def spread(times: list[float]) -> str:
    """Median (least–most); no brackets where all three round to the same."""
    middle, least, most = (f"{value:.1f}" if value < 1000 else f"{value:.0f}" for value in times)
    return middle if least == most else f"{middle} ({least}–{most})"


def host_lines(result: Result) -> list[str]:
    """Host time of a call, per competitor: a row per cell that has it."""
    cells = [c for c in result["cells"] if any("host" in c[name] for name in columns(c))]
    if not cells:
        return []
    names = list(dict.fromkeys(name for c in cells for name in columns(c) if "host" in c[name]))
    lines = ["### Host time of a forward call, µs", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for cell in cells:
        texts = [str(cell.get(name, {}).get("host", "-")) for name in names]
        lines.append(f"| {cell['n']}x{cell['k']} M={cell['m']} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def markdown(result: Result) -> str:
    """The whole report."""
    lines = ["# Kernels side by side", ""]
    lines += [line for section in sections(result) for line in section]
    lines += [
        "Tables below: µs per call, graph replay / single call, each median (least–most) over rounds in which all",
        "columns of a cell take turns. L2 is overwritten before every sample. `dx` dequantizes anew at every call, if",
        "it does at all; `pair` is forward and dx of one linear, as activation checkpointing makes them; `lora` adds",
        "h · Bᵀ of rank 32. Errors against float64 and every spread are in the JSON.",
        "",
    ]
    if result.get("bandwidth"):
        rates = ", ".join(f"{name} {rate:.2f}" for name, rate in result["bandwidth"].items())
        lines += [f"Bandwidth at 27648 x 5120, TB/s: {rates}", ""]
    lines += host_lines(result)
    for layer in dict.fromkeys(cell["layer"] for cell in result["cells"]):
        for direction in ("forward", "dx", "pair", "lora"):
            lines += table(result, direction, layer)
    return "\n".join(lines).rstrip() + "\n"
