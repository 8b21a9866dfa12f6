"""Verdicts, defeats and tables of a result that is made up."""

import pytest

from benchmarks import kernel_report


def times(us):
    return [us, us * 0.99, us * 1.02]


def cell(direction, m, layer="32B gate/up", n=27648, k=5120, **columns):
    measured = {
        name: {mode: times(us) for mode, us in zip(kernel_report.MODES, pair, strict=True)}
        for name, pair in columns.items()
    }
    return {"direction": direction, "layer": layer, "n": n, "k": k, "m": m, **measured}


@pytest.fixture
def result():
    cells = [
        cell("forward", 1, bf16=(80, 82), ours=(26, 30), humming=(37, 40), bitsandbytes=(64, 68)),
        cell("forward", 64, bf16=(80, 82), ours=(50, 55), humming=(48, 60), bitsandbytes=(220, 230)),
        cell("forward", 64, "7B q/o", 3584, 3584, bf16=(12, 14), ours=(10, 30), humming=(10.02, 12)),
        cell("forward", 1024, bf16=(360, 360), ours=(450, 450), humming=(430, 440)),
        cell("dx", 4096, bf16=(1500, 1500), ours=(1600, 1600), bitsandbytes=(1700, 1700)),
    ]
    cells[-1][kernel_report.HELD] = {"plain": times(1510)}
    return {
        "device": "NVIDIA H200",
        "ceilings": {"copy_tb_per_s": 4.2, "bf16_tflop_per_s": 780},
        "versions": {"torch": "2.11"},
        "commit": "abc",
        "date": "2026-11-27",
        "cells": cells,
    }


def row(lines, what, target):
    return next(line for line in lines if line.startswith(f"| {what} |") and target in line)


def test_targets_are_judged_in_microseconds_and_in_ratios(result):
    lines = kernel_report.verdict(result)
    assert row(lines, "forward M=1 replay", "27.0 µs").endswith("| 26.0 | met |")
    assert row(lines, "forward M=1 replay", "2.9x bf16").endswith("| 3.08x | met |")
    assert row(lines, "forward M=64 replay", "45.0 µs").endswith("| 50.0 | **missed** |")
    assert row(lines, "forward M=1024 plain", "0.78x bf16").endswith("| 0.80x | met |")
    assert row(lines, "dx M=4096 plain", "0.92x bf16").endswith("| 0.94x | met |")
    assert row(lines, "dx M=4096 plain (one dequantize)", "0.95x bf16").endswith("| 0.99x | met |")


def test_what_was_not_measured_is_neither_met_nor_missed(result):
    assert row(kernel_report.verdict(result), "forward M=8 replay", "27.0 µs").endswith("| - | not measured |")


def test_on_another_card_memory_bound_targets_scale_with_its_copy(result):
    result.update(device="NVIDIA H100 80GB HBM3", ceilings={"copy_tb_per_s": 3.0, "bf16_tflop_per_s": 790})
    lines = kernel_report.verdict(result)
    assert "≤ 37.4 µs (scaled from 27 by copy bandwidth)" in row(lines, "forward M=1 replay", "scaled")
    assert "scaled" not in row(lines, "forward M=64 replay", "45.0 µs")


def test_defeats_name_the_cell_and_say_when_spreads_overlap(result):
    lost, compared = kernel_report.defeats(result, "replay", "humming")
    assert compared == 4
    assert lost == ["27648x5120 M=64 50.0 v 48.0", "27648x5120 M=1024 450.0 v 430.0"]
    lost, _ = kernel_report.defeats(result, "plain", "humming")
    assert lost == ["3584x3584 M=64 30.0 v 12.0", "27648x5120 M=1024 450.0 v 440.0 within spread"]


def test_the_summary_has_a_grid_per_direction_and_every_peer(result):
    text = kernel_report.closing(result)
    assert "| 32B gate/up 27648x5120 | 3.08 · 1.42 | 1.60 · 0.96 | 0.80 · 0.96 |" in text
    assert "| 7B q/o 3584x3584 | - · - | 1.20 · 1.00 | - · - |" in text
    assert "- slower than bitsandbytes, plain: 0 of 3." in text
    assert "slower than bf16" not in text


def test_tables_show_both_modes_with_their_spread(result):
    text = kernel_report.markdown(result)
    assert "### 7B q/o, 3584 x 3584, forward" in text
    assert "80.0 (79.2–81.6) / 82.0 (81.2–83.6)" in text
    assert kernel_report.spread([1600.2, 1599.9, 1600.4]) == "1600"


def test_the_summary_of_a_full_run_fits_what_the_device_tool_shows():
    """12,000 characters; here with one defeat in ten."""
    layers = [("32B gate/up", 27648, 5120), ("32B down", 5120, 27648)] + [(f"layer {i}", 18944, 3584) for i in range(6)]
    cells = []
    for direction in ("forward", "dx", "pair"):
        for index, shape in enumerate(layers):
            for m in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192):
                peer = {"humming": (90.5, 90.5)} if direction == "forward" else {}
                ours = (95.5, 95.5) if (index + m) % 10 == 0 else (80.5, 80.5)
                cells.append(cell(direction, m, *shape, bf16=(100.5, 100.5), ours=ours, **peer))
    result = {
        "device": "NVIDIA H200",
        "ceilings": {"copy_tb_per_s": 4.2, "bf16_tflop_per_s": 780},
        "versions": {},
        "commit": "abc",
        "date": "",
        "cells": cells,
    }
    text = kernel_report.closing(result)
    assert len(text.encode()) < 11_500
    assert text.index("| forward, replay") < text.index("- slower than humming") < text.index("| 27648 x 5120 |")
