"""What is done to a model, as one frozen value: quantize rules, LoRA rules, noise, training settings.

A recipe is data and nothing else. It names no Python objects, sets no environment variables and imports nothing; the
same file on another machine means the same run, and `sha256` says whether two recipes are the same. Within `quantize`
and within `lora` the first rule that matches a module wins.

    version: 1
    name: qerl-nvfp4-aqn
    quantize: [{match: '(.*\\.)?layers\\.\\d+\\.(.*\\.)?\\w+_proj', format: nvfp4}]
    lora:     [{match: '(.*\\.)?layers\\.\\d+\\.(.*\\.)?\\w+_proj', rank: 32, alpha: 32}]
    noise:    {sigma_start: 1e-2, sigma_end: 5e-4, stages: 10}
    train:    {steps: 600, learning_rate: 1e-5}

Four recipes are built in and are the ablations of the paper: `qerl-nvfp4-aqn`, `nvfp4-lora`, `bf16-lora` and
`bf16-lora-aqn`. One value is changed without a new file by an override, `train.learning_rate=2e-4`, which the command
line calls `--set`.

What this module does not do: know any model (plan.py matches rules against modules and refuses a rule that matches
nothing) or describe a task (rl/ does).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError

from qerl_compile.errors import RecipeError
from qerl_compile.recipe_errors import key_path, recipe_error
from qerl_compile.recipe_fields import (
    CalibrationConfig,
    LoraRule,
    NoiseConfig,
    Part,
    Pattern,
    QuantizeRule,
    SparsityRule,
    TrainConfig,
)
from qerl_compile.recipe_yaml import MAX_BYTES, parse_yaml
from qerl_compile.wording import nearest, printable, shown

__all__ = [
    "CalibrationConfig",
    "LoraRule",
    "NoiseConfig",
    "QuantizeRule",
    "Recipe",
    "SparsityRule",
    "TrainConfig",
    "builtin_names",
]

VERSION = 1
_BUILTIN = Path(__file__).parent / "recipes"


class Recipe(Part):
    """What is done to a model. Invariants: frozen, no unknown keys, every number within its bounds."""

    version: Literal[1] = VERSION
    """Version of the recipe format. Newer ones are refused by name."""

    name: str = Field(default="unnamed", min_length=1, max_length=200)
    """What reports and model cards call it; a file without it is called after its file name."""

    quantize: tuple[QuantizeRule, ...] = ()
    """Rules for the storage of linear weights; a linear that no rule matches stays dense."""

    sparsify: tuple[SparsityRule, ...] = ()
    """Rules for 2:4 sparsity of linear weights; a linear that no rule matches keeps all of them."""

    calibration: CalibrationConfig | None = None
    """What to measure on sample text while quantizing; null measures nothing and needs no text."""

    lora: tuple[LoraRule, ...] = ()
    """Rules for trainable low-rank branches; a linear that no rule matches gets none."""

    noise: NoiseConfig | None = None
    """Adaptive quantization noise on norm weights; null for none."""

    trainable_norms: Pattern | None = None
    """Selects, by full path, norms whose weights are trained too, among those that feed q/k/v or gate/up.

    The authors' scripts train both norms of each layer, the paper does not say so. They are saved beside the adapter.
    """

    train: TrainConfig = TrainConfig()
    """Settings of the reinforcement-learning loop; unused by `transform`."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Self:
        """Validate a mapping such as a parsed YAML file.

        Args:
            data: the mapping.
            where: what errors call the source, e.g. the file name.

        Raises:
            RecipeError: for the first fault, with its key.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(
                where=where,
                expected="a mapping with the keys " + ", ".join(cls.model_fields),
                got=shown(data),
                do="Write `key: value` lines.",
            )
        version = data.get("version", VERSION)
        is_newer = type(version) is int and version > VERSION
        if type(version) is not int or version != VERSION:  # Literal[1] would let `true` pass, for True == 1
            raise RecipeError(
                where=f"{where}: version",
                expected=f"version {VERSION}",
                got=f"{shown(version)}, which a newer qerl-compile wrote" if is_newer else shown(version),
                do="Upgrade qerl-compile." if is_newer else f"Write `version: {VERSION}`.",
            )
        try:
            return cls.model_validate(dict(data), context={"where": where})
        except ValidationError as fault:
            raise recipe_error(fault, cls, where) from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe from a YAML file of at most 100 kB.

        Raises:
            RecipeError: unreadable, malformed, or invalid; the message starts with the file name.
        """
        file = Path(path)
        try:
            with file.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)  # parse_yaml refuses the byte too many, so nothing larger is read
        except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
            raise RecipeError(
                where=printable(os.fspath(file)),
                expected="a readable recipe file",
                got=getattr(fault, "strerror", None) or str(fault),
                do=f"Check the path, or use a built-in recipe: {', '.join(builtin_names())}.",
            ) from None
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as fault:
            raise RecipeError(
                where=os.fspath(file), expected="UTF-8 text", got=str(fault), do="Save the file as UTF-8."
            ) from None
        data = parse_yaml(text, file.name)
        if isinstance(data, dict):
            if "version" not in data:
                raise RecipeError(
                    where=f"{file.name}: version",
                    expected=f"`version: {VERSION}`",
                    got="no version",
                    do=f"Add `version: {VERSION}` as the first line.",
                )
            data.setdefault("name", file.stem)
        return cls.from_dict(data, where=file.name)

    @classmethod
    def named(cls, name: str) -> Self:
        """A built-in recipe.

        Raises:
            RecipeError: there is none of that name; the message lists them.
        """
        names = builtin_names()
        if name not in names:
            guess = nearest(name, names)
            raise RecipeError(
                where=f"recipe {shown(name)}",
                expected="the name of a built-in recipe (" + ", ".join(names) + ") or the path of a YAML file",
                got=shown(name),
                do=f"Did you mean `{guess}`?" if guess else "Use one of these names, or a path that exists.",
            )
        return cls.from_file(_BUILTIN / f"{name}.yaml")

    @classmethod
    def resolve(cls, recipe: "Recipe | Mapping[str, Any] | str | os.PathLike[str]") -> "Recipe":
        """A recipe from whatever a caller has: a `Recipe`, a mapping, a built-in name, or a path.

        A text is a path if it ends in .yaml or .yml or contains a slash, and a name otherwise.

        Raises:
            RecipeError: none of these, or faulty.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(recipe)
        if isinstance(recipe, str):
            if recipe in builtin_names():
                return cls.named(recipe)
            is_path = recipe.endswith((".yaml", ".yml")) or "/" in recipe or os.sep in recipe
            return cls.from_file(recipe) if is_path else cls.named(recipe)
        if isinstance(recipe, os.PathLike):
            return cls.from_file(recipe)
        raise RecipeError(
            where="recipe",
            expected="a Recipe, a mapping, a built-in name or a path",
            got=f"{shown(recipe)} of type {type(recipe).__name__}",
            do=f"Pass one of the names {', '.join(builtin_names())}.",
        )

    def with_overrides(self, overrides: Iterable[str]) -> Self:
        """A copy with single values changed.

        Args:
            overrides: texts such as `train.learning_rate=2e-4`, `quantize[0].format=none`, `noise=null`. The part
                after the first `=` is YAML. Setting a key below a null part creates the part with its defaults.

        Raises:
            RecipeError: no `=`, an unknown key, or a value out of bounds. All are set before any is judged.
        """
        data = self.model_dump(mode="json")
        for override in overrides:
            key, equals, text = override.partition("=")
            key = key.strip()
            if not equals or not re.fullmatch(r"\w+(\.\w+|\[[0-9]{1,6}\])*", key, re.ASCII):
                raise RecipeError(
                    where="--set",
                    expected="KEY=VALUE such as train.learning_rate=2e-4",
                    got=shown(override),
                    do="Name the key as in the recipe file, with dots.",
                )
            parts = [int(part) if part.isdecimal() else part for part in re.findall(r"\w+", key)]
            _assign(data, parts, parse_yaml(text, f"--set {key}"))
        return self.from_dict(data, where="--set")

    def to_yaml(self) -> str:
        """The complete recipe, defaults written out, as YAML that `from_file` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120)

    @property
    def sha256(self) -> str:
        """Hex digest of the canonical form: all values, defaults included, as JSON with sorted keys."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of recipe files, for editors."""
        return cls.model_json_schema()


def builtin_names() -> list[str]:
    """Names of the built-in recipes, sorted."""
    return sorted(file.stem for file in _BUILTIN.glob("*.yaml"))


def _assign(data: Any, parts: list[str | int], value: object) -> None:
    """Set `value` at the key path in the dumped recipe; `from_dict` then judges the result.

    Raises:
        RecipeError: the path goes through a value that has no keys, or an index beyond a list.
    """
    here = data
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            pass
        elif isinstance(part, str) and isinstance(here, dict):
            if not is_last and here.get(part) is None:
                here[part] = {}
        else:
            raise RecipeError(
                where=f"--set: {key_path(parts[: depth + 1])}",
                expected=f"an index below {len(here)}" if isinstance(here, list) else "a key that has keys below it",
                got=f"`{part}` of {shown(here)}",
                do="Name an existing item as in quantize[0].format." if isinstance(here, list) else "Shorten the path.",
            )
        if is_last:
            here[part] = value  # type: ignore[index]  # the two branches above paired int with list, str with dict
        else:
            here = here[part]  # type: ignore[index]
