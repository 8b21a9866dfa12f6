"""The rules behind `check_schema`: one function a question, each returning what is wrong.

A rule is here if breaking it was seen to make an engine refuse a file, or compute garbage from it (design/formats.md,
section 5, "What each mistake does"). The schema of compressed-tensors is checked by compressed-tensors itself.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qerl_compile.checkpoint_dir import CheckpointDirectory, TensorEntry
from qerl_compile.exporters.dense_lists import names_module
from qerl_compile.exporters.fused_partners import partners
from qerl_compile.exporters.schemas import CT, MODELOPT, QERL, Accepts, Problem
from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.layouts import OWN_VERSION
from qerl_compile.layouts.compressed_tensors import FORMAT
from qerl_compile.layouts.modelopt import BESIDE
from qerl_compile.strict_json import parse_json

GARBAGE = "it computes with wrong weights, silently"
UNINITIALISED = "it leaves these weights uninitialised"
REFUSED = "it refuses the checkpoint"


@dataclass(frozen=True)
class _Names:
    """What a format calls a packed linear's tensors."""

    codes: str
    scalar: str
    input_scalar: str


_NAMES = {
    CT: _Names("weight_packed", "weight_global_scale", "input_global_scale"),
    QERL: _Names("weight_packed", "weight_global_scale", "input_global_scale"),
    MODELOPT: _Names("weight", "weight_scale_2", "input_scale"),
}


def config_problems(config: Mapping[str, Any], rows: Sequence[Accepts], *, where: str) -> list[Problem]:
    """What is wrong with a quantization_config, for the formats and schemes of `rows`."""
    method = config.get("quant_method")
    mine = [row for row in rows if row.method == method]
    if not mine:
        methods = " or ".join(dict.fromkeys(row.method for row in rows))
        do = f"Export it for {rows[0].engine}."
        return [Problem(f"{where}.quant_method", f"{methods}, for {rows[0].engine}", repr(method), do, REFUSED)]
    found = list(_malformed(config, where))
    if found:
        return found
    found = list(_modelopt_keys(config, where) if method == MODELOPT else _compressed_tensors_keys(config, mine, where))
    scheme, known = scheme_of(config), {scheme for row in mine for scheme in row.schemes}
    if not found and scheme not in known:
        expected = f"{' or '.join(sorted(known))}, for {rows[0].engine} {rows[0].version}"
        found.append(Problem(where, expected, str(scheme), "Export it again.", REFUSED))
    return found


def scheme_of(config: Mapping[str, Any]) -> str | None:
    """The scheme that a quantization_config describes, by the name its format gives it."""
    if config.get("quant_method") == MODELOPT:
        return config.get("quant_algo")
    groups = config.get("config_groups") or {}
    return "NVFP4" if any(group.get("input_activations") for group in groups.values()) else "NVFP4A16"


def directory_problems(checkpoint: CheckpointDirectory, rows: Sequence[Accepts]) -> list[Problem]:
    """What is wrong with a directory: its configs, and its tensors' names, dtypes, shapes and scalars."""
    config, where = checkpoint.config.get("quantization_config"), f"{checkpoint.root / 'config.json'}"
    where += ": quantization_config"
    if not isinstance(config, Mapping):
        return [Problem(where, "a description of the quantization", repr(config), "Export it again.", REFUSED)]
    found = config_problems(config, rows, where=where)
    if found:
        return found
    if config["quant_method"] == MODELOPT:
        found += _nested_config(checkpoint, config)
    names = _NAMES[config["quant_method"]]
    linears = _packed(checkpoint.tensors, names)
    found += _tensors(checkpoint.tensors, linears, names, four_bits=scheme_of(config) == "NVFP4")
    found += _cache(checkpoint.tensors, config)
    found += _ignored(checkpoint, config, linears, where, [row for row in rows if row.method == config["quant_method"]])
    found += _partners(checkpoint, linears, names)
    return found


def _malformed(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """What the other questions cannot look into, such as a group that names a preset of compressed-tensors."""
    groups, cache, do = config.get("config_groups"), config.get("kv_cache_scheme"), "Export it again."
    mappings = isinstance(groups, Mapping) and all(isinstance(each, Mapping) for each in groups.values())
    if not mappings if groups else config.get("quant_method") != MODELOPT:
        expected = "one group or more that describes weights"
        yield Problem(f"{where}.config_groups", expected, repr(groups), do, REFUSED)
    if cache is not None and not isinstance(cache, Mapping):
        yield Problem(f"{where}.kv_cache_scheme", "a description of the cache", repr(cache), do, REFUSED)


def _compressed_tensors_keys(config: Mapping[str, Any], rows: Sequence[Accepts], where: str) -> Iterator[Problem]:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    do = "Export it again."
    # what compressed-tensors reads outside its QuantizationConfig, and our own key
    outside = {"version", "sparsity_config", "transform_config", "format_version", "quant_method"}
    try:
        read = QuantizationConfig.model_validate({k: v for k, v in config.items() if k not in outside})
    except ValidationError as fault:
        first = fault.errors()[0]
        at = ".".join(map(str, first["loc"]))
        yield Problem(f"{where}.{at}", "what compressed-tensors' schema allows", first["msg"], do, REFUSED)
        return
    if read.format != FORMAT:
        yield Problem(f"{where}.format", repr(FORMAT), repr(read.format), do, REFUSED)
    if read.quantization_status != "compressed" and any(row.strict for row in rows):
        yield Problem(
            f"{where}.quantization_status", "'compressed'", repr(read.quantization_status.value), do, UNINITIALISED
        )
    wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": BLOCK, "symmetric": True}
    for name, group in config["config_groups"].items():
        for part in ("weights", "input_activations"):
            given = group.get(part)
            if given is None and part == "input_activations":
                continue
            for key, value in wanted.items():
                got = (given or {}).get(key, True if key == "symmetric" else None)
                if got != value:
                    at = f"{where}.config_groups.{name}.{part}.{key}"
                    yield Problem(at, repr(value), repr(got), do, REFUSED)
    cache = config.get("kv_cache_scheme") or {}
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    for key, value in wanted.items() if cache else ():
        if cache.get(key) != value:
            yield Problem(f"{where}.kv_cache_scheme.{key}", repr(value), repr(cache.get(key)), do, REFUSED)
    if config.get("quant_method") == QERL and config.get("format_version") != OWN_VERSION:
        yield Problem(f"{where}.format_version", str(OWN_VERSION), repr(config.get("format_version")), do, REFUSED)


def _modelopt_keys(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    do = "Export it again."
    if not isinstance(config.get("ignore"), list):
        yield Problem(f"{where}.ignore", "a list of module names", repr(config.get("ignore")), do, REFUSED)
    cache = config.get("kv_cache_scheme")
    if cache is not None and (cache.get("num_bits"), cache.get("type")) != (8, "float"):
        yield Problem(f"{where}.kv_cache_scheme", "8-bit float", json.dumps(cache), do, "it ignores the cache's scales")
    groups = (config.get("config_groups") or {}).values()
    has_inputs = any(group.get("input_activations") for group in groups)
    if groups and has_inputs != (config.get("quant_algo") == "NVFP4"):
        got = f"{config.get('quant_algo')} {'with' if has_inputs else 'without'} input_activations"
        yield Problem(f"{where}.config_groups", "input_activations with NVFP4 and only then", got, do, GARBAGE)


def _nested_config(checkpoint: CheckpointDirectory, flat: Mapping[str, Any]) -> Iterator[Problem]:
    file, do = checkpoint.root / BESIDE, "Export it again."
    if not file.is_file():
        yield Problem(str(file), "a file, which TensorRT-LLM takes for the truth", "none", do, REFUSED)
        return
    nested = parse_json(file.read_bytes(), where=str(file))
    quantization = nested.get("quantization", {})
    demanded = ("quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules")
    missing = [key for key in demanded if key not in quantization]
    if missing:
        yield Problem(f"{file}: quantization", "all keys that vLLM demands", f"no {', '.join(missing)}", do, REFUSED)
        return
    cache = "FP8" if flat.get("kv_cache_scheme") else None
    says = {"quant_algo": flat["quant_algo"], "group_size": BLOCK, "kv_cache_quant_algo": cache}
    for key, value in {**says, "exclude_modules": flat["ignore"]}.items():
        if quantization[key] != value:
            expected = f"{value!r}, as config.json says"
            yield Problem(f"{file}: quantization.{key}", expected, repr(quantization[key]), do, GARBAGE)


def _packed(tensors: Mapping[str, TensorEntry], names: _Names) -> list[str]:
    """Linears that have any tensor only a packed one has."""
    leaves = {names.scalar, names.input_scalar, "weight_scale", "weight_packed"}
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in leaves))


def _tensors(
    tensors: Mapping[str, TensorEntry], linears: Sequence[str], names: _Names, *, four_bits: bool
) -> Iterator[Problem]:
    do = "Export it again."
    for path in linears:
        codes = tensors.get(f"{path}.{names.codes}")
        if codes is None or codes.dtype != "U8" or len(codes.shape) != 2 or codes.shape[1] * 2 % BLOCK:
            yield Problem(f"{path}.{names.codes}", "U8 [N, K/2]", _shown(codes), do, GARBAGE)
            continue
        blocks = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
        block = tensors.get(f"{path}.weight_scale")
        if block is None or (block.dtype, block.shape) != ("F8_E4M3", blocks):
            yield Problem(f"{path}.weight_scale", f"F8_E4M3 {list(blocks)}", _shown(block), do, GARBAGE)
        for leaf, needed in ((names.scalar, True), (names.input_scalar, four_bits)):
            scalar = tensors.get(f"{path}.{leaf}")
            if needed and (scalar is None or scalar.dtype != "F32" or scalar.shape not in ((), (1,))):
                yield Problem(f"{path}.{leaf}", "F32 [] or [1]", _shown(scalar), do, UNINITIALISED)
            elif scalar is not None and not needed:
                expected = "no such tensor without quantized activations"
                yield Problem(f"{path}.{leaf}", expected, _shown(scalar), do, REFUSED)


def _cache(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Iterator[Problem]:
    keys, values = ([name for name in tensors if name.endswith(f".{leaf}")] for leaf in ("k_scale", "v_scale"))
    there, stated = bool(keys and values), bool(config.get("kv_cache_scheme"))
    if there != stated or len(keys) != len(values):
        expected = "scales of keys and values with a kv_cache_scheme, and only then"
        got = f"{len(keys)} k_scale, {len(values)} v_scale and {'a' if stated else 'no'} scheme"
        yield Problem("KV cache", expected, got, "Export it again.", "it fills the cache with scale 1")


def _ignored(
    checkpoint: CheckpointDirectory,
    config: Mapping[str, Any],
    linears: Sequence[str],
    where: str,
    rows: Sequence[Accepts],
) -> Iterator[Problem]:
    """Dense linears that are not listed, and packed ones that are.

    Which dense matrix is a linear cannot be seen in a file. Those are that are named like a packed one elsewhere, and
    `lm_head`, tied or not.
    """
    ignored, key = list(config.get("ignore") or ()), f"{where}.ignore"
    wildcards, do = config["quant_method"] == MODELOPT, "Export it again."

    def named(path: str) -> bool:
        return any(names_module(entry, path, wildcards=wildcards) for entry in ignored)

    for path in linears:
        if named(path):
            yield Problem(key, "dense modules only", f"{path}, which is packed", do, GARBAGE)
        elif any(row.excludes_substrings for row in rows):
            inside = [name for name in ignored if name in path]
            if inside:
                expected, do = f"no name that the packed {path} contains", "Use the compressed-tensors format."
                yield Problem(key, expected, inside[0], do, "it takes the packed linear for a dense one")
    modules = {name.removesuffix(".weight"): entry for name, entry in checkpoint.tensors.items()}
    dense = [path for path, entry in modules.items() if len(entry.shape) == 2 and entry.dtype in ("BF16", "F16", "F32")]
    leaves = {path.rpartition(".")[2] for path in linears}
    expected_listed = [path for path in dense if path.rpartition(".")[2] in leaves or path == "lm_head"]
    if checkpoint.config.get("tie_word_embeddings") and any(row.strict for row in rows):
        expected_listed.append("lm_head")
    for path in dict.fromkeys(expected_listed):
        if not named(path):
            yield Problem(key, "every linear that stays dense", f"no {path}", do, UNINITIALISED)


def _partners(checkpoint: CheckpointDirectory, linears: Sequence[str], names: _Names) -> Iterator[Problem]:
    matrices = [name for name in checkpoint.tensors if name.endswith((".weight", f".{names.codes}"))]
    for members in partners([name.rpartition(".")[0] for name in matrices]):
        inside = [path for path in members if path in linears]
        if inside and len(inside) < len(members):
            expected = f"all of {', '.join(members)} packed or none"
            do = "Quantize them together."
            yield Problem(members[0].rpartition(".")[0], expected, f"only {', '.join(inside)}", do, REFUSED)
            continue
        for leaf in (names.scalar, names.input_scalar):
            numbers = {path: _scalar(checkpoint.tensors.get(f"{path}.{leaf}")) for path in inside}
            if len(set(numbers.values())) > 1:
                got = ", ".join(f"{path} {number}" for path, number in numbers.items())
                do = "Quantize or calibrate them as a group."
                yield Problem(members[0].rpartition(".")[0], f"one {leaf} for all of them", got, do, GARBAGE)


def _scalar(entry: TensorEntry | None) -> float | None:
    if entry is None or entry.dtype != "F32" or entry.size_bytes != 4:
        return None
    with entry.file.open("rb") as file:
        file.seek(entry.begin)
        return struct.unpack("<f", file.read(4))[0]


def _shown(entry: TensorEntry | None) -> str:
    return "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
