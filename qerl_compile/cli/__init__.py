"""The command line: `qerl-compile plan | transform | train | eval | report | generate | export | inspect | diff`.

Each command checks its input, does one thing through the same functions that Python users call, and ends with what
was written and the next command. Errors that a user can mend are one sentence in red and exit code 2; anything else
is a defect of ours and keeps its traceback.

Commands live in modules of their own and import what they need when they run, so that `--help` costs no torch.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from qerl_compile.cli.diff import diff
from qerl_compile.cli.eval import evaluate
from qerl_compile.cli.export import export
from qerl_compile.cli.generate import generate
from qerl_compile.cli.inspect import inspect
from qerl_compile.cli.plan import plan
from qerl_compile.cli.report import report
from qerl_compile.cli.train import train
from qerl_compile.cli.transform import transform
from qerl_compile.errors import QerlError


class Commands(TyperGroup):
    """The commands, with our errors told in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for; exit with code 2 on an error that the user can mend."""
        try:
            return super().invoke(ctx)
        except QerlError as fault:
            from qerl_compile.cli.console import tell_error

            tell_error(fault)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="qerl-compile",
    help="Turn a causal LM into a 4-bit model you can do RL on, and then serve.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (plan, transform, train, report, generate, export, inspect, diff):
    app.command()(command)
app.command("eval")(evaluate)  # `eval` is a name of Python's


def main() -> None:
    """Run the command line."""
    app()
