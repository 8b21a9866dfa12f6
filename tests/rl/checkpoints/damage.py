"""Ways in which a checkpoint on disk goes bad; each is drawn at random and says what it did."""

import random
from collections.abc import Callable
from pathlib import Path


def _file(directory: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(file for file in directory.rglob("*") if file.is_file()))


def flip_a_bit(directory: Path, draw: random.Random) -> str:
    file = _file(directory, draw)
    data = bytearray(file.read_bytes())
    at, bit = draw.randrange(len(data)), draw.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {at} of {file.name} flipped"


def truncate(directory: Path, draw: random.Random) -> str:
    file = _file(directory, draw)
    data = file.read_bytes()
    left = draw.choice([0, len(data) - 1, draw.randrange(len(data))])
    file.write_bytes(data[:left])
    return f"{file.name} cut to {left} of {len(data)} bytes"


def delete(directory: Path, draw: random.Random) -> str:
    file = _file(directory, draw)
    file.unlink()
    return f"{file.name} deleted"


def add_a_file(directory: Path, draw: random.Random) -> str:
    name = draw.choice(["extra.safetensors", "adapter/pytorch_model.bin", ".hidden", "adapter/adapter_config.json~"])
    (directory / name).write_bytes(draw.randbytes(draw.randrange(10)))
    return f"{name} added"


def append(directory: Path, draw: random.Random) -> str:
    file = _file(directory, draw)
    with file.open("ab") as stream:
        stream.write(draw.choice([b"\0", b"\n", b" ", b"{}"]))
    return f"{file.name} lengthened"


def zero_a_block(directory: Path, draw: random.Random) -> str:
    """What a file system gives after a power failure that lost data but not names."""
    file = _file(directory, draw)
    file.write_bytes(b"\0" * file.stat().st_size)
    return f"{file.name} all zeros"


def exchange_two(directory: Path, draw: random.Random) -> str:
    first, second = draw.sample(sorted(file for file in directory.rglob("*") if file.is_file()), 2)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return f"{first.name} and {second.name} exchanged"


WAYS: tuple[Callable[[Path, random.Random], str], ...] = (
    flip_a_bit,
    flip_a_bit,
    truncate,
    delete,
    add_a_file,
    append,
    zero_a_block,
    exchange_two,
)


def damage(directory: Path, seed: int) -> str:
    """Damage a checkpoint in the way that `seed` draws; return what was done."""
    draw = random.Random(seed)  # noqa: S311
    return WAYS[seed % len(WAYS)](directory, draw)
