"""What all commands share on the terminal: two consoles, quiet libraries, errors, and the closing lines.

Nothing that a user may copy is wrapped or read as markup: paths and commands stay as they are at any width.
"""

import functools
import logging
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def stdout() -> "Console":
    """Return the console for results."""
    from rich.console import Console

    return Console(soft_wrap=True)


@functools.cache
def stderr() -> "Console":
    """Return the console for progress and errors."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep progress bars and notices of libraries off the terminal; warnings of torch about our graphs stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # the second warns about the first
        logging.getLogger(name).setLevel(logging.ERROR)


def tell_error(fault: Exception) -> None:
    """Print an error as one red line."""
    from rich.text import Text

    stderr().print(Text.assemble(("error ", "bold red"), (" ".join(str(fault).split("\n")), "red")))


def wrote(path: object, what: str, *, then: str) -> None:
    """Print the closing lines: what was written, and the next command."""
    from rich.text import Text

    stdout().print(Text.assemble(("wrote", "bold green"), f" {path}  {what}"))
    tell_next(then)


def wrote_nothing(what: str, *, then: str) -> None:
    """Print the closing lines of a command that only shows."""
    from rich.text import Text

    stdout().print(Text(f"{what}; nothing was written", style="dim"))
    tell_next(then)


def tell_next(command: str) -> None:
    """Print the command to go on with."""
    from rich.text import Text

    stdout().print(Text.assemble(("next", "bold"), f"  {command}"))
