"""Bend healthy model directories at random, on three levels: bytes, JSON values, and the text of JSON.

Every choice is drawn from the given `random.Random`, so hypothesis can supply one whose draws it shrinks, and fuzz.py
one with a seed.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

from tests.attacks.making import CONFIG, entry, healthy_sharded, packed

NAMES = ["a.weight", "b.weight", "__metadata__", "", "..", "../a", "a/b", "a\0", "\u00e9", "x" * 600, "a" * 4096]
SHARDS = [
    "model-1.safetensors",
    "model-2.safetensors",
    "model-3.safetensors",
    "../x.safetensors",
    "/etc/passwd",
    "",
    ".",
]
VALUES: list[Any] = [
    *(0, 1, -1, 2, 4, 16, 32, 96, 2**31, 2**63, 2**64, 10**400, 0.0, 32.0, 1e999, True, False, None),
    *("BF16", "F32", "U8", "F4", "F8_E4M3", "BOOL", "C64", "", "dtype", [], {}, [[]], [0], [0, 0], [0, 32], [4, 4]),
    *([0, 2**62], [1] * 9, [-1, -1], {"dtype": "U8"}, {"a": "b"}, {"a": {"b": "c"}}, *NAMES, *SHARDS),
]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"0",
    b"-",
    b"1e5",
    b" ",
    b"\n",
    b"null",
    b"NaN",
    b"\xff",
    b"\0",
]


def mutated_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one to four places are replaced, removed, added, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        holders = [value, *_holders(value)]
        here = rng.choice(holders)
        if isinstance(here, dict) and here:
            key, action = rng.choice(list(here)), rng.randrange(4)
            if action == 0:
                here[key] = _drawn(rng, VALUES)
            elif action == 1:
                del here[key]
            elif action == 2:
                here[rng.choice(NAMES)] = here.pop(key)
            else:
                here[rng.choice(NAMES)] = _drawn(rng, [*holders, *VALUES])
        elif isinstance(here, list) and here:
            at, action = rng.randrange(len(here)), rng.randrange(3)
            if action == 0:
                here[at] = _drawn(rng, VALUES)
            elif action == 1:
                del here[at]
            else:
                here.insert(at, _drawn(rng, VALUES))
        elif rng.randrange(20) == 0:
            value = _drawn(rng, VALUES)
    return value


def _drawn(rng: random.Random, values: list[Any]) -> Any:
    return copy.deepcopy(rng.choice(values))  # a list that is put in twice would otherwise be bent in both places


def _holders(value: Any) -> list[Any]:
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    below = [child for child in children if isinstance(child, dict | list)]
    return below + [deeper for child in below for deeper in _holders(child)]


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    """The bytes with one to four places overwritten, cut out, doubled or filled with a token of JSON."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(raw))
        width = rng.choice([1, 1, 1, 2, 8, 40])
        action = rng.randrange(4)
        if action == 0:
            raw = raw[:at] + rng.choice(TOKENS) + raw[at + width :]
        elif action == 1:
            raw = raw[:at] + raw[at + width :]
        elif action == 2:
            raw = raw[:at] + raw[at : at + width] + raw[at:]
        else:
            raw = raw[:at] + rng.choice(TOKENS) + raw[at:]
    return raw


def header() -> dict[str, Any]:
    """Three tensors of different dtype and rank, 32 + 24 + 40 bytes, and metadata."""
    return {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", [4, 4], 0, 32),
        "a.bias": entry("F32", [6], 32, 56),
        "a.codes": entry("U8", [2, 5, 4], 56, 96),
    }


def mutated_shard(rng: random.Random) -> bytes:
    """The bytes of a safetensors file with a fault in header, length field, or size; now and then with none."""
    value = header() if rng.randrange(3) == 0 else mutated_value(rng, header())
    raw = json.dumps(value).encode()
    if rng.randrange(3) == 0:
        raw = mutated_bytes(rng, raw)
    length = len(raw) + rng.choice([0, 0, 0, 0, 0, 1, -1, 8, 2**40, 2**63 - len(raw)])
    data = bytes(rng.choice([96, 96, 96, 96, 95, 97, 0, 1000]))
    shard = packed(raw, data, length=max(length, 0) % 2**64)
    return mutated_bytes(rng, shard) if rng.randrange(6) == 0 else shard


def mutated_directory(rng: random.Random, root: Path) -> Path:
    """A directory of two shards in which shard, index and config may each be bent."""
    healthy_sharded(root)
    (root / "model-1.safetensors").write_bytes(mutated_shard(rng))
    index: Any = {"metadata": {"total_size": 160}, "weight_map": {}}
    index["weight_map"] = {name: "model-1.safetensors" for name in header() if name != "__metadata__"}
    index["weight_map"]["b.weight"] = "model-2.safetensors"
    if rng.randrange(4) == 0:
        index = mutated_value(rng, index)
    raw = json.dumps(index).encode()
    (root / "model.safetensors.index.json").write_bytes(mutated_bytes(rng, raw) if rng.randrange(8) == 0 else raw)
    if rng.randrange(8) == 0:
        (root / "config.json").write_text(json.dumps(mutated_value(rng, CONFIG)))
    return root
