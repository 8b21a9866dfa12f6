"""Verification: comparisons beside hand calculation, real round trips, damaged exports, cards and pages."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qerl_compile.adapter_files import adapters_of
from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.exporters import export
from qerl_compile.exporters.sqnr import sqnr_db
from qerl_compile.exporters.verify import Budgets, OverBudgetError, Verification, export_verified, verify
from qerl_compile.exporters.verify.card_section import quality_section
from qerl_compile.exporters.verify.layers import LayerQuality, same_bits
from qerl_compile.exporters.verify.logits import Comparison, compare, effect_kept
from qerl_compile.exporters.verify.page import render
from qerl_compile.formats.nvfp4 import PackedNVFP4, quantize
from qerl_compile.loading import load
from tests.models import tiny_model
from tests.tokenizer import byte_tokenizer

RECIPE = {
    "quantize": [{"match": ".*_proj"}],
    "lora": [{"match": ".*(o|down)_proj", "rank": 4, "alpha": 8.0}],
}
TEXTS = ["Bread is one of the oldest things that people make."]


class Fixed(nn.Module):
    """A model that answers with given logits."""

    def __init__(self, logits_TV: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.logits_TV = logits_TV

    def forward(self, **_):
        return SimpleNamespace(logits=self.logits_TV[None])


P_TV = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
Q_TV = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
IDS_T = torch.tensor([0, 1])


def test_a_comparison_by_hand():
    found = compare([P_TV], Fixed(Q_TV + 7), [IDS_T])  # a constant on all logits changes no prediction
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.tokens == 2
    assert found.kl == pytest.approx(kl / 2, rel=1e-5)
    assert found.kl_worst == pytest.approx(kl, rel=1e-5)
    assert found.top1 == 0.5
    assert found.logit_error == pytest.approx(7 + math.log(2), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(4.0)
    assert found.perplexity == pytest.approx(2.0)
    assert found.perplexity_increase == pytest.approx(-0.5)


def test_equal_logits_differ_by_exactly_nothing():
    found = compare([P_TV], Fixed(P_TV), [IDS_T])
    assert (found.kl, found.kl_worst, found.logit_error, found.top1) == (0.0, 0.0, 0.0, 1.0)


def test_nan_and_infinite_surprise_are_told_and_fail_every_budget():
    broken = compare([P_TV], Fixed(torch.full((2, 3), math.nan)), [IDS_T])
    assert math.isnan(broken.kl)
    assert math.isnan(broken.perplexity)
    sure = compare([P_TV], Fixed(torch.tensor([[0.0, -1e6, 0.0], [0.0, 0.0, 0.0]])), [IDS_T])
    assert sure.perplexity == math.inf
    for found in (broken, sure):
        assert [check.passed for check in verification(to_base=found).checks() if "base → export" in check.what] == [
            False
        ]
    assert [
        check.passed for check in verification(to_model=broken).checks() if check.what.startswith("KL to the model")
    ] == [False]


def test_the_effect_kept_is_one_for_the_adapted_model_zero_for_the_plain_one_and_a_half_between():
    generator = torch.Generator().manual_seed(0)
    off_TV = torch.randn(6, 9, generator=generator).log_softmax(-1)
    step_TV = torch.randn(6, 9, generator=generator) * 1e-3
    on_TV, ids_T = off_TV + step_TV, torch.arange(6)
    for share in (0.0, 0.5, 1.0):
        found = effect_kept([on_TV], [off_TV], [off_TV], Fixed(off_TV + share * step_TV), [ids_T])
        assert found == pytest.approx(share, abs=2e-3)
    moved_TV = torch.randn(6, 9, generator=generator)  # another base, as the bf16 master is
    assert effect_kept([on_TV], [off_TV], [moved_TV], Fixed(moved_TV + step_TV), [ids_T]) == pytest.approx(1, abs=2e-3)


def test_an_adapter_without_effect_cannot_be_kept():
    assert math.isnan(effect_kept([P_TV], [P_TV], [P_TV], Fixed(P_TV), [IDS_T]))


def test_decibels_of_an_error():
    w_NK = torch.ones(4, 4)
    assert sqnr_db(w_NK, w_NK) == math.inf
    assert sqnr_db(w_NK, w_NK * 0.9) == pytest.approx(20.0, abs=1e-3)
    assert sqnr_db(w_NK, w_NK * 2) == pytest.approx(0.0, abs=1e-3)
    assert math.isnan(sqnr_db(w_NK, w_NK * math.nan))


def test_bits_are_compared_across_both_dialects_of_the_matrix_scale():
    packed = quantize(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    codes, block, scale = packed.codes_NK2, packed.block_decode_scale_NG, packed.global_scale
    assert same_bits(packed, PackedNVFP4(codes.clone(), block.clone(), scale.clone(), "divisor"))
    assert same_bits(packed, PackedNVFP4(codes, block, scale.reciprocal(), "multiplier"))
    assert not same_bits(packed, PackedNVFP4(codes, block, scale, "multiplier"))
    assert not same_bits(packed, PackedNVFP4(codes, block, scale.nextafter(scale * 2), "divisor"))
    assert not same_bits(packed, PackedNVFP4(codes ^ 1, block, scale, "divisor"))
    other = block.clone()
    other.view(torch.uint8)[0, 0] ^= 1
    assert not same_bits(packed, PackedNVFP4(codes, other, scale, "divisor"))


COMPARISON = Comparison(9, 1e-6, 1e-5, 0.1, 1.0, 10.0, 10.1)
LAYERS = (LayerQuality("a.q_proj", 20.3, True), LayerQuality("a.o_proj", 19.0, True))


def verification(**changes) -> Verification:
    given = {
        "target": "vllm",
        "merge": "",
        "schema_problems": (),
        "layers": LAYERS,
        "sqnr_against": "the base's bf16 weight",
        "to_model": COMPARISON,
        "effect_kept": None,
        "to_base": COMPARISON,
        "base_note": "",
        "text": "9 tokens of a text",
        "budgets": Budgets(),
    }
    return Verification(**{**given, **changes})


def far(**changes) -> Comparison:
    return Comparison(**{**vars(COMPARISON), **changes})


def test_what_is_within_all_budgets_passes():
    assert verification().passed
    verification().refuse("out")
    assert verification(to_base=None, base_note="not there").passed


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"schema_problems": ("config: no",)}, "Schema of vllm: no problem; got config: no"),
        ({"layers": (*LAYERS, LayerQuality("a.k", 20.0, False))}, "equal; got 1 of 3 differ: 'a.k'"),
        ({"layers": (*LAYERS, LayerQuality("a.k", 2.0, True))}, "≥ 14 dB; got 2.0 dB (a.k)"),
        ({"layers": (*LAYERS, LayerQuality("a.k", math.nan, True))}, "≥ 14 dB; got nan dB (a.k)"),
        ({"to_model": far(kl=0.01)}, "KL to the model in memory: ≤ 0.001; got 1.00e-02 nats per token"),
        ({"to_base": far(perplexity=20.0)}, "Perplexity, bf16 base → export: ≤ +25%; got 10.000 → 20.000 (+100.0%)"),
        ({"merge": "nvfp4", "to_model": far(kl=0.1)}, "KL to the model with its adapter: ≤ 0.05; got 1.00e-01 nats"),
        ({"merge": "nvfp4", "effect_kept": 0.2}, "effect on predictions that is kept: ≥ 50%; got 20%"),
        (
            {"merge": "nvfp4", "effect_kept": math.nan},
            "effect on predictions that is kept: ≥ 50%; got none: the adapter does nothing",
        ),
    ],
)
def test_one_value_over_its_budget_is_refused_by_name(changes, failed):
    found = verification(**changes)
    assert not found.passed
    with pytest.raises(OverBudgetError, match=re.escape(failed)) as caught:
        found.refuse("out")
    assert caught.value.verification is found


def test_a_merge_may_have_another_perplexity_than_the_base():
    assert verification(merge="dequantized", to_base=far(perplexity=20.0)).passed


def test_a_budget_that_is_raised_is_the_override():
    loose = Budgets(merge_kl=0.2)
    assert verification(merge="nvfp4", to_model=far(kl=0.1), budgets=loose).passed


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_budget_that_is_no_limit_is_refused(value):
    with pytest.raises(ExportError, match=r"budgets\.merge_kl: expected a number of at least 0"):
        Budgets(merge_kl=value)


def test_the_card_and_the_page_show_every_check_and_mark_what_failed():
    hostile = verification(schema_problems=("a|b <script>\x1b[2J",), layers=(*LAYERS, LayerQuality("<b>", 2.0, False)))
    section = quality_section(hostile, page="quality.html")
    assert section.startswith("## Quality: **over budget**")
    assert "a\\|b" in section
    assert section.count("**FAILED**") == 3
    page = render(hostile, "Quality of out")
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count('class="failed"') >= 3
    assert "&lt;b&gt;" in page
    for check in hostile.checks():
        assert f"| {check.what} |" in section
    good = render(verification(), "Quality of out")
    assert "Within all budgets." in good
    assert 'class="failed"' not in good
    assert "data:image/svg+xml;base64," in good
    assert good == render(verification(), "Quality of out")


def test_a_page_without_matplotlib_has_its_tables(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render(verification(), "Quality of out")
    assert "matplotlib is not installed" in page
    assert "a.o_proj" in page


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "tiny"
    tiny_model("llama", layers=1, dtype=torch.bfloat16, vocab_size=260).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(base):
    """A transformed model whose adapter is large enough for 4 bits to show it."""
    model = load(base, RECIPE, inner="eager", device="cpu")
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters_of(model).values():
        adapter.b_NR.data.normal_(0, 0.5, generator=generator)
    return model


@pytest.fixture
def options():
    return {"target": "vllm", "tokenizer": byte_tokenizer(), "texts": TEXTS, "window": 64}


def test_an_export_is_verified_and_its_quality_written_on_it(model, base, options, tmp_path):
    found = export_verified(model, tmp_path / "out", **options)
    assert found.passed
    assert found.schema_problems == ()
    assert found.to_model.logit_error == 0.0
    assert found.to_base.kl > 1e-6
    assert all(layer.same_bits for layer in found.layers)
    assert len(found.layers) == 7
    assert all(18 < layer.sqnr_db < 23 for layer in found.layers)
    card = (tmp_path / "out/README.md").read_text()
    assert "## Quality: within all budgets" in card
    assert card.index("## Quality") < card.index("## Files") < card.index("| quality.html |")
    assert f"{len(TEXTS[0])} tokens of the given texts" in card
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"quality.html", "model.safetensors", "config.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="does not exist yet"):
        export_verified(model, tmp_path / "out", **options)


def test_a_merge_is_verified_against_the_model_with_its_adapter(model, options, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = export_verified(model, tmp_path / "out", merge="nvfp4", **options)
    assert found.to_model.kl < found.to_base.kl
    assert 0.8 < found.effect_kept < 1.2
    assert "A LoRA adapter was merged into these weights (`nvfp4`)" in (tmp_path / "out/README.md").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_over_budget_is_not_published_but_its_page_is(model, options, tmp_path):
    limits = Budgets(merge_kl=0.0)
    with pytest.raises(OverBudgetError, match="KL to the model with its adapter: ≤ 0; got"):
        export_verified(model, tmp_path / "out", merge="dequantized", budgets=limits, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.quality.html"]
    assert "Over budget." in (tmp_path / "out.quality.html").read_text()


def test_the_page_of_an_attempt_that_failed_overwrites_nothing(model, options, tmp_path):
    (tmp_path / "out.quality.html").write_text("an earlier page")
    (tmp_path / "out.quality.2.html").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OverBudgetError):
        export_verified(model, tmp_path / "out", merge="dequantized", budgets=Budgets(merge_kl=0.0), **options)
    assert (tmp_path / "out.quality.html").read_text() == "an earlier page"
    assert not (tmp_path / "elsewhere").exists()
    assert "Over budget." in (tmp_path / "out.quality.3.html").read_text()


def damaged(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.0."


def test_damage_is_found_by_bits_and_by_decibels(model, options, tmp_path):
    def change(tensors):
        codes = tensors[LAYER + "self_attn.o_proj.weight_packed"]
        tensors[LAYER + "self_attn.o_proj.weight_packed"] = (codes >> 4) | (codes << 4)  # nibbles the other way round
        tensors[LAYER + "mlp.down_proj.weight_global_scale"] *= 0.5

    export(model, tmp_path / "out", target="vllm")
    damaged(tmp_path / "out", change)
    found = verify(tmp_path / "out", model, **options)
    bad = [layer for layer in found.layers if not layer.same_bits]
    assert [layer.path for layer in bad] == [LAYER + "self_attn.o_proj", LAYER + "mlp.down_proj"]
    assert all(layer.sqnr_db < 6 for layer in bad)
    failed = [check.what for check in found.checks() if check.passed is False]
    assert "Codes and scales against the model's" in failed
    assert any(what.startswith("Lowest SQNR") for what in failed)
    assert any(what.startswith("KL to the model") for what in failed)


def test_an_adapter_is_verified_by_its_tensors(model, options, tmp_path):
    found = export_verified(model, tmp_path / "adapter", **{**options, "target": "peft", "texts": None})
    assert found.passed
    assert "## Quality: within all budgets" in (tmp_path / "adapter/README.md").read_text()
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * 2}, file)
    found = verify(tmp_path / "adapter", model, **{**options, "target": "peft"})
    assert found.unequal_factors == (first,)
    assert not found.passed
    file.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: expected a readable file"):
        verify(tmp_path / "adapter", model, **{**options, "target": "peft"})


def test_a_base_that_is_gone_is_noted_and_one_that_was_named_is_refused(model, base, options, tmp_path):
    export(model, tmp_path / "out", target="vllm")
    recorded, model.qerl.base_name = model.qerl.base_name, str(tmp_path / "gone")
    try:
        found = verify(tmp_path / "out", model, **options)
        with pytest.raises(CheckpointError, match="no directory of that name"):
            verify(tmp_path / "out", model, base=tmp_path / "gone", **options)
    finally:
        model.qerl.base_name = recorded
    assert found.passed
    assert found.to_base is None
    assert all(layer.sqnr_db == math.inf for layer in found.layers)
    assert next(check.value for check in found.checks() if check.what == "Against the bf16 base").startswith(
        "not measured"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "nowhere"}, "expected one of"),
        ({"merge": "both"}, "merge: expected one of dequantized, bf16-master, nvfp4; got 'both'"),
        ({"merge": "nvfp4", "target": "peft"}, "target peft, which is the adapter alone"),
        ({"merge": "dequantized", "activations": "16"}, "got options activations"),
        ({"target": "peft"}, "got texts"),
        ({"target": "peft", "texts": None, "budgets": Budgets()}, "got budgets"),
        ({"activations": "8"}, "activations: expected '16' or '4'; got '8'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(changes, message, model, options, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_verified(model, tmp_path / "out", **{**options, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"base": "gone"}, {"texts": [""]}])
def test_a_base_or_a_text_of_no_use_is_refused_before_the_export_starts(changes, model, options, tmp_path, monkeypatch):
    def started(*_, **__):
        raise AssertionError("the export started")

    monkeypatch.setattr("qerl_compile.exporters.verify.publish.export", started)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        export_verified(model, tmp_path / "out", **{**options, **changes})


def test_a_page_is_one_file_without_scripts():
    page = render(verification(), "Quality of out")
    assert json.dumps(page)
    assert "http://" not in page
    assert "https://" not in page
