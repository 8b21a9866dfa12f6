"""What each serving engine accepts, as data, and the check of a checkpoint against it.

    check_schema("DIR", "vllm")           every export runs this in its staging directory; `--verify` on the published
    check_schema(config, "vllm==0.33")    a quantization_config alone: its keys and values, no tensors

`ACCEPTED` has one row for an engine's version and a format. `evidence` says how we know: "ran" is the engine's own
loader or the library itself with our files, "read" is its source, "reported" is a merged change that we have not read.
Versions between and after these were not looked at; a target that names one that is not in the table is refused, and a
target without a version means the newest row. The facts and their sources are in design/formats.md (sections 1.3-1.6,
2.3, 2.4, 4, 5); the loader runs are in benchmarks/results/vllm_loader.md.

A problem is something that the engine refuses, or, worse, does not refuse and then computes garbage from; it says what
would happen. What this module does not do: look at weights (only at headers, and at one scalar per linear). Whether
numbers are plausible is `qerl-compile inspect`'s question, whether they are right is `--verify`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import ExportError
from qerl_compile.layouts import OWN_METHOD

CT, MODELOPT, QERL = "compressed-tensors", "modelopt", OWN_METHOD


@dataclass(frozen=True)
class Accepts:
    """One engine version and one format.

    Attributes:
        engine: name of the target.
        version: the version that was looked at.
        method: quant_method of the checkpoint.
        schemes: which of its schemes: NVFP4 has 4-bit activations, NVFP4A16 and W4A16_NVFP4 have not.
        evidence: how we know.
        source: where that stands.
        strict: the reader leaves weights uninitialised, silently, without `quantization_status` or with a dense
            linear that `ignore` does not list.
        excludes_substrings: an excluded name switches off every linear whose path contains it.
    """

    engine: str
    version: str
    method: str
    schemes: frozenset[str]
    evidence: Literal["ran", "read", "reported"]
    source: str
    strict: bool = False
    excludes_substrings: bool = False


_CT_SCHEMES, _MODELOPT_SCHEMES = frozenset({"NVFP4A16", "NVFP4"}), frozenset({"W4A16_NVFP4", "NVFP4"})

ACCEPTED = (
    Accepts("vllm", "0.33.0", CT, _CT_SCHEMES, "ran", "CompressedTensorsConfig, formats.md 1.3 and 1.4"),
    Accepts(
        *("vllm", "0.33.0", MODELOPT, _MODELOPT_SCHEMES, "ran", "modelopt.py, formats.md 2.4"), excludes_substrings=True
    ),
    Accepts("sglang", "0.5.23", CT, _CT_SCHEMES, "read", "formats.md 1.5"),
    Accepts("sglang", "0.5.23", MODELOPT, _MODELOPT_SCHEMES, "read", "formats.md 2.4"),
    Accepts("tensorrt-llm", "21156a7a", MODELOPT, frozenset({"NVFP4"}), "read", "load_weight_scales, formats.md 2.4"),
    Accepts(
        *("tensorrt-llm", "21156a7a", MODELOPT, frozenset({"W4A16_NVFP4"})),
        *("reported", "PR 16511, formats.md 1.6; its Marlin path is PR 13476"),
    ),
    Accepts("transformers", "5.17.0", CT, _CT_SCHEMES, "ran", "formats.md 4", strict=True),
    Accepts("transformers", "5.17.0", QERL, _CT_SCHEMES, "ran", "tests/doors; needs `import qerl_compile`"),
    Accepts("transformers", "5.23.0", CT, _CT_SCHEMES, "ran", "tests/exporters", strict=True),
    Accepts("transformers", "5.23.0", QERL, _CT_SCHEMES, "ran", "tests/doors; needs `import qerl_compile`"),
)
ENGINES = tuple(dict.fromkeys(row.engine for row in ACCEPTED))


@dataclass(frozen=True)
class Problem:
    """Why an engine would refuse a checkpoint, or compute garbage from it.

    Attributes:
        where: file and key, or tensor.
        expected: the rule.
        got: what is there.
        do: what mends it.
        otherwise: what the engine does with it as it is.
    """

    where: str
    expected: str
    got: str
    do: str
    otherwise: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}; got {self.got} ({self.otherwise}). {self.do}"


def split_target(target: str) -> tuple[str, str | None]:
    """Split "vllm==0.33" into engine and version (None if it names none), and refuse what the table does not have.

    Raises:
        ExportError: an engine or a version that was not looked at.
    """
    engine, stated, version = target.partition("==")
    versions = list(dict.fromkeys(row.version for row in ACCEPTED if row.engine == engine))
    if not versions:
        known = ", ".join(ENGINES)
        raise ExportError(where="target", expected=f"one of {known}", got=repr(engine), do="Choose one of these.")
    if stated and not any(_is_of(each, version) for each in versions):
        raise ExportError(
            where=f"target {target!r}",
            expected=f"a version of {engine} in the table of schemas: {', '.join(versions)}",
            got=repr(version),
            do=f"Write {engine} alone for the newest one that was looked at.",
        )
    return engine, version if stated else None


def accepted_by(target: str) -> list[Accepts]:
    """Return the rows of a target's version, or of its engine's newest.

    Raises:
        ExportError: as `split_target`.
    """
    engine, version = split_target(target)
    rows = [row for row in ACCEPTED if row.engine == engine]
    newest = rows[-1].version if version is None else next(r.version for r in rows[::-1] if _is_of(r.version, version))
    return [row for row in rows if row.version == newest]


def check_schema(checkpoint: str | PathLike[str] | Mapping[str, Any], target: str) -> list[Problem]:
    """Compare a checkpoint with what an engine accepts.

    Args:
        checkpoint: a directory, or a `quantization_config` as a mapping.
        target: an engine, or an engine and a version of the table: "vllm", "vllm==0.33".

    Returns:
        What is wrong, gravest first as far as that can be said; empty if the engine takes it.

    Raises:
        ExportError: an unknown target.
        CheckpointError: the directory is damaged.
    """
    from qerl_compile.exporters.schema_checks import config_problems, directory_problems

    rows = accepted_by(target)
    if isinstance(checkpoint, Mapping):
        return config_problems(checkpoint, rows, where="quantization_config")
    return directory_problems(open_checkpoint(Path(checkpoint), trust_remote_code=True), rows)


def _is_of(known: str, version: str) -> bool:
    return bool(version) and f"{known}.".startswith(f"{version}.")
