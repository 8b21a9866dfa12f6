"""What the quantization configs say, against the schema and against what NVFP4 is.

compressed-tensors' own pydantic schema judges its section first: what it refuses, every engine that uses it refuses.
Then the fields that choose an engine's scheme. ModelOpt has no schema; its readers look at `quant_algo`, and
TensorRT-LLM at a second file.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qerl_compile.checkup.findings import Fault
from qerl_compile.checkup.recognition import COMPRESSED, MODELOPT, Contents
from qerl_compile.layouts.compressed_tensors import FORMAT
from qerl_compile.layouts.modelopt import BESIDE
from qerl_compile.wording import shown

SECTION = "config.json: quantization_config"
FOUR_BITS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True}  # compressed-tensors' QuantizationArgs
SERVED_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")  # vLLM 0.33


def config_faults(contents: Contents) -> Iterator[Fault]:
    """Yield what is wrong with config.json's section and with hf_quant_config.json."""
    if not contents.packed:
        return
    if not contents.section and not contents.beside:
        yield Fault("config-missing", "config.json", "no quantization_config, but packed tensors")
    elif contents.dialect is COMPRESSED:
        yield from _compressed_faults(contents.section)
    elif contents.dialect is MODELOPT:
        yield from _modelopt_faults(contents)


def quantized_inputs(contents: Contents) -> bool:
    """Whether the configs describe activations in 4 bits, W4A4."""
    if contents.dialect is MODELOPT:
        described = _modelopt_described(contents)
        groups = _groups(described)
        return described.get("quant_algo") == "NVFP4" and (
            not groups or any(group.get("input_activations") for group in groups.values())
        )
    return any(group.get("input_activations") is not None for group in _groups(contents.section).values())


def quantized_cache(contents: Contents) -> bool:
    """Whether the configs describe a cache of keys and values in 8 bits."""
    if contents.dialect is MODELOPT:
        described = _modelopt_described(contents)
        return bool(described.get("kv_cache_quant_algo") or described.get("kv_cache_scheme"))
    return bool(contents.section.get("kv_cache_scheme"))


def _compressed_faults(section: Mapping[str, Any]) -> Iterator[Fault]:
    invalid = _schema_fault(section)
    if invalid:
        yield Fault("config-invalid", f"{SECTION}{invalid[0]}", invalid[1])
    if section.get("format") != FORMAT:
        yield Fault("scheme", f"{SECTION}.format", f"{shown(section.get('format'))} instead of {FORMAT!r}")
    if section.get("quantization_status") != "compressed":
        yield Fault("status-missing", f"{SECTION}.quantization_status", shown(section.get("quantization_status")))
    groups = _groups(section)
    if not groups:
        yield Fault("scheme", f"{SECTION}.config_groups", "no group that describes weights")
    for name, group in groups.items():
        where = f"{SECTION}.config_groups.{name}"
        number_format = group.get("format")
        if number_format not in (None, FORMAT):
            yield Fault("scheme", f"{where}.format", f"{shown(number_format)} instead of {FORMAT!r}")
        yield from _scheme_faults(group.get("weights"), f"{where}.weights")
        if group.get("input_activations") is not None:
            yield from _scheme_faults(group["input_activations"], f"{where}.input_activations")


def _scheme_faults(scheme: Any, where: str) -> Iterator[Fault]:
    if not isinstance(scheme, Mapping):
        yield Fault("scheme", where, shown(scheme))
        return
    for key, wanted in FOUR_BITS.items():
        got = scheme.get(key, DEFAULTS.get(key))
        if got != wanted or isinstance(got, bool) != isinstance(wanted, bool):
            yield Fault("scheme", f"{where}.{key}", f"{shown(got)} instead of {wanted!r}")


def _schema_fault(section: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return (key path, message) of what compressed-tensors' schema refuses first."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        QuantizationConfig.model_validate({**section, "quant_method": "compressed-tensors"})
    except ValidationError as fault:
        first = fault.errors(include_url=False)[0]
        path = "".join(f".{part}" for part in first["loc"] if isinstance(part, str) and part != "list[str]")
        # its classes are part of pydantic's path where a value may be of several types
        return path.replace(".QuantizationScheme", ""), shown(first["msg"])
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as fault:  # from its own validators
        return "", shown(str(fault))
    return None


def _modelopt_faults(contents: Contents) -> Iterator[Fault]:
    described = _modelopt_described(contents)
    algorithm = described.get("quant_algo")
    where = SECTION if contents.section else BESIDE
    if algorithm not in SERVED_ALGORITHMS:
        yield Fault("algorithm", f"{where}.quant_algo", shown(algorithm))
    for name, group in _groups(described).items():
        for part in ("weights", "input_activations"):
            scheme = group.get(part)
            for key in ("num_bits", "group_size", "type"):
                got = scheme.get(key, FOUR_BITS[key]) if isinstance(scheme, Mapping) else FOUR_BITS[key]
                if got != FOUR_BITS[key]:
                    found = f"{shown(got)} instead of {FOUR_BITS[key]!r}"
                    yield Fault("scheme", f"{where}.config_groups.{name}.{part}.{key}", found)
    if described.get("group_size", 16) != 16:
        yield Fault("scheme", f"{where}.group_size", f"{shown(described['group_size'])} instead of 16")
    nested = contents.beside.get("quantization")
    if not isinstance(nested, Mapping):
        if "group_size" not in described:
            yield Fault(
                "second-config-missing", BESIDE, "not there" if not contents.beside else "no key `quantization`"
            )
        return
    if nested.get("quant_algo") != algorithm:
        found = f"{shown(nested.get('quant_algo'))}, config.json says {shown(algorithm)}"
        yield Fault("configs-disagree", f"{BESIDE}: quantization.quant_algo", found)
    if nested.get("group_size") != 16:
        yield Fault("scheme", f"{BESIDE}: quantization.group_size", f"{shown(nested.get('group_size'))} instead of 16")
    here, there = (_texts(each, ("ignore", "exclude_modules")) for each in (described, nested))
    if here != there:
        found = f"the lists of dense modules differ in {shown(sorted(here ^ there)[:5])}"
        yield Fault("configs-disagree", f"{BESIDE}: quantization.exclude_modules", found)


def _modelopt_described(contents: Contents) -> Mapping[str, Any]:
    """Return the description that is believed: config.json's, else the other file's; either may be nested."""
    described = contents.section or contents.beside
    nested = described.get("quantization")
    return nested if isinstance(nested, Mapping) else described


def _groups(described: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups = described.get("config_groups")
    return {k: v for k, v in groups.items() if isinstance(v, Mapping)} if isinstance(groups, Mapping) else {}


def _texts(described: Mapping[str, Any], keys: tuple[str, ...]) -> set[str]:
    entries = next((described[key] for key in keys if isinstance(described.get(key), list)), [])
    return {entry for entry in entries if isinstance(entry, str)}
