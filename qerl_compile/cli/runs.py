"""Run directories: what a training run leaves behind, and how a later command opens it.

RUN/run.json        model, task, prompt format, versions: what is needed to run it again
RUN/recipe.yaml     the recipe with every override applied
RUN/metrics.jsonl   one row per step and per evaluation
RUN/adapter/        the trained adapter, in PEFT format
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qerl_compile.errors import CheckpointError
from qerl_compile.recipe import Recipe

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Run:
    """What run.json holds."""

    model: str
    task: str
    rewards: list[str]
    extractor: str
    system: str | None = None
    question: str | None = None
    assistant_prefix: str | None = None
    inner: str = "inductor"
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path, recipe: Recipe) -> None:
        """Write run.json and recipe.yaml into `directory`."""
        import torch
        import transformers

        from qerl_compile import __version__

        versions = {"qerl_compile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        text = json.dumps({**asdict(self), "recipe_sha256": recipe.sha256, "versions": versions}, indent=2)
        (directory / "run.json").write_text(text + "\n", encoding="utf-8")
        (directory / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """Read run.json.

        Raises:
            CheckpointError: it is damaged, or a newer qerl-compile wrote it.
        """
        file = directory / "run.json"
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    where=f"{file}: format_version",
                    expected=str(FORMAT_VERSION),
                    got=repr(version),
                    do="Use the qerl-compile that wrote it.",
                )
            return cls(**{key: data[key] for key in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise CheckpointError(
                where=str(file),
                expected="the run.json of a training run",
                got=f"{type(fault).__name__}: {fault}",
                do="Pass the directory that `qerl-compile train -o` wrote.",
            ) from fault


def is_run(path: str) -> bool:
    """Whether `path` is a run directory."""
    return (Path(path) / "run.json").is_file()


def open_model(path: str, *, inner: str = "inductor", device: str | None = None) -> tuple[Any, Any, str]:
    """Load a run (its base, recipe and adapter), a model directory, or a hub id.

    Returns:
        (transformed model, tokenizer, name of the base model).
    """
    from transformers import AutoTokenizer

    from qerl_compile.loading import load, model_directory

    if is_run(path):
        run, root = Run.read(Path(path)), Path(path)
        recipe = Recipe.from_file(root / "recipe.yaml")
        model = load(run.model, recipe, adapter=root / "adapter", inner=inner, device=device)
        return model, AutoTokenizer.from_pretrained(model_directory(run.model), padding_side="left"), run.model
    model = load(path, None, inner=inner, device=device)
    return model, AutoTokenizer.from_pretrained(model_directory(path), padding_side="left"), path
