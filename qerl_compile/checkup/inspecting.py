"""The walk over a directory: headers and configs first, then one linear after another; see the package's essay.

A checkpoint may be larger than memory, so one tensor or one packed linear is held at a time, and what stays of it are
numbers. What can only be told of several linears together, scales that an engine fuses, is told when all have been
seen. A linear whose tensors do not fit together is passed over here: the headers have told it.

What this module does not do: know what a value should be (numbers.py, against.py) or what breaks on it (kinds.py).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from qerl_compile.checkpoint_dir import CheckpointDirectory, open_checkpoint
from qerl_compile.checkup import configs, numbers
from qerl_compile.checkup.against import base_fault, sqnr_db
from qerl_compile.checkup.findings import Fault, LayerReport, Report
from qerl_compile.checkup.headers import header_faults
from qerl_compile.checkup.lists import ignored, list_faults
from qerl_compile.checkup.recognition import TORCHAO, Contents, Dialect, label, producer, recognise
from qerl_compile.checkup.skeleton import Skeleton, skeleton_of
from qerl_compile.exporters.fused_partners import partners
from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.layouts.torchao import unswizzle

SCALARS = ("F32", "BF16", "F16")


def inspect_checkpoint(path: str | PathLike[str], *, against: str | PathLike[str] | None = None) -> Report:
    """Tell what a directory is and what is wrong with it.

    Args:
        path: a model directory, in whatever format.
        against: the dense model that it was made from; adds the signal to noise ratio of every packed linear.

    Returns:
        The report; it has faults where a lesser reader would have raised.

    Raises:
        CheckpointError: one of the directories is damaged or hostile (checkpoint_dir.py).
    """
    checkpoint = open_checkpoint(path)
    base = None if against is None else open_checkpoint(against)
    contents = recognise(checkpoint)
    skeleton = skeleton_of(checkpoint)
    notes = [f"{skeleton}; names and shapes were not compared with it"] if isinstance(skeleton, str) else []
    skeleton = None if isinstance(skeleton, str) else skeleton
    if skeleton and skeleton.fused_experts:
        notes.append("transformers keeps this model's experts in one tensor; names were not compared with config.json")
    inputs = configs.quantized_inputs(contents)
    cache = configs.quantized_cache(contents)
    faults = [*configs.config_faults(contents), *list_faults(contents, skeleton)]
    faults += header_faults(contents, skeleton, quantized_inputs=inputs, quantized_cache=cache)
    walk = _Walk(contents, base)
    faults += walk.faults()
    if contents.packed and base is None:
        notes.append("the order of nibbles shows only against the base: --against BASE")
    if walk.without_base:
        notes.append(f"the base has no weight of that shape for {walk.without_base} packed linears")
    return Report(
        path=str(path),
        format=label(contents, quantized_inputs=inputs),
        producer=producer(contents),
        size_bytes=sum(entry.size_bytes for entry in checkpoint.tensors.values()),
        tensor_count=len(checkpoint.tensors),
        shard_count=len(checkpoint.shards),
        layers=tuple(_layers(contents, skeleton, walk)),
        faults=tuple(sorted(dict.fromkeys(faults), key=lambda fault: fault.severity != "fatal")),
        notes=tuple(notes),
    )


class _Walk:
    """One pass over the values, in the order of the files."""

    def __init__(self, contents: Contents, base: CheckpointDirectory | None) -> None:
        self.contents, self.base = contents, base
        self.numbers: dict[str, numbers.Numbers] = {}
        self.sqnr: dict[str, float] = {}
        self.without_base = 0
        self._scalars: dict[str, dict[str, float]] = {"fused-scales-differ": {}, "fused-input-scales-differ": {}}

    def faults(self) -> Iterator[Fault]:
        """Yield what the values show, filling the statistics on the way."""
        dialect, packed = self.contents.dialect, set(self.contents.packed)
        for path, leaves in self.contents.modules.items():
            own = {dialect.codes, dialect.block, dialect.scalar, dialect.input} if dialect and path in packed else set()
            for leaf, entry in leaves.items():
                if leaf in own or entry.dtype in ("U8", "BOOL") or entry.dtype.startswith("I"):
                    continue
                name = f"{path}.{leaf}".removeprefix(".")
                value = read(self.contents.checkpoint, name)
                bad = 0 if value.numel() == 0 else int((~value.float().isfinite()).sum())
                if bad:
                    yield Fault("not-finite", name, f"{bad} of {value.numel()}")
                elif leaf in ("k_scale", "v_scale") and not bool((value.float() > 0).all()):
                    yield Fault("scalar-not-positive", name, f"{value.float().min().item():g}")
            if dialect and path in packed:
                yield from self._linear(path, dialect)
        # No engine but torchao itself reads its tensors, and it decodes each by its own scalar.
        for code, values in self._scalars.items() if dialect is not TORCHAO else ():
            for members in partners(list(values)):
                if len({values[member] for member in members}) > 1:
                    told = ", ".join(f"{member.rpartition('.')[2]} {values[member]:g}" for member in members)
                    yield Fault(code, members[0].rpartition(".")[0], told)

    def _linear(self, path: str, dialect: Dialect) -> Iterator[Fault]:
        leaves, checkpoint = self.contents.modules[path], self.contents.checkpoint
        value = _scalar(checkpoint, leaves, path, dialect.scalar)
        given = _scalar(checkpoint, leaves, path, dialect.input)
        if value is not None:
            self._scalars["fused-scales-differ"][path] = value
        if given is not None:
            self._scalars["fused-input-scales-differ"][path] = given
            yield from numbers.input_faults(f"{path}.{dialect.input}", given, divisor=dialect.divisor)
        if dialect.block not in leaves or not leaves[dialect.block].size_bytes:
            return
        bits_NG = numbers.block_bits(read(checkpoint, f"{path}.{dialect.block}"))
        yield from numbers.block_faults(f"{path}.{dialect.block}", bits_NG)
        shape = self.contents.weight_shape(path)
        codes = leaves.get(dialect.codes)
        if shape is None or codes is None or codes.dtype not in ("U8", "I8") or not codes.size_bytes:
            return
        rows, blocks = shape[0], shape[1] // BLOCK
        if dialect is TORCHAO and bits_NG.shape != (rows, blocks) and bits_NG.numel() % (rows * blocks or 1) == 0:
            bits_NG = unswizzle(bits_NG, rows, blocks)
        if bits_NG.shape != (rows, blocks) or shape[1] % BLOCK:
            return  # told by the headers
        codes_NK2 = read(checkpoint, f"{path}.{dialect.codes}").view(torch.uint8)
        decode_scale = 1.0 if value is None else (_reciprocal(value) if dialect.divisor else value)
        found = numbers.numbers_of(codes_NK2, bits_NG, decode_scale)
        self.numbers[path] = found
        if value is not None:
            yield from numbers.scalar_faults(f"{path}.{dialect.scalar}", value, found, divisor=dialect.divisor)
        if self.base is not None:
            yield from self._compare(path, codes_NK2, bits_NG, decode_scale)

    def _compare(self, path: str, codes_NK2: Tensor, bits_NG: Tensor, decode_scale: float) -> Iterator[Fault]:
        entry = self.base.tensors.get(f"{path}.weight") if self.base else None
        if self.base is None or entry is None or entry.shape != (codes_NK2.shape[0], codes_NK2.shape[1] * 2):
            self.without_base += 1
            return
        base_NK = read(self.base, f"{path}.weight")
        self.sqnr[path] = sqnr_db(base_NK, codes_NK2, bits_NG, decode_scale)
        fault = base_fault(path, self.sqnr[path], base_NK, codes_NK2, bits_NG, decode_scale)
        if fault is not None:
            yield fault


def read(checkpoint: CheckpointDirectory, name: str) -> Tensor:
    """Return one tensor of a judged directory, on the CPU."""
    from safetensors import safe_open

    with safe_open(checkpoint.tensors[name].file, framework="pt") as reader:
        return reader.get_tensor(name)


def _scalar(checkpoint: CheckpointDirectory, leaves: Any, path: str, leaf: str | None) -> float | None:
    entry = leaves.get(leaf)
    if entry is None or entry.dtype not in SCALARS or entry.shape not in ((), (1,)):
        return None
    return read(checkpoint, f"{path}.{leaf}").float().reshape(()).item()


def _reciprocal(value: float) -> float:
    return 1.0 / value if value and math.isfinite(value) else math.nan


def _layers(contents: Contents, skeleton: Skeleton | None, walk: _Walk) -> Iterator[LayerReport]:
    packed = set(contents.packed)
    dense = [path for path in contents.modules if path not in packed and skeleton and path in skeleton.linears]
    named = ignored(contents, [*packed, *dense])
    for path in contents.modules:
        if path not in packed and path not in dense:
            continue
        leaves = contents.modules[path]
        rows, columns = contents.weight_shape(path) or (0, 0)
        size = sum(entry.size_bytes for entry in leaves.values())
        weight_bytes = size - (leaves["bias"].size_bytes if "bias" in leaves else 0)
        layer = LayerReport(
            path=path,
            kind="packed" if path in packed else "dense",
            ignored=path in named,
            rows=rows,
            columns=columns,
            size_bytes=size,
            bits_per_weight=8 * weight_bytes / (rows * columns) if rows * columns else 0.0,
        )
        yield replace(layer, numbers=walk.numbers.get(path), sqnr_db=walk.sqnr.get(path))
