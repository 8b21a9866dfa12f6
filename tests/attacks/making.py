"""Write model directories byte by byte: healthy ones, and the pieces that attacks bend."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}


@dataclass(frozen=True)
class Attack:
    """One hostile directory.

    Attributes:
        build: writes it below the given empty directory and returns the path to open.
        words: what the refusal must contain.
    """

    build: Callable[[Path], Path]
    words: tuple[str, ...]


ATTACKS: dict[str, Attack] = {}


def attack(*words: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Register a builder under its function name."""

    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        if build.__name__ in ATTACKS:
            raise ValueError(f"two attacks are called {build.__name__}")
        ATTACKS[build.__name__] = Attack(build, words)
        return build

    return register


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file; `length` overrides the true length of the header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def two_tensors() -> dict[str, object]:
    """A header of two BF16 tensors with 32 + 64 bytes of data."""
    return {"a.weight": entry("BF16", [4, 4], 0, 32), "b.weight": entry("BF16", [2, 16], 32, 96)}


def dumped(value: object) -> bytes:
    return json.dumps(value).encode()


def healthy(root: Path) -> Path:
    """A directory with one shard of two tensors."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_bytes(dumped(CONFIG))
    (root / "model.safetensors").write_bytes(packed(dumped(two_tensors()), bytes(96)))
    return root


def healthy_sharded(root: Path) -> Path:
    """A directory with two shards of one tensor each, and their index."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_bytes(dumped(CONFIG))
    (root / "model-1.safetensors").write_bytes(packed(dumped({"a.weight": entry("BF16", [4, 4], 0, 32)}), bytes(32)))
    (root / "model-2.safetensors").write_bytes(packed(dumped({"b.weight": entry("BF16", [2, 16], 0, 64)}), bytes(64)))
    write_index(root, {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"})
    return root


def write_index(root: Path, weight_map: object) -> Path:
    (root / "model.safetensors.index.json").write_bytes(dumped({"metadata": {}, "weight_map": weight_map}))
    return root


def hub_cache(root: Path) -> Path:
    """A hub cache: the files are links into `blobs`. Returns the snapshot."""
    repository = root / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    source = healthy(root / "source")
    for file in ("config.json", "model.safetensors"):
        (source / file).rename(blobs / f"sha-{file}")
        (snapshot / file).symlink_to(Path("../../blobs") / f"sha-{file}")
    return snapshot


def with_shard(root: Path, shard: bytes) -> Path:
    """A healthy directory whose one shard has these bytes."""
    (healthy(root) / "model.safetensors").write_bytes(shard)
    return root


def with_header(root: Path, header: object, data_bytes: int = 96) -> Path:
    """A healthy directory whose shard has this header (JSON value, or bytes as they are)."""
    raw = header if isinstance(header, bytes) else dumped(header)
    return with_shard(root, packed(raw, bytes(data_bytes)))
