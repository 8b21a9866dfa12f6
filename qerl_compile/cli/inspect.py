"""`qerl-compile inspect DIR`: format, sizes, layers, scale statistics and faults of a checkpoint, ours or not.

Layers that differ only in a number are one line of the table, and the worst of them is shown:

    amax      largest decoded magnitude                 zero    share of blocks whose codes are all zero
    scales    block scales, smallest and largest        bits    entropy of the codes; 4 is the most
    <2^-6     share of block scales below 2^-6          dB      signal to noise against the base

`--json` has each layer by itself, and all faults.
"""

import json
import re
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from qerl_compile.checkup import Fault, LayerReport, Report

Directory = Annotated[str, typer.Argument(help="Model directory, Hugging Face id, or smollm2.")]
Against = Annotated[
    str | None, typer.Option(help="The dense model that it was made from: adds signal to noise, and finds swaps.")
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")]

MAX_PLACES = 3


def inspect(model: Directory, against: Against = None, json_: Json = False) -> None:
    """Tell what a checkpoint is and what is wrong with it. Exit code 1 if a fault is fatal."""
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote_nothing

    quiet_libraries()
    from qerl_compile.checkup import inspect_checkpoint
    from qerl_compile.loading import model_directory

    base = None if against is None else model_directory(against)
    report = inspect_checkpoint(model_directory(model), against=base)
    if json_:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        stdout().print(_headline(report), markup=False, highlight=False)
        if report.layers:
            stdout().print(_table(report.layers))
        for note in report.notes:
            stdout().print(f"note  {note}", markup=False, highlight=False, style="dim")
        for same in _by_code(report.faults):
            stdout().print(_told(same))
        wrote_nothing(_verdict(report), then=_next(model, report))
    if report.fatal:
        raise typer.Exit(1)


def _headline(report: "Report") -> str:
    bits = report.bits_per_weight
    packed, dense = len(report.packed), len(report.layers) - len(report.packed)
    size = f"{report.size_bytes / 2**20:,.1f} MiB in {report.tensor_count} tensors"
    files = f"{report.shard_count} file" + ("" if report.shard_count == 1 else "s")
    linears = f"{packed} linears packed" + (f" at {bits:.2f} bits a weight" if bits else "") + f", {dense} dense"
    author = f", written by {report.producer}" if report.producer else ""
    return f"{report.path}\n{report.format}{author}; {size}, {files}; {linears}"


def _table(layers: "tuple[LayerReport, ...]") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("linear", no_wrap=True)
    for heading in ("count", "shape", "amax", "scales", "<2^-6", "zero", "bits", "dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds: dict[tuple[str, str, int, int], list[LayerReport]] = {}
    for layer in layers:
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.path), layer.kind, layer.rows, layer.columns)
        kinds.setdefault(key, []).append(layer)
    for (path, kind, rows, columns), members in kinds.items():
        row = [re.sub(r"^.*\.\*\.", "*.", path), str(len(members)), f"{rows}×{columns}"]
        table.add_row(*row, *_numbers(members), style=None if kind == "packed" else "dim")
    return table


def _numbers(members: "list[LayerReport]") -> list[str]:
    numbers = [member.numbers for member in members if member.numbers is not None]
    if not numbers:
        return ["dense" if members[0].kind == "dense" else "?"]
    ratios = [member.sqnr_db for member in members if member.sqnr_db is not None]
    return [
        f"{max(each.amax for each in numbers):.3g}",
        f"{min(each.block_min for each in numbers):.3g}–{max(each.block_max for each in numbers):.3g}",
        f"{max(each.subnormal for each in numbers):.1%}",
        f"{max(each.zero_blocks for each in numbers):.1%}",
        f"{min(each.entropy_bits for each in numbers):.2f}",
        f"{min(ratios):.1f}" if ratios else "",
    ]


def _by_code(faults: "tuple[Fault, ...]") -> "list[list[Fault]]":
    codes: dict[str, list[Fault]] = {}
    for fault in faults:
        codes.setdefault(fault.code, []).append(fault)
    return list(codes.values())


def _told(same: "list[Fault]") -> "Text":
    from rich.text import Text

    first = same[0]
    text = Text.assemble(
        (first.severity, "bold red" if first.severity == "fatal" else "bold yellow"), f"  {first.code}"
    )
    for fault in same[:MAX_PLACES]:
        text.append(f"\n    {fault.where}: {fault.found}")
    if len(same) > MAX_PLACES:
        text.append(f"\n    and {len(same) - MAX_PLACES} more; --json lists them")
    text.append(f"\n    breaks  {first.effect}\n    do      {first.do}", style="dim")
    return text


def _verdict(report: "Report") -> str:
    fatal = sum(fault.severity == "fatal" for fault in report.faults)
    warnings = len(report.faults) - fatal
    return f"{fatal} fatal faults, {warnings} warnings" if report.faults else "no fault found"


def _next(model: str, report: "Report") -> str:
    from qerl_compile.cli.hints import train_command, transform_command

    if report.fatal:
        return shlex.join(["qerl-compile", "inspect", model, "--json"])
    return train_command(model) if report.packed else transform_command(model)
