"""Read `config.json` and its siblings, and refuse those that would make a library run code.

Keys in JSON can do that: `auto_map` and `custom_pipelines` name Python files; an attention or experts implementation
with a slash in it names a hub repository whose kernels are downloaded and imported (CVE-2026-4372 was one way in);
`trust_remote_code: true` in a nested config answered for the user (CVE-2026-5241). They are looked for at every depth
of every `*config.json`, because tokenizers and processors have the same mechanism.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qerl_compile.strict_json import parse_json
from qerl_compile.wording import refuse_checkpoint, shown

MAX_CONFIG_BYTES = 4_000_000  # the largest in use are tokenizer_config.json of Gemma 3 with 1.2 MB

_CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})


def read_bounded(file: Path, max_bytes: int) -> bytes:
    """All bytes of a file.

    Raises:
        CheckpointError: unreadable or larger than `max_bytes` (not one byte beyond that is read).
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except OSError as fault:
        refuse_checkpoint(
            str(file), "a readable file", fault.strerror or str(fault), do="Check that it exists and is readable."
        )
    if len(raw) > max_bytes:
        refuse_checkpoint(str(file), f"at most {max_bytes} bytes", "more", do="Do not use this file.")
    return raw


def read_config(root: Path, files: list[str], *, trust_remote_code: bool) -> dict[str, Any]:
    """The parsed `config.json`, after it and every other `*config.json` were searched for code.

    Args:
        root: the directory.
        files: names of the regular files in it.
        trust_remote_code: allow the keys that name code.

    Raises:
        CheckpointError: config.json is missing or not a mapping with a model_type, or a config names code.
    """
    if "config.json" not in files:
        is_adapter = "adapter_config.json" in files
        refuse_checkpoint(
            str(root),
            "a config.json",
            "a PEFT adapter without its base model" if is_adapter else "none",
            do="Pass the base model, and the adapter beside it."
            if is_adapter
            else "Pass a directory written by save_pretrained.",
        )
    configs = {name: _parsed(root / name) for name in files if name.endswith("config.json")}
    if not trust_remote_code:
        for name, value in configs.items():
            for path, got in _code_in(value, ""):
                refuse_checkpoint(
                    f"{root / name}: {path}",
                    "a config that names no code",
                    got,
                    do="Read that code; if you trust it, pass --trust-remote-code.",
                )
    config = configs["config.json"]
    if not isinstance(config.get("model_type"), str):
        refuse_checkpoint(
            f"{root / 'config.json'}: model_type",
            "the name of a model family",
            shown(config.get("model_type")),
            do="Add the key; without it transformers guesses from the directory's name.",
        )
    return config


def _parsed(file: Path) -> dict[str, Any]:
    value = parse_json(read_bounded(file, MAX_CONFIG_BYTES), where=str(file))
    if not isinstance(value, dict):
        refuse_checkpoint(str(file), "a JSON object", shown(value), do="Fetch the file again.")
    return value


def _code_in(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Key paths of what would make a library run code, with what stands there. Depth is bounded by the JSON parser."""
    stack = [(value, path)]
    while stack:
        here, path = stack.pop()
        if isinstance(here, list):
            stack.extend((item, f"{path}[{index}]") for index, item in enumerate(here) if isinstance(item, dict | list))
        if not isinstance(here, dict):
            continue
        for key, item in here.items():
            below = f"{path}.{key}" if path else key
            names_hub_kernel = "_implementation" in key and "/" in str(item)
            if key in _CODE_KEYS or names_hub_kernel or (key == "trust_remote_code" and item):
                yield below, shown(item)
            elif isinstance(item, dict | list):
                stack.append((item, below))
