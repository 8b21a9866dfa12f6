"""What `inspect` hands back: plain values, ready for a table or for JSON. Shares are fractions of 1.

A fault carries its kind, its place and what was found there. How bad that is, what breaks and what mends it are looked
up in `KINDS`, so that every fault of a kind says the same. A damaged checkpoint yields NaN and infinity, which JSON
does not have: `to_dict` writes None for them.

What this module does not do: look for anything (headers.py, numbers.py and the rest), or lay it out (cli/inspect.py).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qerl_compile.checkup.kinds import KINDS, Severity


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Invariant: `code` is a key of `KINDS`.

    Attributes:
        code: which kind.
        where: tensor, module or key of a config.
        found: what is there, with its value.
    """

    code: str
    where: str
    found: str

    @property
    def severity(self) -> Severity:
        """Return "fatal" or "warning"."""
        return KINDS[self.code].severity

    @property
    def effect(self) -> str:
        """Return which readers do what with it."""
        return KINDS[self.code].effect

    @property
    def do(self) -> str:
        """Return the one thing that mends it."""
        return KINDS[self.code].do


@dataclass(frozen=True)
class Numbers:
    """Statistics of one packed linear [N, K].

    Attributes:
        decode_scale: the scalar as a multiplier.
        amax: largest decoded magnitude.
        block_min: smallest block scale above zero.
        block_max: largest block scale.
        zero_scales: share of block scales that are zero.
        subnormal: share of block scales with the bytes 1..7, below 2^-6.
        flushed: share that Marlin takes for zero: those below 2^-6 after it multiplied all by a power of two.
        zero_blocks: share of blocks in which every code is zero.
        saturated: share of codes that are 6 or -6; every block has at least one after plain rounding.
        entropy_bits: of the sixteen codes' histogram; 4 would be all of them equally often.
    """

    decode_scale: float
    amax: float
    block_min: float
    block_max: float
    zero_scales: float
    subnormal: float
    flushed: float
    zero_blocks: float
    saturated: float
    entropy_bits: float


@dataclass(frozen=True)
class LayerReport:
    """One linear.

    Attributes:
        path: module path.
        kind: "packed" or "dense".
        ignored: whether the config's list of dense modules names it.
        rows: N; 0 if no header says it.
        columns: K; likewise.
        size_bytes: of its tensors, bias included.
        bits_per_weight: of what stands for the weight, scales included.
        numbers: statistics, of a packed linear that could be read.
        sqnr_db: 10 log10(sum w² / sum (w - decoded)²) against the base, if there is one.
    """

    path: str
    kind: str
    ignored: bool
    rows: int
    columns: int
    size_bytes: int
    bits_per_weight: float
    numbers: Numbers | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Report:
    """What was found in one directory.

    Attributes:
        path: the directory.
        format: such as "compressed-tensors NVFP4A16" or "dense".
        producer: who wrote it, as far as the configs say; else empty.
        size_bytes: of all tensors.
        tensor_count: how many tensors.
        shard_count: in how many files.
        layers: linears, in the order of the file.
        faults: fatal ones first.
        notes: what could not be looked at, and why.
    """

    path: str
    format: str
    producer: str
    size_bytes: int
    tensor_count: int
    shard_count: int
    layers: tuple[LayerReport, ...] = ()
    faults: tuple[Fault, ...] = ()
    notes: Sequence[str] = field(default=())

    @property
    def fatal(self) -> bool:
        """Whether a fault is fatal."""
        return any(fault.severity == "fatal" for fault in self.faults)

    @property
    def packed(self) -> tuple[LayerReport, ...]:
        """Return the packed linears."""
        return tuple(layer for layer in self.layers if layer.kind == "packed")

    @property
    def bits_per_weight(self) -> float | None:
        """Return the mean over the weights of packed linears; None if there are none."""
        weights = sum(layer.rows * layer.columns for layer in self.packed)
        return (
            sum(layer.bits_per_weight * layer.rows * layer.columns for layer in self.packed) / weights
            if weights
            else None
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it: dictionaries, lists, texts, numbers, and None for NaN and infinity."""
        faults = [
            {**asdict(fault), "severity": fault.severity, "effect": fault.effect, "do": fault.do}
            for fault in self.faults
        ]
        values = {**asdict(self), "faults": faults, "fatal": self.fatal, "bits_per_weight": self.bits_per_weight}
        return _plain(values)


def _plain(value: Any) -> Any:
    """Return lists for tuples, and None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
