"""Reading a quantization config: fields that must hold what NVFP4 is, lists that must not contradict the tensors.

A config is JSON from a stranger. It is not run through its writer's own schema, because the schemas forbid keys that
newer versions add; what is looked at here is what decides which numbers the tensors mean.

A list of exclusions that names a module which *is* packed is a contradiction: engines would build a dense layer and
then find no weight for it. A dense module that the list forgets is none: the tensors say what it is.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from qerl_compile.wording import listed, refuse_checkpoint, shown

WILDCARDS = frozenset("*?[")
MAX_WILD = 1000  # each is tried on every packed module


def groups_of(given: Mapping[str, Any], where: str) -> dict[str, Mapping[str, Any]]:
    """Return the config groups by name; none if the config has no such key.

    Raises:
        CheckpointError: not a mapping of mappings.
    """
    groups = given.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        refuse_checkpoint(
            f"{where}.config_groups",
            "a mapping of names to groups",
            shown(groups),
            do="Export the checkpoint again; its config is malformed.",
        )
    return dict(groups)


def check_fields(scheme: Any, wanted: Mapping[str, tuple[Any, ...]], where: str) -> Mapping[str, Any]:
    """Return a description of weights or inputs if it is NVFP4's.

    Args:
        scheme: what the config has.
        wanted: key → the values it may have; None among them if it may be absent.
        where: the key path, for errors.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    if not isinstance(scheme, Mapping):
        refuse_checkpoint(where, "a mapping", shown(scheme), do="Export the checkpoint again; its config is malformed.")
    for key, values in wanted.items():
        if not any(scheme.get(key) is value or scheme.get(key) == value for value in values):
            refuse_checkpoint(
                f"{where}.{key}",
                f"{' or '.join(repr(value) for value in values if value is not None)}, which is NVFP4",
                shown(scheme.get(key)),
                do="Start from the bf16 checkpoint of this model.",
            )
    return scheme


def check_excluded(excluded: Any, packed: Collection[str], where: str, evidence: str, *, wildcards: bool) -> None:
    """Refuse a list of dense modules that names packed ones.

    Args:
        excluded: the list, or None.
        packed: paths of the packed modules.
        where: the key path, for errors.
        evidence: leaf of the tensor by which a module is seen to be packed.
        wildcards: whether `*`, `?` and `[...]` in an entry stand for other characters.

    Raises:
        CheckpointError: not a list of texts, more wildcards than anyone writes, or a contradiction.
    """
    if excluded is None:
        return
    if not isinstance(excluded, list) or not all(isinstance(entry, str) for entry in excluded):
        refuse_checkpoint(where, "a list of module names", shown(excluded), do="Export the checkpoint again.")
    wild = [entry for entry in excluded if wildcards and not WILDCARDS.isdisjoint(entry)]
    if len(wild) > MAX_WILD:
        refuse_checkpoint(
            where, f"at most {MAX_WILD} entries with wildcards", str(len(wild)), do="Do not use this checkpoint."
        )
    named = set(excluded)
    for path in packed:
        entry = path if path in named else next((entry for entry in wild if fnmatchcase(path, entry)), None)
        if entry is not None:
            refuse_checkpoint(
                where,
                "only modules that stay dense",
                f"{shown(entry)}, but there is a packed tensor {path}.{evidence}",
                do="Remove the entry if the layer is meant to be packed, or export the checkpoint again.",
            )


def check_input_scales(
    packed: Collection[str], scaled: Collection[str], leaf: str, where: str, *, quantized: bool, required: bool
) -> None:
    """Refuse input scales that the config does not speak of, and modules that lack theirs.

    Args:
        packed: paths of the packed modules.
        scaled: those that have a calibrated input scale.
        leaf: what the tensor is called.
        where: the config's key that decides.
        quantized: whether the config says that inputs are quantized.
        required: whether each module must have one; otherwise all or none.

    Raises:
        CheckpointError: naming the modules.
    """
    if not quantized and scaled:
        refuse_checkpoint(
            where,
            f"no {leaf}, because this config leaves activations in 16 bits",
            listed([f"{path}.{leaf}" for path in scaled]),
            do="Export the checkpoint again with quantized activations, or without these tensors.",
        )
    missing = [path for path in packed if path not in scaled]
    if quantized and missing and (required or scaled):
        refuse_checkpoint(
            where,
            f"{leaf} of every packed linear, because this config quantizes activations",
            f"none of {listed(missing)}",
            do="Calibrate and export it again, or describe it as weight-only.",
        )
