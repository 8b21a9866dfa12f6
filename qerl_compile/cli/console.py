"""What all commands share on the terminal: two consoles, quiet libraries, and the closing lines."""

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

    return Console()


@functools.cache
def stderr() -> "Console":
    """Return the console for progress and errors."""
    from rich.console import Console

    return Console(stderr=True)


def quiet_libraries() -> None:
    """Keep progress bars and notices of libraries off the terminal; warnings of torch about our graphs stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torchao").setLevel(logging.ERROR)


def wrote(path: object, what: str, *, then: str) -> None:
    """Print the closing lines: what was written, and the next command."""
    stdout().print(f"[bold green]wrote[/] {path}  {what}")
    stdout().print(f"[bold]next[/]  {then}", highlight=False, markup=True, soft_wrap=True)
