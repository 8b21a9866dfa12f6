"""Model cards: the README.md of an exported directory, saying what it is, how it was made and how to check it.

The metadata block is written by huggingface_hub (`base_model` makes the hub link the two). The body is ours: a table of
facts, how to load it, the complete recipe with its hash, and the SHA-256 of every file. A quality is stated only where
it was measured on the written files (exporters/verify), in a section that `add_quality` puts in afterwards.

What this module does not do: claim a licence, which is the base model's.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

CARD = "README.md"
FILES = "## Files"


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: heading.
        summary: first paragraph.
        facts: rows of the table.
        usage: shell or Python commands.
        base_name: hub id or path of the base model, "" if unknown.
        relation: how it relates to the base, in the hub's words: "quantized" or "adapter".
        library: name of the library that loads it, in the hub's words.
        tags: more hub tags.
        recipe_yaml: the complete recipe, "" if unknown.
    """

    title: str
    summary: str
    facts: Mapping[str, str]
    usage: str
    base_name: str
    relation: str
    library: str
    tags: Sequence[str] = ()
    recipe_yaml: str = ""


def write_card(directory: Path, card: Card) -> None:
    """Write README.md into a directory whose other files are complete."""
    from huggingface_hub import ModelCard, ModelCardData

    is_hub_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", card.base_name)) and not Path(card.base_name).exists()
    metadata = ModelCardData(
        base_model=card.base_name if is_hub_id else None,
        base_model_relation=card.relation if is_hub_id else None,
        library_name=card.library,
        pipeline_tag="text-generation",
        tags=["qerl-compile", *card.tags],
    )
    facts = {"Base model": shown_base(card.base_name) or "not recorded", **card.facts}
    parts = [
        f"# {card.title}",
        card.summary,
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]),
        f"```bash\n{card.usage}\n```",
    ]
    if card.recipe_yaml:
        parts += ["## Recipe", f"```yaml\n{card.recipe_yaml.strip()}\n```"]
    parts.append(_files(directory))
    content = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    ModelCard(content).save(directory / CARD)


def add_quality(directory: Path, section: str) -> None:
    """Put a section before the list of files in README.md, and list the files anew, with those that came since."""
    card = directory / CARD
    before = card.read_text(encoding="utf-8").rpartition(FILES)[0]
    card.write_text(f"{before}{section}\n\n{_files(directory)}\n", encoding="utf-8")


def provenance(model: nn.Module, base_name: str | None) -> tuple[str, str]:
    """Return (base name, recipe as YAML) of a model, "" for what is not known.

    `model.qerl` is what `transform` and `load` leave; a plain module has none.
    """
    state: Any = model.__dict__.get("qerl")
    recorded = "" if state is None else state.base_name
    return base_name if base_name is not None else recorded, "" if state is None else state.recipe.to_yaml()


def shown_base(base_name: str) -> str:
    """The base model's name for readers: of a local path only the last part, for a card may be published."""
    local = base_name.startswith((".", "/", "~")) or Path(base_name).exists()
    return Path(base_name).name if base_name and local else base_name


def _files(directory: Path) -> str:
    return f"{FILES}\n\n| file | bytes | SHA-256 |\n|---|---|---|\n" + "\n".join(_file_rows(directory))


def _file_rows(directory: Path) -> list[str]:
    rows = []
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.name != CARD:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            rows.append(f"| {file.relative_to(directory)} | {file.stat().st_size} | `{digest}` |")
    return rows
