"""The command line: `qerl-compile transform | train | generate | export | diff`.

Each command checks its input, does one thing through the same functions that Python users call, and ends with what
was written and the next command. Errors that a user can mend are one sentence in red and exit code 2; anything else
is a defect of ours and keeps its traceback.

Commands live in modules of their own and import what they need when they run, so that `--help` costs no torch.
"""

import sys

import typer

from qerl_compile.cli.diff import diff
from qerl_compile.cli.export import export
from qerl_compile.cli.generate import generate
from qerl_compile.cli.train import train
from qerl_compile.cli.transform import transform

app = typer.Typer(
    name="qerl-compile",
    help="Turn a causal LM into a 4-bit model you can do RL on, and then serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (transform, train, generate, export, diff):
    app.command()(command)


def main() -> None:
    """Run the command line; exit code 0 on success, 2 for an error that the user can mend."""
    from qerl_compile.errors import QerlError

    try:
        app()
    except QerlError as fault:
        from qerl_compile.cli.console import stderr

        stderr().print(f"[bold red]error[/] [red]{type(fault).__name__}[/]", end=" ")
        stderr().print(str(fault), markup=False, highlight=False)
        sys.exit(2)
