"""LoRA adapters, and norms that were trained with them, as PEFT files: how a run saves what it learned.

    adapter_model.safetensors    base_model.model.<module path>.lora_A.weight   float32 [R, K]
                                 base_model.model.<module path>.lora_B.weight   float32 [N, R]
                                 base_model.model.<norm path>.weight            float32 [d], if norms are trained
    adapter_config.json          peft.LoraConfig; the branch is B·A · alpha / rank; `modules_to_save` names the norms

PEFT, TRL and vLLM read these two files and nothing else, so nothing of ours is put into them. The commonest rank and
alpha become the config's own; the others go to `rank_pattern` and `alpha_pattern`. vLLM ignores those two patterns and
multiplies every module by the config's alpha / rank: give all modules the same quotient if vLLM is to serve them.

Trained norms are whole weights, not differences; PEFT puts them in the place of the base's, rounded to the base's
dtype. vLLM refuses an adapter with `modules_to_save` (lora/peft_helper.py), so `norms=False` writes one without, for a
base that holds the trained norms itself.

This module lies below `exporters` and `rl`, because both write adapters; `adapter_reading` reads them.

Shape suffixes: N output features, K input features, R rank, D features of a norm.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from qerl_compile.errors import ExportError
from qerl_compile.staged_write import refuse_existing, staged_directory

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED_NORM = "trained_weight"  # the Parameter of a norm that is trained (passes/trained_norms.py)


@dataclass(frozen=True)
class Adapter:
    """The low-rank branch of one linear: `x @ A.T @ B.T * alpha / rank`.

    Attributes:
        a_RK: the Parameter `lora_A`, float32 [R, K].
        b_NR: the Parameter `lora_B`, float32 [N, R].
        rank: R.
        alpha: numerator of the scaling.
    """

    a_RK: nn.Parameter
    b_NR: nn.Parameter
    rank: int
    alpha: float


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters that a model carries, by module path, in module order."""
    found: dict[str, Adapter] = {}
    for path, module in model.named_modules():
        a_RK, b_NR = module._parameters.get("lora_A"), module._parameters.get("lora_B")
        if a_RK is not None and b_NR is not None:
            found[path] = Adapter(a_RK, b_NR, module.__dict__["lora_rank"], module.__dict__["lora_alpha"])
    return found


def trained_norms_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the norm weights that a model trains, float32 [D], by module path, in module order."""
    norms = {path: module._parameters.get(TRAINED_NORM) for path, module in model.named_modules()}
    return {path: weight_D for path, weight_D in norms.items() if weight_D is not None}


def norm_name(path: str) -> str:
    """Name in the file of the trained weight of the norm at `path`."""
    return f"base_model.model.{path}.weight"


def weight_name(path: str, factor: str) -> str:
    """Name in the file of `factor` ("lora_A" or "lora_B") of the module at `path`."""
    return f"base_model.model.{path}.{factor}.weight"


def write_adapter(model: nn.Module, out_dir: str | PathLike[str], *, base_name: str, norms: bool = True) -> None:
    """Write the model's adapter as a PEFT directory, whole or not at all.

    Args:
        model: its adapted modules have Parameters `lora_A`, `lora_B` and attributes `lora_rank`, `lora_alpha`.
        out_dir: must not exist.
        base_name: the model that the adapter belongs to, a hub id or a path; PEFT loads the base from it.
        norms: whether trained norms are written too, if there are any.

    Raises:
        ExportError: no adapter, NaN or Inf in it, or `out_dir` exists.
    """
    refuse_existing(out_dir)
    tensors = adapter_tensors(model, norms=norms)
    with staged_directory(out_dir) as stage:
        write_adapter_files(model, stage, tensors, base_name=base_name)


def adapter_tensors(model: nn.Module, *, norms: bool = True) -> dict[str, Tensor]:
    """Return the adapter, and the trained norms unless they are not wanted, under their names in the file.

    Returns:
        Float32 tensors on the CPU; a tensor that lies there already is not copied.

    Raises:
        ExportError: no adapter, or NaN or Inf in it.
    """
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters_of(model).items():
        for factor, tensor in (("lora_A", adapter.a_RK), ("lora_B", adapter.b_NR)):
            tensors[weight_name(path, factor)] = _for_file(f"{path}.{factor}", tensor)
    if not tensors:
        raise ExportError(
            where=type(model).__name__,
            expected="modules with lora_A and lora_B",
            got="none",
            do="Transform the model with a recipe that has lora rules.",
        )
    for path, weight_D in trained_norms_of(model).items() if norms else ():
        tensors[norm_name(path)] = _for_file(f"{path}.{TRAINED_NORM}", weight_D)
    return tensors


def _for_file(where: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise ExportError(
            where=where,
            expected="finite numbers",
            got="NaN or Inf",
            do="Go back to an earlier checkpoint; this run has diverged.",
        )
    return tensor.detach().float().cpu().contiguous()


def write_adapter_files(model: nn.Module, directory: Path, tensors: Mapping[str, Tensor], *, base_name: str) -> None:
    """Write the two files of `adapter_tensors(model)`, with or without norms, into an existing directory."""
    from safetensors.torch import save_file

    save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
    norms = [path for path in trained_norms_of(model) if norm_name(path) in tensors]
    peft_config(model, base_name, norms=norms).save_pretrained(str(directory))


def peft_config(model: nn.Module, base_name: str, *, norms: Sequence[str] | None = None) -> "LoraConfig":
    """Return what PEFT needs to know about the adapter of a model that has one.

    Args:
        model: see `write_adapter`.
        base_name: see `write_adapter`.
        norms: paths of the trained norms that are saved beside it; None is all that the model has.
    """
    from peft import LoraConfig

    adapters = adapters_of(model)
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=_plain(alpha),
        rank_pattern={re.escape(path): each.rank for path, each in adapters.items() if each.rank != rank},
        alpha_pattern={re.escape(path): _plain(each.alpha) for path, each in adapters.items() if each.alpha != alpha},
    )
    # LoraConfig makes a set of a list that it is given at once; a list keeps the bytes independent of the hash seed.
    config.target_modules = _target_modules(model, set(adapters))
    config.modules_to_save = _modules_to_save(model, set(trained_norms_of(model) if norms is None else norms))
    return config


def _plain(alpha: float) -> int:
    """An alpha as people write it, 32 rather than 32.0; PEFT declares it int but computes with any number."""
    return int(alpha) if float(alpha).is_integer() else alpha  # pyright: ignore[reportReturnType]  # see above


def _target_modules(model: nn.Module, paths: set[str]) -> list[str]:
    """Leaf names (`q_proj`) if they select exactly the adapted modules, otherwise full paths: PEFT matches ends."""
    leaves = {path.rpartition(".")[2] for path in paths}
    selected = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted(leaves if selected == paths else paths)


def _modules_to_save(model: nn.Module, paths: set[str]) -> list[str] | None:
    """Leaf names if they select exactly these norms, otherwise full paths: PEFT matches ends of text, dots or none."""
    leaves = {path.rpartition(".")[2] for path in paths}
    selected = {path for path, _ in model.named_modules() if path.endswith(tuple(leaves))}
    return sorted(leaves if selected == paths else paths) or None
