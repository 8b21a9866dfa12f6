"""`qerl-compile report RUN… -o report.html`: what happened in one or several training runs, on one page.

Runs may be finished or going on; they are read and not written to. A run that goes on is looked at more than once, so
an earlier page is replaced without asking. It is told by `MARK` in its first kilobyte, and any other file of that name
is refused before a run is read.

What it does not do: draw or read (rl/report).
"""

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of training runs, finished or going on.")]
Page = Annotated[Path, typer.Option("-o", "--out", help="HTML file to write; an earlier report is replaced.")]
Title = Annotated[str, typer.Option(help="Heading of the page.")]

MARK = b'<meta name="generator" content="qerl-compile report">'
"""Stands in the first kilobyte of every report."""


def report(runs: Runs, out: Page = Path("report.html"), title: Title = "qerl-compile report") -> None:
    """Draw the curves of training runs over each other, with tables and completions, in one HTML file."""
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote
    from qerl_compile.cli.output_file import refuse_file, write_file

    quiet_libraries()
    refuse_file(out, ours=MARK)
    from qerl_compile.cli.hints import eval_command
    from qerl_compile.rl.report import distinct_names, read_run, render, require_matplotlib

    require_matplotlib()
    read = [read_run(path, name) for path, name in zip(runs, distinct_names(runs), strict=True)]
    write_file(out, render(read, title))
    for run in read:
        for note in run.notes:
            stdout().print(f"note  {run.name}: {note}", markup=False, highlight=False, style="yellow")
    last = next((run.path for run in reversed(read) if run.finished), runs[-1])
    what = f"{len(read)} run{'' if len(read) == 1 else 's'}, {out.stat().st_size / 2**20:.1f} MiB, nothing else needed"
    wrote(out, what, then=eval_command(last))
