"""Which dialect a directory speaks, and which tensors make one linear: from JSON and headers, without judging them.

    dialect               codes            block scales     scalar                       direction    input scalar
    compressed-tensors    weight_packed    weight_scale     weight_global_scale          divisor      input_global_scale
    ModelOpt              weight           weight_scale     weight_scale_2               multiplier   input_scale
    torchao               _weight_qdata    _weight_scale    _weight_per_tensor_scale     multiplier   (in the type)

A linear counts as packed if any tensor of it says so, since the missing one may be the fault that is looked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_compile.checkpoint_config import MAX_CONFIG_BYTES, read_bounded
from qerl_compile.checkpoint_dir import CheckpointDirectory, TensorEntry
from qerl_compile.layouts.modelopt import BESIDE
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import MAX_SHOWN_CHARACTERS, printable


@dataclass(frozen=True)
class Dialect:
    """The leaves of a packed linear's tensors, and which way its scalars go."""

    name: str
    codes: str
    block: str
    scalar: str
    input: str | None
    divisor: bool


COMPRESSED = Dialect(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", divisor=True
)
MODELOPT = Dialect("ModelOpt", "weight", "weight_scale", "weight_scale_2", "input_scale", divisor=False)
TORCHAO = Dialect("torchao", "_weight_qdata", "_weight_scale", "_weight_per_tensor_scale", None, divisor=False)


@dataclass(frozen=True)
class Contents:
    """A directory, sorted.

    Attributes:
        checkpoint: the judged directory.
        dialect: None if nothing is packed.
        method: quant_method of config.json, or "".
        section: quantization_config of config.json, or empty.
        beside: what hf_quant_config.json says, or empty.
        modules: module path → leaf → entry, for every tensor.
        packed: paths of packed linears.
    """

    checkpoint: CheckpointDirectory
    dialect: Dialect | None
    method: str
    section: Mapping[str, Any]
    beside: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, TensorEntry]]
    packed: tuple[str, ...] = field(default=())

    @property
    def config_file(self) -> Path:
        """Return config.json."""
        return self.checkpoint.root / "config.json"

    def weight_shape(self, path: str) -> tuple[int, int] | None:
        """Return (N, K) of a linear as the header of its codes, or of its dense weight, has it."""
        leaves = self.modules.get(path, {})
        codes = leaves.get(self.dialect.codes) if self.dialect and path in self.packed else None
        if codes is not None and len(codes.shape) == 2:
            return codes.shape[0], codes.shape[1] * 2
        dense = leaves.get("weight")
        return (dense.shape[0], dense.shape[1]) if dense is not None and len(dense.shape) == 2 else None


def recognise(checkpoint: CheckpointDirectory) -> Contents:
    """Sort a directory.

    Raises:
        CheckpointError: hf_quant_config.json is there and is no JSON.
    """
    section = checkpoint.config.get("quantization_config")
    section = section if isinstance(section, Mapping) else {}
    method = section.get("quant_method")
    method = method if isinstance(method, str) else ""
    beside = _beside(checkpoint.root)
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in checkpoint.tensors.items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = entry
    dialect = _dialect(method, bool(beside), modules)
    packed = tuple(path for path, leaves in modules.items() if dialect and _is_packed(dialect, leaves))
    return Contents(checkpoint, dialect if packed or method else None, method, section, beside, modules, packed)


def label(contents: Contents, *, quantized_inputs: bool) -> str:
    """Return the format in a few words."""
    if not contents.packed:
        return f"{_text(contents.method)}, no NVFP4" if contents.method else "dense"
    if contents.dialect is MODELOPT:
        described = contents.section or contents.beside
        nested = described.get("quantization")
        described = nested if isinstance(nested, Mapping) else described
        return f"ModelOpt {_text(described.get('quant_algo')) or 'NVFP4'}"
    if contents.dialect is TORCHAO:
        return "torchao NVFP4Tensor"
    return f"{contents.method or 'compressed-tensors'} {'NVFP4' if quantized_inputs else 'NVFP4A16'}"


def producer(contents: Contents) -> str:
    """Return who wrote the directory, as far as it says."""
    for described in (contents.section, contents.beside):
        made_by = described.get("producer")
        if isinstance(made_by, Mapping) and isinstance(made_by.get("name"), str):
            return f"{_text(made_by['name'])} {_text(made_by.get('version'))}".strip()
    version = contents.section.get("version")
    if contents.dialect is COMPRESSED and isinstance(version, str):
        return f"compressed-tensors {_text(version)}"
    return ""


def _text(value: Any) -> str:
    """Return a config's text fit to be printed, or nothing for what is no text."""
    return printable(value[:MAX_SHOWN_CHARACTERS]) if isinstance(value, str) else ""


def _beside(root: Path) -> Mapping[str, Any]:
    file = root / BESIDE
    if not file.is_file():
        return {}
    value = parse_json(read_bounded(file, MAX_CONFIG_BYTES), where=str(file))
    return value if isinstance(value, Mapping) else {}


def _dialect(method: str, beside: bool, modules: Mapping[str, Mapping[str, TensorEntry]]) -> Dialect | None:
    if method in ("compressed-tensors", "qerl-nvfp4"):
        return COMPRESSED
    if method == "modelopt" or (beside and not method):
        return MODELOPT
    if method == "torchao":
        return TORCHAO
    leaves = {leaf for each in modules.values() for leaf in each}
    for dialect in (COMPRESSED, MODELOPT, TORCHAO):  # a directory that does not say, or says something else
        if dialect.scalar in leaves:
            return dialect
    return None


def _is_packed(dialect: Dialect, leaves: Mapping[str, TensorEntry]) -> bool:
    if dialect.scalar in leaves or (dialect.codes in leaves and dialect is not MODELOPT):
        return True
    block, weight = leaves.get(dialect.block), leaves.get("weight")
    if dialect is MODELOPT and weight is not None and weight.dtype in ("U8", "I8"):
        return True
    # Block scales without codes: one of 16 columns. FP8 layers have one scale a row or tensor, and a weight.
    return block is not None and len(block.shape) == 2 and block.shape[1] > 1 and weight is None
