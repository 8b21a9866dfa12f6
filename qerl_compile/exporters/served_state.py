"""What a serving checkpoint holds, read from the model once, before any format is thought of.

    packed          codes, block scales and global scale of every packed linear
    input scales    what calibration found for the inputs of these linears; only for 4-bit activations
    KV scales       what calibration found for keys and values; only for an FP8 cache
    dense           everything else in the state_dict, as it lies in the model

Codes and block scales mean the same in compressed-tensors and in ModelOpt. Scalars exist in two directions, a divisor
2688/amax and a multiplier amax/2688, so they travel with their direction (`Scalar`), and a format asks for the one it
stores: the source's own number if it has that direction, its float32 reciprocal once if not. Decoding is then equal
bit for bit in a divisor's both forms, since every reader of a divisor takes the same reciprocal; a multiplier written
as a divisor and inverted again differs from itself by one unit in the last place for one value in six.

What is not served: LoRA factors (a file of their own), noise, and, unless `norms_in_base`, trained norms. A tied tensor
appears once. Nothing here is converted or copied; shards.py does that, a shard at a time.

All that could make a file worthless is refused here or in fused_partners.py, before the first byte is written: broken
packed state, NaN or Inf anywhere, and scales that were asked for and are not there.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qerl_compile.adapter_files import TRAINED_NORM, adapters_of, trained_norms_of
from qerl_compile.errors import ExportError, FormatError
from qerl_compile.exporters.served_experts import dense_experts, names_of_stacks, overwritten, packed_experts, routers
from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.graph import leaf_tensor
from qerl_compile.model import QerlModel
from qerl_compile.passes.quantize import CACHE_SCALES, GLOBAL_SCALES, INPUT_SCALES, Direction, packed_of
from qerl_compile.trained_weights import trained_packed

DENSE_DTYPE = torch.bfloat16
"""Of all that is not packed: transformers decodes NVFP4 to bfloat16 whatever the config says."""
BITS = ("16", "4")
KV_BITS = ("16", "8")


@dataclass(frozen=True, eq=False)
class Scalar:
    """A scale of a whole tensor: `value` is float32 [1], finite, positive, and so is its reciprocal."""

    value: Tensor
    direction: Direction

    def toward(self, direction: Direction) -> Tensor:
        """The number that a format stores: verbatim, or the reciprocal. float32 [1]."""
        return self.value if direction == self.direction else self.value.reciprocal()


@dataclass(frozen=True, eq=False)
class ServedState:
    """What a serving checkpoint holds; keys are module paths, or tensor names in `dense`.

    Attributes:
        packed: packed linears, and experts under the names that files have for them.
        global_scales: of the same linears.
        input_scales: of the same linears, or empty: activations stay in 16 bits.
        kv_scales: attention module → its (k_scale, v_scale), multipliers float32 [1]; or empty.
        dense: every other tensor, the model's own.
        dense_linears: linears that stay dense, a tied head, routers and dense experts among them.
        embeddings: embedding tables.
    """

    packed: Mapping[str, PackedNVFP4]
    global_scales: Mapping[str, Scalar]
    input_scales: Mapping[str, Scalar]
    kv_scales: Mapping[str, tuple[Tensor, Tensor]]
    dense: Mapping[str, Tensor]
    dense_linears: tuple[str, ...]
    embeddings: tuple[str, ...]

    def numbers(self, direction: Direction) -> dict[str, dict[str, float]]:
        """What engines want equal among fused partners, as it will be written: see `check_partners`."""
        kinds = {"global scale": self.global_scales, "input scale": self.input_scales}
        return {
            what: {path: scalar.toward(direction).item() for path, scalar in scalars.items()}
            for what, scalars in kinds.items()
        }


def served_state(
    model: nn.Module, *, norms_in_base: bool = False, activations: str = "16", kv_cache: str = "16"
) -> ServedState:
    """Read a transformed model.

    Args:
        model: with packed linears.
        norms_in_base: put trained norms in the place of the base's.
        activations: "16", or "4" to serve with the calibrated input scales.
        kv_cache: "16", or "8" to serve with the calibrated FP8 scales of keys and values.

    Raises:
        ExportError: nothing is packed, the packed state is broken, NaN or Inf, or a calibrated scale is missing.
    """
    _check_choice("activations", activations, BITS)
    _check_choice("kv_cache", kv_cache, KV_BITS)
    packed = packed_linears(model)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears += [*routers(model), *(path for views in dense_experts(model).values() for path in views)]
    return ServedState(
        packed=packed,
        global_scales={
            path: _scalar(f"{path}: global scale", p.global_scale, p.direction) for path, p in packed.items()
        },
        input_scales=_input_scales(model, packed) if activations == "4" else {},
        kv_scales=_kv_scales(model) if kv_cache == "8" else {},
        dense=_dense(model, packed, norms_in_base=norms_in_base),
        dense_linears=tuple(path for path in linears if path not in packed),
        embeddings=tuple(path for path, module in model.named_modules() if isinstance(module, nn.Embedding)),
    )


def packed_linears(model: nn.Module) -> dict[str, PackedNVFP4]:
    """Return what is packed, by module path; trained full weights are packed here, as the graph rounds them.

    Raises:
        ExportError: nothing is, or a packed weight breaks the format.
        FormatError: a trained weight has NaN or Inf.
    """
    packed: dict[str, PackedNVFP4] = {}
    if isinstance(model, QerlModel):
        for group in trained_packed(model, model.qerl.plan):
            packed |= group
    for path, module in model.named_modules():
        try:
            weight = packed_of(module)
        except FormatError as fault:
            raise overwritten(path, fault) from None
        if weight is not None:
            packed[path] = weight
    packed |= packed_experts(model)
    if not packed:
        raise ExportError(
            where=type(model).__name__,
            expected="at least one linear packed to NVFP4",
            got="none",
            do="Transform it with a recipe that has quantize rules, or use save_pretrained.",
        )
    return packed


def _input_scales(model: nn.Module, packed: Collection[str]) -> dict[str, Scalar]:
    scales: dict[str, Scalar] = {}
    modules = dict(model.named_modules())
    for path in packed:
        module = modules.get(path)
        if module is None:  # an expert
            continue
        for direction, leaf in INPUT_SCALES.items():
            value = leaf_tensor(module, leaf)
            if value is not None:
                scales[path] = _scalar(f"{path}.{leaf}", value.detach().reshape(1), direction)
    missing = [path for path in packed if path not in scales]
    if missing:
        raise ExportError(
            where=missing[0],
            expected="a calibrated input scale on every packed linear, for activations in 4 bits",
            got=f"none on {len(missing)} of {len(packed)}",
            do="Calibrate it (qerl-compile transform --calibrate-on), or export with 16-bit activations.",
        )
    return scales


def _kv_scales(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    scales: dict[str, tuple[Tensor, Tensor]] = {}
    missing: list[str] = []
    for path, module in model.named_modules():
        values = [leaf_tensor(module, leaf) for leaf in CACHE_SCALES]
        if any(value is not None for value in values):
            k_scale, v_scale = (
                _scalar(f"{path}.{leaf}", torch.zeros(1) if value is None else value.detach().reshape(1), "multiplier")
                for leaf, value in zip(CACHE_SCALES, values, strict=True)
            )
            scales[path] = (k_scale.value, v_scale.value)
        elif {"k_proj", "v_proj"} <= {name for name, _ in module.named_children()}:
            missing.append(path)
    if missing or not scales:
        raise ExportError(
            where=missing[0] if missing else type(model).__name__,
            expected="calibrated k_scale and v_scale on every attention module, for a KV cache in 8 bits",
            got=f"none on {len(missing)} of {len(missing) + len(scales)}",
            do="Calibrate it (qerl-compile transform --calibrate-on), or export with the cache in 16 bits.",
        )
    return scales


def _scalar(where: str, value: Tensor, direction: Direction) -> Scalar:
    number = value.item()
    reciprocal = value.reciprocal().item()
    if value.dtype != torch.float32 or not (0 < number < float("inf") and 0 < reciprocal < float("inf")):
        raise ExportError(
            where=where,
            expected="a positive float32 whose reciprocal is finite, since the two formats store one or the other",
            got=f"{number!r} ({str(value.dtype).removeprefix('torch.')})",
            do="Load or calibrate the model again; this scale was overwritten.",
        )
    return Scalar(value, direction)


def _dense(model: nn.Module, packed: Collection[str], *, norms_in_base: bool) -> dict[str, Tensor]:
    norms = trained_norms_of(model)
    served: dict[str, Tensor] = {f"{path}.weight": norms[path] for path in norms} if norms_in_base else {}
    left_out = {f"{path}.{factor}" for path in adapters_of(model) for factor in ("lora_A", "lora_B")}
    left_out |= {f"{path}.{TRAINED_NORM}" for path in norms}
    # `weight` too: a linear whose dense weight is trained is packed for the export and has both
    leaves = ("weight", "weight_packed", "weight_scale", *GLOBAL_SCALES.values(), *INPUT_SCALES.values())
    left_out |= {f"{path}.{leaf}" for path in packed for leaf in leaves}
    left_out |= {f"{path}.{leaf}" for path, _ in model.named_modules() for leaf in CACHE_SCALES}
    left_out |= names_of_stacks(model)
    experts = dense_experts(model)
    tied = _is_tied(model)
    dense: dict[str, Tensor] = {}
    seen: set[int] = set()
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name in left_out or (tied and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        views = {f"{path}.weight": view for path, view in experts.get(name, {}).items()}
        for each, value in (views or {name: served.get(name, tensor).detach()}).items():
            dense[each] = value
            _check_finite(each, value)
    return dense


def _check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN, Inf, and numbers that become Inf in bfloat16; the extremes tell, and cost no temporary."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if not all(bool(extreme.to(DENSE_DTYPE).isfinite()) for extreme in torch.aminmax(tensor)):
        do = "Load the model again; this tensor has been overwritten or its checkpoint is damaged."
        raise ExportError(where=name, expected="finite numbers", got="NaN or Inf", do=do)


def _is_tied(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return config is not None and bool(config.get_text_config().tie_word_embeddings)


def _check_choice(where: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        expected = " or ".join(repr(each) for each in known)
        raise ExportError(where=where, expected=f"{expected} (bits)", got=repr(got), do="Choose one of these.")
