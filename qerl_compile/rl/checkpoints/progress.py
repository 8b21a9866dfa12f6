"""How far a run is, and which run it is.

`Progress` is the counters that the loop needs to go on. `Identity` is what must be the same for the rest of the run to
be the rest of *that* run: the recipe, the base model, the number of ranks. A resumed run equals an uninterrupted one
bit by bit or it is refused, with the key that differs; whoever wants to go on otherwise starts a new run from the
checkpoint's adapter (`--adapter RUN/checkpoints/step-000025/adapter`).

No generator of noise or of samples is here, and none is needed: σ is a function of the step and the draws are of seeds
derived from (seed, purpose, step, position).

The base is told apart by a fingerprint, BLAKE2b over the names, dtypes, shapes and 256 evenly spaced elements of every
frozen tensor: a directory may move, a fine-tune of the same architecture differs in almost any element, and reading it
all would take seconds for each start of a 32B model. It is no defence against somebody who wants two models to look
alike. Versions of libraries are recorded and compared by `version_changes`: another torch may round differently, which
is worth a warning and no refusal.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from qerl_compile.errors import ExportError, RecipeError
from qerl_compile.recipe import Recipe
from qerl_compile.wording import refuse_checkpoint, shown

FORMAT_VERSION = 1
SAMPLED_ELEMENTS = 256
_DO_NEW = "Start a new run from the checkpoint's adapter with --adapter, or resume with what the run began with."
_DO_FOREIGN = "Do not use this checkpoint; another program wrote it."


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the loop had done. Invariants: `step` >= 0, and every number is a natural one."""

    step: int
    """Finished steps; the next is `step + 1`."""
    cursor: int
    """Position in the task's stream of the next training row."""
    seen_tokens: int
    """Prompt and completion tokens so far: the metric `num_tokens`."""
    bad_steps: int = 0
    """Steps in a row, up to this one, that were not finite."""
    stage: int = 0
    """Stage of the curriculum."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the loop needs: JSON values only."""

    def __post_init__(self) -> None:
        for name in ("step", "cursor", "seen_tokens", "bad_steps", "stage"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                do = "This is a defect of qerl-compile."
                raise ExportError(where=f"progress: {name}", expected="an integer >= 0", got=shown(value), do=do)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which run it is. Two with different `recipe`, `base_fingerprint` or `world_size` are different runs."""

    recipe: Recipe
    """With every override applied."""
    base: str = field(compare=False)
    """What the base model is called, wherever it lies now; goes into adapter_config.json and into messages."""
    base_fingerprint: str
    """From `base_fingerprint`."""
    world_size: int = 1
    """Ranks of data parallel training: their number decides the order of additions."""


def identity(model: nn.Module, recipe: Recipe, *, base: str, world_size: int = 1) -> Identity:
    """Return the identity of a run that trains `model`; made once, before the first step."""
    return Identity(recipe=recipe, base=base, base_fingerprint=base_fingerprint(model), world_size=world_size)


def base_fingerprint(model: nn.Module) -> str:
    """Return 32 hex digits that tell base models apart; what is trained, and noise, do not enter."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if name in trained:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat_E = tensor.detach().reshape(-1)
        if len(flat_E):
            at_E = torch.linspace(0, len(flat_E) - 1, min(len(flat_E), SAMPLED_ELEMENTS), dtype=torch.float64).long()
            some_E = flat_E.view(torch.uint8).view(len(flat_E), -1)[at_E.to(flat_E.device)]
            digest.update(some_E.cpu().numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what decides the bits of a step."""
    found = {"python": platform.python_version(), "device": _device()}
    for package in ("qerl-compile", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else platform.machine()


def encode(identity: Identity, progress: Progress) -> bytes:
    """Return the contents of progress.json.

    Raises:
        ExportError: `extra` holds what JSON does not give back as it was.
    """
    data = {
        "format_version": FORMAT_VERSION,
        "progress": asdict(progress),
        "recipe": identity.recipe.model_dump(mode="json"),
        "recipe_sha256": identity.recipe.sha256,
        "base": identity.base,
        "base_fingerprint": identity.base_fingerprint,
        "world_size": identity.world_size,
        "versions": versions(),
    }
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
        is_kept = json.loads(text)["progress"]["extra"] == progress.extra
    except (TypeError, ValueError) as fault:
        is_kept, text = False, str(fault)
    if not is_kept:
        expected = "values that JSON gives back as they were"
        do = "Use lists for tuples, texts for keys, finite numbers."
        raise ExportError(where="progress: extra", expected=expected, got=shown(progress.extra), do=do)
    return text.encode() + b"\n"


def decode(data: Any, where: str) -> tuple[Identity, Progress, dict[str, str]]:
    """Return identity, progress and versions from the parsed progress.json.

    Raises:
        CheckpointError: it is not what `encode` makes, or a newer qerl-compile wrote it.
    """
    got = data.get("format_version") if isinstance(data, dict) else data
    if type(got) is not int or got != FORMAT_VERSION:
        do = "Use the qerl-compile that wrote it."
        refuse_checkpoint(f"{where}: format_version", str(FORMAT_VERSION), shown(got), do=do)
    try:
        recipe = Recipe.from_dict(data["recipe"], where=f"{where}: recipe")
        names = {each.name for each in fields(Progress)}
        if data["progress"].keys() != names or not isinstance(data["progress"]["extra"], dict):
            raise ValueError(f"progress {shown(data['progress'])}")
        progress = Progress(**data["progress"])
        who = Identity(
            recipe=recipe,
            base=_typed(data, "base", str),
            base_fingerprint=_typed(data, "base_fingerprint", str),
            world_size=_typed(data, "world_size", int),
        )
        versions = {str(key): str(value) for key, value in _typed(data, "versions", dict).items()}
    except (KeyError, ValueError, TypeError, AttributeError, ExportError, RecipeError) as fault:
        got = f"{type(fault).__name__}: {fault}"[:400]
        refuse_checkpoint(where, "the progress of a run", got, do=_DO_FOREIGN)
    return who, progress, versions


def _typed(data: dict[str, Any], key: str, kind: type) -> Any:
    if type(data[key]) is not kind:
        raise TypeError(f"{key} is {shown(data[key])}")
    return data[key]


def refuse_other_run(saved: Identity, own: Identity, where: str) -> None:
    """Refuse to go on with another recipe, base model or number of ranks.

    Raises:
        CheckpointError: names the first key that differs, with both values; `expected` is what the run began with.
    """
    if saved.recipe != own.recipe:
        there, here = _flat(saved.recipe.model_dump(mode="json")), _flat(own.recipe.model_dump(mode="json"))
        key = next(key for key in {**there, **here} if there.get(key, "nothing") != here.get(key, "nothing"))
        expected, got = (f"{key} = {shown(each.get(key, 'nothing'))}" for each in (there, here))
        refuse_checkpoint(f"{where}: recipe: {key}", expected, got, do=_DO_NEW)
    if saved.base_fingerprint != own.base_fingerprint:
        expected = f"the base model that the run began with, {shown(saved.base)} ({saved.base_fingerprint[:8]})"
        got = f"{shown(own.base)} ({own.base_fingerprint[:8]}): its frozen tensors differ"
        refuse_checkpoint(f"{where}: base_fingerprint", expected, got, do=_DO_NEW)
    if saved.world_size != own.world_size:
        expected, got = f"{saved.world_size} ranks, as the run began", str(own.world_size)
        refuse_checkpoint(f"{where}: world_size", expected, got, do=f"Start it on {saved.world_size} ranks.")


def version_changes(saved: dict[str, str]) -> list[str]:
    """Return what is not as it was when the checkpoint was written, such as `torch 2.12.0 → 2.13.0`."""
    now = versions()
    return [f"{key} {saved[key]} → {now[key]}" for key in now if key in saved and saved[key] != now[key]]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by key path, as recipes write them: `lora[0].rank`."""
    if isinstance(value, dict):
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {path: value}
    return {key: leaf for name, item in items for key, leaf in _flat(item, name).items()}
