"""`calibrate` from end to end on tiny models: bytes, scales, function, refusals."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

import qerl_compile
from qerl_compile.calibrating import calibrate
from qerl_compile.errors import CheckpointError, FormatError, ModelError, NotFiniteError, RecipeError, TaskError
from qerl_compile.formats.nvfp4 import dequantize, divisor_of, unpack
from qerl_compile.passes.quantize import packed_of
from tests.models import SOME_FAMILIES, tiny_model
from tests.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEXTS = [
    f"{a} and {b} make {a + b}; take {b} away and {a} is left." for a, b in itertools.product(range(12), range(12))
]
LINEARS = r".*layers\.\d+\..*_proj"


def recipe(*, scales="amax", rounding="nearest", match=LINEARS, sparsify=(), **calibration):
    return {
        "version": 1,
        "name": "calibrated",
        "quantize": [{"match": match, "scales": scales, "rounding": rounding}],
        "sparsify": list(sparsify),
        "calibration": {"samples": 8, "tokens": 32, **calibration},
    }


def tiny(family, **changes):
    return tiny_model(family, vocab_size=259, bos_token_id=None, pad_token_id=None, **changes)


def calibrated(model, rules, **options):
    return calibrate(copy.deepcopy(model), rules, TEXTS, tokenizer=TOKENIZER, inner="eager", **options)


def decoded(model):
    """A plain model with the values of a transformed one: packed linears decoded, everything else as it is."""
    plain = tiny_of(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    for path in model.qerl.plan.quantize:
        packed = packed_of(model.get_submodule(path))
        state[f"{path}.weight"] = dequantize(packed, torch.float32)
    plain.load_state_dict(state)
    return plain


def tiny_of(model):
    base = next(cls for cls in type(model).__mro__[1:] if cls.__module__.startswith("transformers.models"))
    return base(copy.deepcopy(model.config)).float().eval()


def test_without_anything_to_measure_the_bytes_are_those_of_transform():
    model = tiny("qwen2", layers=1)
    ours = calibrated(model, recipe())
    plain = qerl_compile.transform(copy.deepcopy(model), {**recipe(), "calibration": None}, inner="eager")
    assert set(ours.qerl.plan.quantize) == set(plain.qerl.plan.quantize)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("family", SOME_FAMILIES[1:])
def test_everything_at_once(family, tmp_path):
    """AWQ, GPTQ, searched scales, input and cache scales, from memory and layer by layer from a checkpoint."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    rules = recipe(scales="mse", rounding="gptq", channel_scaling="awq", activations=True, kv_cache="fp8")
    reports = []
    ours = calibrated(model, rules, listen=reports.append)
    streamed = calibrate(tmp_path, rules, TEXTS, tokenizer=TOKENIZER, inner="eager", device="cpu")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(streamed.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name

    assert [report.layer for report in reports] == list(ours.qerl.plan.layers)
    assert reports[0].tokens == 8 * 32
    assert all(0 < report.output_error < 0.05 for report in reports)
    assert any("norm" in path for report in reports for path in report.folded)

    ids = torch.tensor([TOKENIZER(TEXTS[5])["input_ids"]])
    plain = decoded(ours)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    check_measured_scales(ours, plain)


def check_measured_scales(ours, plain):
    """Input and cache scales are those of a plain run of the rounded model over the calibration tokens."""
    largest = {}

    def noting(path):
        def hook(_, args):
            largest[path] = max(largest.get(path, torch.zeros(())), args[0].abs().amax())

        return hook

    for path in ours.qerl.plan.quantize:
        plain.get_submodule(path).register_forward_pre_hook(noting(path))
    stream = torch.tensor([i for text in TEXTS for i in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]])
    cache = DynamicCache()
    with torch.no_grad():
        plain(stream[: 8 * 32].view(8, 32), past_key_values=cache)
    for path, amax in largest.items():
        torch.testing.assert_close(
            ours.get_submodule(path).input_global_scale, divisor_of(amax), rtol=1e-4, atol=0, msg=path
        )
    for layer, kept in zip(ours.model.layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.self_attn.k_scale, kept.keys.abs().amax().view(1) / 448, rtol=1e-4, atol=0)
        torch.testing.assert_close(layer.self_attn.v_scale, kept.values.abs().amax().view(1) / 448, rtol=1e-4, atol=0)


def test_gptq_comes_nearer_than_nearest_rounding_and_masks_stay():
    model = tiny("llama", layers=1, dtype=torch.bfloat16)
    reports = []
    rules = recipe(rounding="gptq", sparsify=[{"match": r".*mlp\..*", "score": "wanda"}])
    sparse = calibrated(model, rules, listen=reports.append)
    calibrated(model, {**rules, "quantize": [{"match": LINEARS}]}, listen=reports.append)
    assert reports[0].output_error < 0.6 * reports[1].output_error
    for path in sparse.qerl.plan.quantize:
        codes = unpack(packed_of(sparse.get_submodule(path)).codes_NK2) & 7
        nonzero = (codes != 0).view(codes.shape[0], -1, 4).sum(-1)
        assert (nonzero.max() <= 2) == ("mlp" in path)


def test_an_untied_head_is_rounded_on_what_reaches_it():
    model = tiny("llama", layers=1)
    ours = calibrated(model, recipe(match=r"lm_head|.*q_proj", rounding="gptq", activations=True))
    plain = calibrated(model, recipe(match=r"lm_head|.*q_proj"))
    ids = torch.tensor([TOKENIZER(TEXTS[0])["input_ids"]])
    wanted = model(ids).logits
    errors = [(m(ids).logits - wanted).square().sum() for m in (ours, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert ours.lm_head.input_global_scale.item() > 0


def test_a_calibrated_model_trains():
    rules = {**recipe(rounding="gptq"), "lora": [{"match": LINEARS, "rank": 4}], "noise": {}}
    model = calibrated(tiny("qwen3", layers=1), rules)
    ids = torch.tensor([TOKENIZER(TEXTS[3])["input_ids"]])
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(grads) == 7
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def test_what_cannot_be_calibrated_is_refused_before_any_work(tmp_path):
    model = tiny("llama", layers=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="a model in memory without a tokenizer"):
        calibrate(model, recipe(), TEXTS)
    with pytest.raises(ModelError, match="dtype= with a model in memory"):
        calibrate(model, recipe(), TEXTS, tokenizer=TOKENIZER, dtype=torch.bfloat16)
    with pytest.raises(TaskError, match="at least 32 tokens"):
        calibrate(model, recipe(), ["short"], tokenizer=TOKENIZER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RecipeError, match="calibrate"):
        qerl_compile.transform(model, recipe(rounding="gptq"))
    packed = qerl_compile.transform(model, {**recipe(), "calibration": None}, inner="eager")
    with pytest.raises(ModelError, match="transformed already"):
        calibrate(packed, recipe(), TEXTS, tokenizer=TOKENIZER)
    qerl_compile.export(packed, tmp_path / "packed", target="vllm")
    with pytest.raises(ModelError, match="a packed one, whose full weights are gone"):
        calibrate(tmp_path / "packed", recipe(), TEXTS, tokenizer=TOKENIZER)


def test_a_model_from_a_directory_comes_for_inference_and_code_files_can_be_allowed(tmp_path):
    tiny("llama", layers=1).save_pretrained(tmp_path)
    (tmp_path / "modeling_tiny.py").write_text("never run\n")
    options = {"tokenizer": TOKENIZER, "inner": "eager", "device": "cpu"}
    with pytest.raises(CheckpointError, match="modeling_tiny"):
        calibrate(tmp_path, recipe(), TEXTS, **options)
    model = calibrate(tmp_path, recipe(), TEXTS, trust_remote_code=True, **options)
    assert not any(module.training for module in model.modules())
    in_memory = calibrated(tiny("llama", layers=1).train(), recipe())
    assert in_memory.training


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_activations_that_overflow_are_an_error_that_names_the_layer(rounding):
    model = tiny("llama", layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(NotFiniteError, match=r"layers\.1.*expected finite inputs on the sample text"):
        calibrated(model, recipe(rounding=rounding))


def test_trained_weights_are_looked_at_before_any_work_and_their_inputs_are_not_measured():
    model = tiny("llama", layers=1)
    trained = {**recipe(kv_cache="fp8"), "quantize": [{"match": LINEARS, "weights": "trained"}]}
    with pytest.raises(RecipeError, match=r"calibration\.activations: expected packed weights"):
        calibrated(model, {**trained, "calibration": {"activations": True}})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2, 3] = torch.nan
    with pytest.raises(FormatError, match=r"up_proj: expected finite weights"):
        calibrated(model, trained)


def test_trained_weights_with_cache_scales_are_saved_without_them_and_exported_with_them(tmp_path):
    rules = {**recipe(kv_cache="fp8"), "quantize": [{"match": LINEARS, "weights": "trained"}]}
    model = calibrated(tiny("llama", layers=1), rules)
    model.save_pretrained(tmp_path / "dense")
    again = qerl_compile.load(tmp_path / "dense", inner="eager", device="cpu")
    assert set(model.state_dict()) - set(again.state_dict()) == {
        f"model.layers.0.self_attn.{leaf}" for leaf in ("k_scale", "v_scale")
    }
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    qerl_compile.export(model, tmp_path / "served", target="vllm", kv_cache="8")
    served = qerl_compile.load(tmp_path / "served", inner="eager", device="cpu")
    assert served.model.layers[0].self_attn.k_scale.item() == pytest.approx(
        model.model.layers[0].self_attn.k_scale.item(), rel=1e-2
    )
