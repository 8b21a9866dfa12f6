"""The list of modules that stay dense, against which modules do: compressed-tensors' `ignore`, ModelOpt's wildcards.

Engines follow the list and not the tensors. A packed linear that it names, a dense one that it forgets, and siblings of
one fused matrix on different sides of it are faults, and the message says of which engine.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qerl_compile.checkup.findings import Fault
from qerl_compile.checkup.recognition import COMPRESSED, MODELOPT, TORCHAO, Contents
from qerl_compile.checkup.skeleton import Skeleton
from qerl_compile.exporters.dense_lists import is_unsafe, names_module
from qerl_compile.exporters.fused_partners import partners
from qerl_compile.layouts.modelopt import BESIDE
from qerl_compile.wording import shown


def ignored(contents: Contents, paths: list[str]) -> set[str]:
    """Return those of the module paths that the config's list names."""
    _, entries = _entries(contents)
    wildcards = contents.dialect is MODELOPT
    return {path for path in paths if any(names_module(entry, path, wildcards=wildcards) for entry in entries)}


def list_faults(contents: Contents, skeleton: Skeleton | None) -> Iterator[Fault]:
    """Yield what is wrong with the list, and with siblings that are not treated alike."""
    packed = set(contents.packed)
    linears = list(skeleton.linears) if skeleton and not skeleton.fused_experts else _linears_of(contents)
    key, entries = _entries(contents)
    if contents.dialect in (COMPRESSED, MODELOPT):
        yield from _unsafe(contents, key, entries)
        named = ignored(contents, [*packed, *linears])
        for path in contents.packed:
            if path in named:
                yield Fault("ignored-but-packed", key, f"{shown(path)} is named, and the file holds it packed")
        for path in linears:
            if path not in packed and path not in named:
                is_head = path == (skeleton.head if skeleton else "lm_head")
                harmless = is_head and contents.dialect is MODELOPT
                yield Fault("head-not-excluded" if harmless else "dense-not-ignored", key, f"{shown(path)} is missing")
    for members in partners([*dict.fromkeys([*linears, *contents.packed])]) if contents.dialect is not TORCHAO else ():
        dense = [member for member in members if member not in packed]
        if dense and len(dense) < len(members):
            inside = [member for member in members if member in packed]
            yield Fault(
                "partners-split",
                members[0].rpartition(".")[0],
                f"packed {', '.join(map(_leaf, inside))}, dense {', '.join(map(_leaf, dense))}",
            )


def _entries(contents: Contents) -> tuple[str, list[str]]:
    """Return where the list stands, and its texts."""
    described: Mapping[str, Any] = contents.section
    where = "config.json: quantization_config"
    if not described and contents.beside:
        described, where = contents.beside, BESIDE
    nested = described.get("quantization")
    if isinstance(nested, Mapping):
        described, where = nested, f"{where}.quantization"
    key = "exclude_modules" if "exclude_modules" in described else "ignore"
    entries = described.get(key)
    return f"{where}.{key}", [each for each in entries if isinstance(each, str)] if isinstance(entries, list) else []


def _unsafe(contents: Contents, key: str, entries: list[str]) -> Iterator[Fault]:
    if contents.dialect is COMPRESSED:
        for entry in entries:
            if is_unsafe(entry):
                yield Fault("pattern-not-run", key, shown(entry))


def _linears_of(contents: Contents) -> list[str]:
    """Without a skeleton: modules with a matrix that is no embedding by its name."""
    return [
        path
        for path, leaves in contents.modules.items()
        if (path in contents.packed or ("weight" in leaves and len(leaves["weight"].shape) == 2))
        and "embed" not in path
    ]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
