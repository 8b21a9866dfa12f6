"""Every mistake of design/formats.md made on purpose in a valid file: each is found, and nothing else with it."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from qerl_compile.checkup import inspect_checkpoint
from qerl_compile.checkup.kinds import KINDS
from tests.checkup.making import DOWN, EXPORTS, K, Q, V, damaged, dense, valid

E4M3_NAN, E4M3_NEGATIVE_ONE = 0x7F, 0xB8


class Mistake(NamedTuple):
    """What is wrong, in which export, what finds it, and what else it entails."""

    code: str
    kind: str
    tensors: Callable[[dict[str, Any]], None] = lambda tensors: None
    section: Callable[[dict[str, Any]], None] = lambda section: None
    config: Callable[[dict[str, Any]], None] = lambda config: None
    entails: frozenset[str] = frozenset()


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


def remove(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: [values.pop(name) for name in names] and None


def set_bits(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(block: torch.Tensor) -> torch.Tensor:
        block.view(torch.uint8)[3, 1] = bits
        return block

    return function


def all_of(leaf: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update(
        {name: function(value).contiguous() for name, value in tensors.items() if name.endswith(leaf)}
    )


def weights(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section["config_groups"]["group_0"]["weights"].update(fields)


def make_dense(path: str, *leaves: str) -> Callable[[dict[str, Any]], None]:
    """The linear as a bf16 matrix in the place of its packed tensors."""

    def function(tensors: dict[str, Any]) -> None:
        rows, half = tensors[f"{path}.{leaves[0]}"].shape
        for leaf in leaves:
            del tensors[f"{path}.{leaf}"]
        tensors[f"{path}.weight"] = torch.zeros(rows, half * 2, dtype=torch.bfloat16)

    return function


CT = ("weight_packed", "weight_scale", "weight_global_scale")
MO = ("weight", "weight_scale", "weight_scale_2")
numeric_cast = all_of(".weight_scale", lambda block: block.view(torch.uint8))

MISTAKES = {
    # section 5: what each mistake does
    "unfused global scales": Mistake(
        "fused-scales-differ", "compressed", change(f"{K}.weight_global_scale", lambda x: x / 2)
    ),
    "unfused multipliers": Mistake("fused-scales-differ", "modelopt", change(f"{V}.weight_scale_2", lambda x: x * 2)),
    "reciprocal divisors": Mistake("scale-reciprocal", "compressed", all_of(".weight_global_scale", torch.reciprocal)),
    "one reciprocal divisor": Mistake(
        "scale-reciprocal", "qerl", change(f"{DOWN}.weight_global_scale", torch.reciprocal)
    ),
    "reciprocal multipliers": Mistake("scale-reciprocal", "modelopt", all_of(".weight_scale_2", torch.reciprocal)),
    "block scales as integers": Mistake("block-scale-integers", "compressed", numeric_cast),
    "block scales as integers, ModelOpt": Mistake("block-scale-integers", "modelopt", numeric_cast),
    "block scales as F32": Mistake("block-scale-wide", "compressed", all_of(".weight_scale", torch.Tensor.float)),
    "global scale in bf16": Mistake("scalar-form", "compressed", all_of("global_scale", torch.Tensor.bfloat16)),
    "global scale without dimension": Mistake(
        "scalar-form", "compressed", all_of("global_scale", torch.Tensor.squeeze)
    ),
    "no input scales": Mistake(
        "input-scale-missing",
        "compressed-w4a4",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("input_global_scale")] and None,
    ),
    "one input scale missing": Mistake("input-scale-missing", "compressed-w4a4", remove(f"{DOWN}.input_global_scale")),
    "one input scale missing, ModelOpt": Mistake("input-scale-missing", "modelopt-w4a4", remove(f"{DOWN}.input_scale")),
    "NaN block scale": Mistake("block-scale-nan", "compressed", change(f"{DOWN}.weight_scale", set_bits(E4M3_NAN))),
    "NaN block scale, ModelOpt": Mistake("block-scale-nan", "modelopt", change(f"{DOWN}.weight_scale", set_bits(0xFF))),
    "negative block scale": Mistake(
        "block-scale-negative", "compressed", change(f"{DOWN}.weight_scale", set_bits(E4M3_NEGATIVE_ONE))
    ),
    "strategy group": Mistake("scheme", "compressed", section=weights(strategy="group")),
    "only q_proj ignored": Mistake("partners-split", "compressed", make_dense(Q, *CT), lambda s: s["ignore"].append(Q)),
    "only q_proj excluded": Mistake(
        "partners-split",
        "modelopt",
        make_dense(Q, *MO),
        lambda s: s["ignore"].append(Q),
        entails=frozenset({"configs-disagree"}),
    ),
    "lm_head not ignored": Mistake("dense-not-ignored", "compressed", section=lambda s: s["ignore"].clear()),
    "no quantization_status": Mistake("status-missing", "compressed", section=remove("quantization_status")),
    "weights initialized": Mistake(
        "status-missing", "compressed", section=lambda s: s.update(quantization_status="initialized")
    ),
    "input scale without W4A4": Mistake(
        "input-scale-unexpected",
        "compressed",
        lambda tensors: tensors.update({f"{DOWN}.input_global_scale": torch.ones(1)}),
    ),
    # around: sections 1.2, 1.4 and 2.2
    "packed layer ignored": Mistake("ignored-but-packed", "compressed", section=lambda s: s["ignore"].append(DOWN)),
    "packed layer ignored by pattern": Mistake(
        "ignored-but-packed", "qerl", section=lambda s: s["ignore"].append(r"re:.*down_proj$")
    ),
    "packed layer excluded by wildcard": Mistake(
        "ignored-but-packed",
        "modelopt",
        section=lambda s: s["ignore"].append("*.1.mlp.*"),
        entails=frozenset({"configs-disagree"}),
    ),
    "dense layer not listed": Mistake("dense-not-ignored", "compressed", make_dense(DOWN, *CT)),
    "dense layer not excluded": Mistake("dense-not-ignored", "modelopt", make_dense(DOWN, *MO)),
    "a pattern that could run for minutes": Mistake(
        "pattern-not-run", "compressed", section=lambda s: s["ignore"].append("re:(a+)+$")
    ),
    "no quantization_config": Mistake(
        "config-missing", "compressed", config=remove("quantization_config"), entails=frozenset({"dense-not-ignored"})
    ),
    "an invented key": Mistake("config-invalid", "compressed", section=weights(flavour="sweet")),
    "eight bits": Mistake("scheme", "compressed", section=weights(num_bits=8)),
    "groups of 32": Mistake("scheme", "compressed", section=weights(group_size=32)),
    "another format": Mistake("scheme", "compressed", section=lambda s: s.update(format="pack-quantized")),
    "zero divisor": Mistake(
        "scalar-not-positive", "compressed", change(f"{DOWN}.weight_global_scale", torch.zeros_like)
    ),
    "negative divisor": Mistake("scalar-not-positive", "compressed", change(f"{DOWN}.weight_global_scale", torch.neg)),
    "infinite divisor": Mistake(
        "scalar-not-positive", "compressed", change(f"{DOWN}.weight_global_scale", lambda x: x / 0)
    ),
    "zero multiplier": Mistake("scalar-not-positive", "modelopt", change(f"{DOWN}.weight_scale_2", torch.zeros_like)),
    "NaN input scale": Mistake(
        "scalar-not-positive", "compressed-w4a4", change(f"{DOWN}.input_global_scale", lambda x: x * torch.nan)
    ),
    "input scales unequal": Mistake(
        "fused-input-scales-differ", "modelopt-w4a4", change(f"{K}.input_scale", lambda x: x * 2)
    ),
    "input scale implausible": Mistake(
        "input-scale-implausible", "compressed-w4a4", change(f"{DOWN}.input_global_scale", lambda x: x * 1e-8)
    ),
    "negative cache scale": Mistake(
        "scalar-not-positive", "compressed-w4a4", change("model.layers.0.self_attn.k_scale", torch.neg)
    ),
    "no cache scales": Mistake("kv-scale-missing", "modelopt-w4a4", remove(f"{K}.k_scale")),
    "cache scales not described": Mistake(
        "kv-scale-unexpected", "compressed-w4a4", section=lambda s: s.update(kv_cache_scheme=None)
    ),
    "no block scales": Mistake("tensor-missing", "compressed", remove(f"{DOWN}.weight_scale")),
    "no divisor": Mistake("tensor-missing", "compressed", remove(f"{DOWN}.weight_global_scale")),
    "no codes": Mistake("tensor-missing", "modelopt", remove(f"{DOWN}.weight")),
    "no norm": Mistake("tensor-missing", "compressed", remove("model.norm.weight")),
    "a tensor too many": Mistake(
        "tensor-unexpected", "compressed", lambda t: t.update({"model.extra.weight": torch.ones(2)})
    ),
    "transposed block scales": Mistake(
        "shape",
        "compressed",
        change(f"{DOWN}.weight_scale", lambda x: x.view(torch.uint8).T.contiguous().view(x.dtype)),
    ),
    "codes cut": Mistake("shape", "compressed", change(f"{DOWN}.weight_packed", lambda x: x[:-1])),
    "codes not packed": Mistake("shape", "compressed", change(f"{DOWN}.weight_packed", lambda x: torch.cat([x, x], 1))),
    "codes as int8": Mistake(
        "codes-dtype", "compressed", change(f"{DOWN}.weight_packed", lambda x: x.view(torch.int8))
    ),
    "codes as int32": Mistake("codes-dtype", "compressed", change(f"{DOWN}.weight_packed", torch.Tensor.int)),
    "divisor per row": Mistake("shape", "compressed", change(f"{DOWN}.weight_global_scale", lambda x: x.repeat(64))),
    "NaN in a norm": Mistake("not-finite", "compressed", change("model.norm.weight", lambda x: x * torch.nan)),
    "small block scales": Mistake(
        "marlin-flush",
        "compressed",
        change(
            f"{DOWN}.weight_scale",
            lambda x: x.view(torch.uint8).masked_fill(torch.rand(x.shape) < 0.2, 5).view(x.dtype),
        ),
    ),
    "AWQ": Mistake(
        "algorithm",
        "modelopt",
        section=lambda s: s.update(quant_algo="NVFP4_AWQ"),
        entails=frozenset({"configs-disagree"}),
    ),
    "two stories": Mistake("configs-disagree", "modelopt", section=lambda s: s.update(quant_algo="NVFP4")),
    "lm_head not excluded": Mistake(
        "head-not-excluded", "modelopt", section=lambda s: s["ignore"].clear(), entails=frozenset({"configs-disagree"})
    ),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_valid_export_has_no_fault_not_even_against_its_base(kind):
    report = inspect_checkpoint(valid(kind), against=dense())
    assert report.faults == ()
    assert {layer.kind for layer in report.layers} == {"packed", "dense"}
    assert all(layer.sqnr_db > 19 for layer in report.packed)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_found_and_nothing_else(name, tmp_path):
    mistake = MISTAKES[name]
    torch.manual_seed(0)
    report = inspect_checkpoint(damaged(mistake.kind, tmp_path / "bad", *mistake[2:5]))
    found = {fault.code for fault in report.faults}
    assert mistake.code in found
    assert found <= {mistake.code, *mistake.entails}
    assert report.fatal == any(KINDS[code].severity == "fatal" for code in found)
    json.dumps(report.to_dict(), allow_nan=False)


def test_swapped_nibbles_are_found_against_the_base_and_admitted_to_be_invisible_without(tmp_path):
    swap = all_of("weight_packed", lambda codes: (codes << 4) | (codes >> 4))
    bad = damaged("compressed", tmp_path / "bad", swap)
    alone = inspect_checkpoint(bad)
    assert alone.faults == ()
    assert any("--against" in note for note in alone.notes)
    report = inspect_checkpoint(bad, against=dense())
    assert {fault.code for fault in report.faults} == {"nibbles-swapped"}
    assert len(report.faults) == len(report.packed) == 14
    assert all(layer.sqnr_db < 0 for layer in report.packed)


def test_weights_of_another_model_are_told_from_its_rounding(tmp_path):
    bad = damaged("modelopt", tmp_path / "bad", change(f"{DOWN}.weight", lambda codes: codes.flip(0)))
    report = inspect_checkpoint(bad, against=dense())
    assert [(fault.code, fault.where) for fault in report.faults] == [("differs-from-base", DOWN)]


def test_coarse_weights_are_a_warning(tmp_path):
    half = change(f"{DOWN}.weight_global_scale", lambda scale: scale * 1.5)
    report = inspect_checkpoint(damaged("compressed", tmp_path / "bad", half), against=dense())
    assert [(fault.code, fault.severity) for fault in report.faults] == [("far-from-base", "warning")]
    assert not report.fatal


def test_a_matrix_of_zeros_as_ModelOpt_writes_it_is_found(tmp_path):
    """Its library writes a multiplier of 0 and NaN block scales, without an error."""

    def zero(tensors):
        tensors[f"{DOWN}.weight"] = torch.zeros_like(tensors[f"{DOWN}.weight"])
        tensors[f"{DOWN}.weight_scale"] = torch.full_like(tensors[f"{DOWN}.weight"][:, ::8], 0xFF).view(
            torch.float8_e4m3fn
        )
        tensors[f"{DOWN}.weight_scale_2"] = torch.tensor(0.0)

    report = inspect_checkpoint(damaged("modelopt", tmp_path / "bad", zero))
    assert {fault.code for fault in report.faults} == {"block-scale-nan", "scalar-not-positive"}


def test_every_kind_of_fault_has_a_mistake_that_shows_it():
    shown = {mistake.code for mistake in MISTAKES.values()}
    elsewhere = {"nibbles-swapped", "differs-from-base", "far-from-base", "scale-implausible", "second-config-missing"}
    assert shown | elsewhere == set(KINDS)
