"""Run directories: what a training run leaves behind, and how a later command opens it.

RUN/run.json        model, task, prompt format, versions: what is needed to run it again
RUN/recipe.yaml     the recipe with every override applied
RUN/metrics.jsonl   one row per step and per evaluation
RUN/samples.jsonl   the first completions of every evaluation, with their rewards
RUN/checkpoints/    what `train --resume` goes on from
RUN/adapter/        the trained adapter, in PEFT format; written last, so a run without it is unfinished
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.recipe import Recipe
from qerl_compile.staged_write import refuse_existing

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
    reward_weights: list[float] = field(default_factory=list)
    teacher: str | None = None
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path, recipe: Recipe) -> None:
        """Write run.json and recipe.yaml into `directory`."""
        import torch
        import transformers

        from qerl_compile import __version__

        versions = {"qerl_compile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        text = json.dumps({**asdict(self), "recipe_sha256": recipe.sha256, "versions": versions}, indent=2)
        (directory / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        part = directory / ".run.json.partial"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(directory / "run.json")  # last and whole: it makes the directory a run

    def refuse_other(self, directory: Path) -> None:
        """Refuse to go on in the directory of a run whose task, rewards or prompt are others.

        Raises:
            CheckpointError: naming the first that differs.
        """
        began = Run.read(directory)
        for name in (f.name for f in fields(self) if f.name != "format_version"):
            then, now = getattr(began, name), getattr(self, name)
            if then != now:
                raise CheckpointError(
                    where=f"{directory / 'run.json'}: {name}",
                    expected=f"{then!r}, as the run began",
                    got=repr(now),
                    do="Resume with the command that began the run.",
                )

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
            data = {"reward_weights": [], "teacher": None, **data}  # runs before there were any
            return cls(**{key: data[key] for key in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise CheckpointError(
                where=str(file),
                expected="the run.json of a training run",
                got=f"{type(fault).__name__}: {fault}",
                do="Pass the directory that `qerl-compile train -o` wrote.",
            ) from fault


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run directory."""
    return (Path(path) / "run.json").is_file()


def is_finished(path: str | Path) -> bool:
    """Whether the run directory `path` holds its adapter."""
    return (Path(path) / "adapter").is_dir()


def refuse_output(out: Path, *, resume: bool = False) -> None:
    """Refuse an output directory that exists, before any work starts; nothing in it is touched.

    Args:
        out: the run's directory.
        resume: whether a run that was cut off may go on there.

    Raises:
        ExportError: it exists, and not as such a run.
    """
    cut_off = is_run(out) and not is_finished(out)
    if cut_off and resume:
        return
    if cut_off:
        raise ExportError(
            where=str(out),
            expected="an output directory that does not exist yet",
            got="a training run that was cut off; its metrics.jsonl is kept",
            do="Add --resume to go on from its last checkpoint, or choose another name.",
        )
    refuse_existing(out)


@contextmanager
def run_directory(out: Path, *, first: bool = True) -> Iterator[Path]:
    """Make a run directory, or take one that was cut off up again.

    If a new run fails before its first step the directory is removed again; later, its metrics stay.

    Args:
        out: the directory.
        first: whether this is rank 0; the others make and remove nothing.

    Raises:
        ExportError: the directory cannot be made.
    """
    if not first:
        yield out
        return
    try:
        out.mkdir(parents=True, exist_ok=is_run(out))
    except OSError as fault:
        raise ExportError(
            where=str(out),
            expected="a place where a directory can be made",
            got=fault.strerror or str(fault),
            do="Choose a directory under one that exists and that you may write to.",
        ) from None
    try:
        yield out
    except BaseException:  # KeyboardInterrupt too
        metrics = out / "metrics.jsonl"
        if (out / "checkpoints").is_dir() or any(out.glob("bad-step-*.json")):
            raise  # it says itself what to look into, or goes on from there
        if metrics.is_file() and b'"reward"' in metrics.read_bytes():
            from qerl_compile.cli.console import stderr

            text = f"{out} is unfinished: it has metrics.jsonl, and no adapter"
            stderr().print(f"{text}; the same command with --resume goes on", style="yellow", markup=False)
        else:
            shutil.rmtree(out, ignore_errors=True)
        raise


def open_model(path: str, *, inner: str = "inductor", device: str | None = None) -> tuple[Any, Any, str]:
    """Load a run (its base, recipe and adapter), a model directory, or a hub id.

    Returns:
        (transformed model, tokenizer, name of the base model).

    Raises:
        CheckpointError: a run that has no adapter, or see `load`.
    """
    from qerl_compile.loading import load

    if not is_run(path):
        tokenizer = open_tokenizer(path)
        return load(path, None, inner=inner, device=device), tokenizer, base_name(path)
    run, root = Run.read(Path(path)), Path(path)
    if not is_finished(root):
        raise CheckpointError(
            where=str(root / "adapter"),
            expected="the adapter of a finished run",
            got="none: the run failed or is still going on",
            do="Go on with the command that began it and --resume; metrics.jsonl says how far it came.",
        )
    recipe = Recipe.from_file(root / "recipe.yaml")
    tokenizer = open_tokenizer(run.model)
    model = load(run.model, recipe, adapter=root / "adapter", inner=inner, device=device)
    return model, tokenizer, base_name(run.model)


def open_teacher(model: str, like: Any, tokenizer: Any) -> Any:
    """Load a dense causal LM to distill from, frozen, onto the device of the model `like`.

    Args:
        model: the teacher's directory or hub id.
        like: the student.
        tokenizer: of the student; the teacher's must have the same tokens under the same numbers.

    Raises:
        CheckpointError: there is none, the directory is hostile or damaged, or its tokens are others.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from qerl_compile.checkpoint_dir import open_checkpoint
    from qerl_compile.loading import model_directory

    root = model_directory(model)
    open_checkpoint(root, trust_remote_code=False)
    theirs, ours = open_tokenizer(model).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        other = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
        raise CheckpointError(
            where=f"--teacher {model}: tokenizer",
            expected=f"the student's tokens, {other!r} as number {ours.get(other)}",
            got=f"number {theirs.get(other)}",
            do="Choose a teacher of the same family.",
        )
    config = AutoConfig.from_pretrained(root, trust_remote_code=False).get_text_config()
    size = like.config.get_text_config().vocab_size
    if config.vocab_size != size:
        raise CheckpointError(
            where=f"--teacher {model}: vocab_size",
            expected=f"{size} logits, as the student has",
            got=str(config.vocab_size),
            do="Choose a teacher of the student's vocabulary size.",
        )
    teacher = AutoModelForCausalLM.from_pretrained(root, dtype="auto", trust_remote_code=False)
    return teacher.eval().requires_grad_(False).to(next(like.parameters()).device)


def open_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model, after its directory was judged; code in it is never run.

    Raises:
        CheckpointError: there is none, or the directory is hostile or damaged.
    """
    from transformers import AutoTokenizer

    from qerl_compile.checkpoint_dir import open_checkpoint
    from qerl_compile.loading import model_directory

    root = model_directory(model)
    open_checkpoint(root, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            where=str(root),
            expected="the files of a tokenizer",
            got=f"{type(fault).__name__}: {next(iter(str(fault).splitlines()), '')}",
            do="Copy tokenizer.json and tokenizer_config.json of the model there.",
        ) from fault


def base_name(model: str) -> str:
    """What other programs call a model: a hub id stays, a directory (that of 'smollm2' too) gets its full path."""
    from qerl_compile.loading import model_directory

    root = model_directory(model)
    return str(root.absolute()) if model == "smollm2" or Path(model).is_dir() else model
