"""Load a PEFT adapter into a model's LoRA factors and trained norms, to train on from it.

Reading needs neither PEFT (8 s to import) nor trust in the files. Everything is checked before the model changes:

- the names are exactly those of the model's adapted modules, the shapes those of its factors, the numbers finite;
- the adapter is a plain LoRA, with or without trained norms. What would change the function in other ways is refused:
  DoRA, trained biases, other whole modules, initialisations that alter the base weights.

An adapter may scale differently than the recipe of the model that it is loaded into: another alpha, or rsLoRA's
alpha / √rank. Then B is multiplied by the quotient of the scalings, which leaves the function as it was. An adapter
without norms gives a model that trains some the base's norms, which is likewise the function that its files describe.

What this module does not do: change ranks, or adapt modules that the recipe leaves alone.
"""

import math
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import CONFIG, WEIGHTS, adapters_of, norm_name, trained_norms_of, weight_name
from qerl_compile.checkpoint_config import read_bounded
from qerl_compile.checkpoint_tensors import compare_names, finite_or_raise
from qerl_compile.graph import held_tensor
from qerl_compile.safetensors_header import TensorEntry, read_header
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import refuse_checkpoint, shown

MAX_CONFIG_BYTES = 1_000_000

# What PEFT 0.21 writes that is used here, or that does not change the function of a trained adapter.
_UNDERSTOOD = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    ),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "modules_to_save"),
}
_REASONS = {
    "use_dora": "DoRA scales every column of the weight",
    "lora_bias": "it trains a bias of the branch",
    "fan_in_fan_out": "it is for transposed weights",
    "trainable_token_indices": "it replaces embeddings",
    "target_parameters": "it adapts parameters that are not linears",
    "layer_replication": "it changes the layers of the model",
}
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base weights alone; PiSSA, OLoRA, CorDA and LoftQ do not."""

# Names, dots and a few `.*`: a richer regular expression can take exponential time to match.
_PATTERN = re.compile(r"\^?(?:\.\*|\\[.-]|[\w.-]){1,512}\$?", re.ASCII)


def read_adapter(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Copy a PEFT adapter into a model that has LoRA factors on the same modules with the same ranks.

    Args:
        model: its adapted modules have Parameters `lora_A`, `lora_B` and attributes `lora_rank`, `lora_alpha`, and the
            norms that it trains a Parameter `trained_weight`.
        directory: with adapter_model.safetensors and adapter_config.json.

    Raises:
        CheckpointError: a file is missing or damaged, modules or shapes differ, NaN or Inf, or a feature that we lack.
            The model is as before.
    """
    from safetensors import safe_open

    weights, config_file = Path(directory, WEIGHTS), Path(directory, CONFIG)
    config = _read_config(config_file)
    adapters, norms = adapters_of(model), trained_norms_of(model)
    with_norms = bool(config.get("modules_to_save"))
    if with_norms:
        _check_saved_modules(config["modules_to_save"], list(norms), config_file)
    entries = read_header(weights)
    compare_names(
        [weight_name(path, factor) for path in adapters for factor in ("lora_A", "lora_B")]
        + ([norm_name(path) for path in norms] if with_norms else []),
        list(entries),
        where=f"{weights} against the recipe's lora rules",
    )
    factors: list[tuple[Tensor, Tensor, float]] = []
    with safe_open(weights, framework="pt") as file:
        for path, adapter in adapters.items():
            ratio = _scaling(config, path, adapter.rank, config_file) / (adapter.alpha / adapter.rank)
            for factor, own in (("lora_A", adapter.a_RK), ("lora_B", adapter.b_NR)):
                name = weight_name(path, factor)
                _check_entry(name, entries[name], own, rank_axis=0 if factor == "lora_A" else 1)
                loaded = finite_or_raise(name, file.get_tensor(name), weights).float()
                factors.append((own, loaded, ratio if factor == "lora_B" else 1.0))
        for path, own in norms.items():
            loaded = held_tensor(model.get_submodule(path), "weight").detach().float()
            if with_norms:
                name = norm_name(path)
                _check_entry(name, entries[name], own)
                loaded = finite_or_raise(name, file.get_tensor(name), weights).float()
            factors.append((own, loaded, 1.0))
    with torch.no_grad():
        for own, loaded, ratio in factors:
            own.copy_(loaded if ratio == 1.0 else loaded * ratio)


def adapter_ranks(directory: str | PathLike[str]) -> dict[str, tuple[int, float]]:
    """Return {module path: (rank, alpha)} of an adapter's files, so that a model can be given the same adapters.

    alpha is such that alpha / rank is the file's scaling, rsLoRA included.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is no plain LoRA.
    """
    weights, config_file = Path(directory, WEIGHTS), Path(directory, CONFIG)
    config = _read_config(config_file)
    prefix, suffix = weight_name("\0", "lora_A").split("\0")
    ranks: dict[str, tuple[int, float]] = {}
    for name, entry in read_header(weights).items():
        if name.startswith(prefix) and name.endswith(suffix) and len(entry.shape) == 2:
            path, rank = name[len(prefix) : -len(suffix)], entry.shape[0]
            ranks[path] = (rank, _scaling(config, path, rank, config_file) * rank)
    if not ranks:
        refuse_checkpoint(str(weights), "LoRA factors of at least one module", "none", do="Load an adapter.")
    return ranks


def adapter_norms(directory: str | PathLike[str]) -> tuple[str, ...]:
    """Return the module paths of the norms that an adapter's files hold, in file order; empty for a plain adapter.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter has what we lack.
    """
    if not _read_config(Path(directory, CONFIG)).get("modules_to_save"):
        return ()
    prefix, suffix = norm_name("\0").split("\0")
    names = [name for name, entry in read_header(Path(directory, WEIGHTS)).items() if len(entry.shape) == 1]
    return tuple(
        name[len(prefix) : -len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix)
    )


def _check_saved_modules(saved: Any, norms: Sequence[str], file: Path) -> None:
    """Refuse an adapter that replaces other modules than the trained norms; PEFT takes what ends like an entry."""
    entries: list[Any] = saved if isinstance(saved, list) else [saved]
    ends = tuple(entry for entry in entries if isinstance(entry, str) and any(path.endswith(entry) for path in norms))
    if len(ends) < len(entries) or not all(path.endswith(ends) for path in norms):
        expected = f"the {len(norms)} norms that the model trains" if norms else "an adapter without it"
        do = "Set the recipe's trainable_norms to the norms of the adapter; merge what else it replaces into the base."
        got = f"{shown(saved)}; it replaces whole modules"
        refuse_checkpoint(f"{file}: modules_to_save", expected, got, do=do)


def _check_entry(name: str, entry: TensorEntry, own: Tensor, *, rank_axis: int | None = None) -> None:
    where = f"{entry.file}: tensor {shown(name)}"
    if entry.dtype not in ("F32", "BF16", "F16"):
        refuse_checkpoint(where, "F32, BF16 or F16", entry.dtype, do="Save the adapter in one of these.")
    if entry.shape != tuple(own.shape):
        rank = 0
        if rank_axis is not None and len(entry.shape) == 2 and entry.shape[1 - rank_axis] == own.shape[1 - rank_axis]:
            rank = entry.shape[rank_axis]
        do = f"Set rank: {rank} for it in the recipe's lora rules." if rank else "Load an adapter of this base model."
        refuse_checkpoint(where, f"shape {list(own.shape)}", str(list(entry.shape)), do=do)


def _read_config(file: Path) -> dict[str, Any]:
    config = parse_json(read_bounded(file, MAX_CONFIG_BYTES), where=str(file))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = shown(config.get("peft_type") if isinstance(config, dict) else config)
        refuse_checkpoint(f"{file}: peft_type", "'LORA'", got, do="Load a LoRA adapter.")
    for key in config.keys() - _UNDERSTOOD:
        if config[key]:  # an unknown feature that is switched off does nothing
            reason = _REASONS.get(key, "it is not a feature of plain LoRA")
            do = "Merge the adapter into its base with PEFT, or train one without it."
            refuse_checkpoint(f"{file}: {key}", "an adapter without it", f"{shown(config[key])}; {reason}", do=do)
    if config.get("bias", "none") != "none":
        refuse_checkpoint(
            f"{file}: bias", "'none'", shown(config["bias"]), do="Load an adapter without trained biases."
        )
    start = config.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        expected = "an initialisation that leaves the base weights alone"
        do = "Convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        refuse_checkpoint(f"{file}: init_lora_weights", expected, shown(start), do=do)
    return config


def _scaling(config: dict[str, Any], path: str, rank: int, file: Path) -> float:
    """What the file's B·A is multiplied with at a module."""
    alpha = config.get("lora_alpha", 8)  # PEFT's default
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        refuse_checkpoint(f"{file}: alpha_pattern", "a mapping", shown(patterns), do="Mend the file.")
    for pattern, value in patterns.items():
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > 4:
            expected, do = "module names, dots and up to four `.*`", "Write the module's path out."
            refuse_checkpoint(f"{file}: alpha_pattern", expected, shown(pattern), do=do)
        if re.match(rf"(?:.*\.)?(?:{pattern})$", path):  # as PEFT does: the first that matches the end of the path
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        refuse_checkpoint(f"{file}: lora_alpha of {path}", "a finite number", shown(alpha), do="Mend the file.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
