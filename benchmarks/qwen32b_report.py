"""Rows of qwen32b.py as a page: `python -m benchmarks.qwen32b report A.json B.json > benchmarks/results/qwen32b.md`."""

import argparse
from collections.abc import Iterable
from typing import Any

from benchmarks.qwen32b_phases import PHASES
from benchmarks.qwen32b_predict import PHASES as PEAKS
from benchmarks.qwen32b_rows import GB, read, table

LIMIT_GB = 75
# QeRL's own table for 32B on an H100, prompts of 256 tokens and at most 2048 new ones (design/method.md).
QERL_STEP_S = {2: 10.6, 8: 12.2}
STEP_KEYS = ("size", "recipe", "rows", "prompt_tokens", "recompute", "settings")
NAMED_SETTINGS = (
    "optimizer",
    "rollout_cache",
)  # told beside the recipe where a run did not leave them at their default

Rows = list[dict[str, Any]]


def run(options: argparse.Namespace) -> None:
    """Print the page."""
    print("\n".join(page(read(options.json))))


def page(rows: Rows) -> list[str]:
    """All sections of which there are rows."""
    out = ["# 32 billion parameters on one GPU", "", *_provenance(rows), ""]
    sections = {"grpo": steps, "update": updates, "profile": profiles, "qlora": qlora, "compile": compiling}
    for part, section in sections.items():
        mine = [row for row in rows if row["part"] == part or (part == "profile" and row["part"] == "grpo")]
        if mine:
            out += section(mine)
    return out


def _provenance(rows: Rows) -> list[str]:
    cards = sorted({row["device"] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    torches = sorted({row["torch"] for row in rows})
    dates = sorted(row["date"] for row in rows)
    measured = next((row["ceilings"] for row in rows if "ceilings" in row), None)
    said = (
        f"; copy {measured['copy_tb_per_s']:.2f} TB/s, bf16 {measured['bf16_tflop_per_s']:.0f} TFLOP/s in the same run"
        if measured
        else ""
    )
    return [
        f"{', '.join(cards)}, torch {', '.join(torches)}, commit {', '.join(commits)}, {dates[0]} to {dates[-1]}{said}."
        " Qwen2.5 shapes with random weights, rank-32 adapters on seven linears, noise on, one GPU; "
        "`benchmarks/qwen32b.py`. GB are 1e9 bytes.",
    ]


def _newest(rows: Iterable[dict[str, Any]], *keys: str) -> Rows:
    """The last row of each kind, in the order of their first."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(str(row[key]) for key in keys)] = row
    return list(found.values())


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["size"], row["rows"], row["new"], row["micro_batch_tokens"], row["recompute"])


def _recipe(row: dict[str, Any]) -> str:
    """Its name, and settings that change what a step is."""
    return ", ".join([row["recipe"], *(row["settings"][key] for key in NAMED_SETTINGS if key in row["settings"])])


def _sorted(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: (float(row["size"].rstrip("B").replace("tiny", "0")), row["rows"]))


def steps(rows: Rows) -> list[str]:
    """GRPO steps, and what was predicted for them."""
    rows = _sorted(_newest(rows, *STEP_KEYS))
    dense = {_kind(row): row for row in rows if row["recipe"] == "bf16"}
    lines = []
    for row in rows:
        other = dense.get(_kind(row)) if row["recipe"] != "bf16" else None
        peak = max(row["peak_bytes"].values()) / GB
        lines.append(
            [
                row["size"], _recipe(row), f"{row['prompts']} x {row['rows'] // row['prompts']}",
                f"{row['prompt_tokens']} / {row['new']}", f"{row['rollout_s']:.2f}",
                f"{row['logprob_s']:.2f}" if "logprob_s" in row else "–", f"{row['update_s']:.2f}",
                f"**{row['total_s']:.2f}**", f"{other['total_s'] / row['total_s']:.2f}" if other else "–",
                f"{row['tokens_per_s']:.0f}", *(f"{row['peak_bytes'][name] / GB:.1f}" for name in PEAKS),
                f"{'yes' if peak <= LIMIT_GB else '**no**'}",
            ]
        )  # fmt: skip
    settings = sorted({(row["size"], row["micro_batch_tokens"], row["recompute"]) for row in rows})
    said = "; ".join(f"{size}: {tokens}, recompute {'on' if again else 'off'}" for size, tokens, again in settings)
    quoted = ", ".join(f"{seconds} s/step with {count} sequences" for count, seconds in QERL_STEP_S.items())
    out = [
        "## One GRPO step",
        "",
        f"Prompts x completions each; every completion has its full length. Micro-batch tokens {said}. The step makes "
        "no pass of its own for log-probabilities (one update per rollout): the column is such a pass without "
        "gradients, measured beside it, and not in the total. Tokens per second are those of the rollout, rewards "
        "included. Memory is what torch allocated at most in each phase; the rollout's pages stay during the update.",
        "",
        *table(
            ["model", "recipe", "sequences", "in / out", "rollout s", "log-prob s", "update s", "total s",
             "bf16 / this", "tok/s", "after load GB", "rollout peak", "update peak", f"<= {LIMIT_GB} GB"],
            lines,
        ),
        f"For context, not a target: QeRL reports {quoted} on an H100 for 32B, with at most 2048 new tokens, while "
        "here every completion has 2048; its bf16 LoRA runs out of memory there.",
        "",
    ]  # fmt: skip
    told = [row for row in rows if "predicted_bytes" in row]
    if told:
        out += predictions(told)
    return out


def predictions(rows: Rows) -> list[str]:
    """Predicted beside measured memory."""
    lines, ratios = [], []
    for row in rows:
        pairs = [(row["predicted_bytes"][name], row["peak_bytes"][name]) for name in PEAKS]
        ratios += [guess / size for guess, size in pairs if size]
        lines.append(
            [row["size"], _recipe(row), f"{row['rows']} x {row['new']}"]
            + [
                f"{guess / GB:.2f} / {size / GB:.2f} ({f'{guess / size:.2f}' if size else '–'})"
                for guess, size in pairs
            ]
        )
    span = f"Ratios from {min(ratios):.2f} to {max(ratios):.2f}." if ratios else ""
    head = ["model", "recipe", "sequences", "after load", "rollout peak", "update peak"]
    return ["## Memory: predicted / measured, GB (ratio)", "", *table(head, lines), span, ""]


def updates(rows: Rows) -> list[str]:
    """The update with other settings."""
    lines = [
        [
            row["size"], row["recipe"], f"{row['rows']} x ({row['prompt_tokens']} + {row['new']})",
            str(row["micro_batch_tokens"]), "on" if row["recompute"] else "off", f"{row['update_s']:.2f}",
            f"{row['peak_bytes']['update'] / GB:.1f}",
        ]
        for row in _sorted(_newest(rows, "size", "recipe", "rows", "new", "micro_batch_tokens", "recompute"))
    ]  # fmt: skip
    head = ["model", "recipe", "tokens", "micro-batch tokens", "recompute", "update s", "peak GB, without pages"]
    return ["## The update alone, with other settings", "", *table(head, lines)]


def profiles(rows: Rows) -> list[str]:
    """Where the time of a step goes."""
    out = [
        "## Where the time of a step goes",
        "",
        "Seconds, share of the step, and in brackets how many times the floor that is. Floors: the bytes and the "
        "products that a phase cannot do without, at the copy bandwidth and the rate of a large product that this card "
        "reached in the same run (benchmarks/qwen32b_phases.py says which). Backward holds the recompute pass where it "
        "is on, in time and floor, and gradient clipping, in time.",
        "",
    ]
    lines = []
    for row in _sorted(_newest(rows, *STEP_KEYS)):
        cells = []
        for name in PHASES:
            seconds, floor = row["phases_s"][name], row["floors_s"][name]
            times = f" ({seconds / floor:.1f}x)" if floor else ""
            cells.append(f"{seconds:.3f}, {seconds / row['total_s']:.0%}{times}")
        whole = f"**{row['total_s']:.2f}** ({row['total_s'] / sum(row['floors_s'].values()):.1f}x)"
        lines.append([row["size"], _recipe(row), f"{row['rows']} x {row['new']}", whole, *cells])
    return out + table(["model", "recipe", "sequences", "step", *PHASES], lines)


def qlora(rows: Rows) -> list[str]:
    """The training step against bitsandbytes."""
    rows = _newest(rows, "size", "model", "rows", "tokens", "rows_at_a_time", "recompute")
    ours = {(r["size"], r["recompute"], r["rows_at_a_time"]): r for r in rows if r["model"] == "nvfp4"}
    lines = []
    for row in rows:
        what = [row["size"], row["model"], f"{row['rows']} x {row['tokens']}", str(row["rows_at_a_time"])]
        what.append("on" if row["recompute"] else "off")
        if "out_of_memory" in row:
            lines.append([*what, "out of memory", "–", "–", "–", "–"])
            continue
        best = ours.get((row["size"], row["recompute"], row["rows_at_a_time"]), {})
        ratio = f"{row['step_s'] / best['step_s']:.2f}" if "step_s" in best else "–"
        memory = [f"{row[name] / GB:.1f}" for name in ("after_load", "peak")]
        lines.append([*what, f"{row['step_s'] * 1e3:.0f}", f"{row['tokens_per_s']:.0f}", ratio, *memory])
    head = ["model", "weights", "tokens", "rows at a time", "recompute", "ms/step", "tok/s", "this / ours NVFP4",
            "after load GB", "peak GB"]  # fmt: skip
    return [
        "## The training step against QLoRA",
        "",
        "Forward, loss, backward and AdamW on the adapters; the same random tokens, loss code (chunked head), "
        "optimizer and adapters. `nf4` is Hugging Face + PEFT + bitsandbytes, NF4 with double quantization, eager, "
        "under autocast to bf16; `nf4-compiled` has each layer under torch.compile. Median of the timed "
        "steps; one after the other.",
        "",
        *table(head, lines),
    ]


def compiling(rows: Rows) -> list[str]:
    """Seconds to the first training step."""
    lines = []
    for row in _newest(rows, "size", "recipe", "layers"):
        for name in ("cold", "warm"):
            each = row[name]
            first, second = each["first"], each["second"]
            lines.append(
                [
                    row["size"], row["recipe"], str(row["layers"]), name, f"{each['built_s']:.1f}",
                    f"{first['rollout_s']:.1f}", f"{first['update_s']:.1f}", f"**{first['total_s']:.1f}**",
                    f"{second['total_s']:.1f}", f"{each['compiling_s']:.1f}", f"{each['process_s']:.1f}",
                    f"{each['graphs']} ({each['dynamo_graphs']})",
                    " / ".join(str(count) for count in each["caches"].values()),
                ]
            )  # fmt: skip
    head = ["model", "recipe", "layers", "caches", "model made s", "first rollout s", "first update s",
            "first step s", "second step s", "difference s", "whole process s", "graphs, ours (all)",
            "hit / miss / bypass: FX graph, AOTAutograd"]  # fmt: skip
    return [
        "## Seconds to the first training step",
        "",
        "Two processes one after the other, the first with empty Inductor and Triton caches. The second step is the "
        "first without compiling.",
        "",
        *table(head, lines),
    ]
