"""What the CPU tests show in depth, once on a GPU: calibrating, training full weights, exporting, opening, adapting."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import qerl_compile
from qerl_compile.calibrating import calibrate
from qerl_compile.passes.quantize import packed_of
from qerl_compile.trained_weights import trained_packed
from qerl_compile.transforming import transform
from tests.models import tiny_model
from tests.tokenizer import byte_tokenizer

LINEARS = r".*layers\.\d+\..*_proj"
TEXTS = [
    f"{a} and {b} make {a + b}; take {b} away and {a} is left." for a, b in itertools.product(range(12), range(12))
]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()


def tiny(family="llama", dtype=torch.bfloat16):
    return tiny_model(family, dtype=dtype, vocab_size=259, bos_token_id=None, pad_token_id=None)


def losses(model, steps=6, rate=3e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    seen = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("scales", ["mse", "four_over_six"])
@pytest.mark.parametrize(("rounding", "channel_scaling"), [("nearest", "none"), ("gptq", "none"), ("gptq", "awq")])
def test_calibration_gives_what_it_gives_on_a_cpu(scales, rounding, channel_scaling):
    measured = {"samples": 8, "tokens": 32, "channel_scaling": channel_scaling, "activations": True, "kv_cache": "fp8"}
    rules = {
        "quantize": [{"match": LINEARS, "scales": scales, "rounding": rounding}],
        "sparsify": [{"match": r".*o_proj", "score": "wanda"}],
        "calibration": measured,
    }
    base = tiny("gemma3", torch.float32)
    ours, theirs = (
        calibrate(copy.deepcopy(base).to(device), rules, TEXTS, tokenizer=byte_tokenizer(), inner="eager")
        for device in ("cuda", "cpu")
    )
    with torch.no_grad():
        logits = ours(input_ids=IDS).logits
        assert torch.isfinite(logits).all()
        # sums are rounded otherwise, so a weight on the border of two codes may take the other
        difference = (logits.cpu() - theirs(input_ids=IDS.cpu()).logits).norm() / logits.cpu().norm()
    assert difference < 0.1
    for path in ours.qerl.plan.quantize:
        mine, cpus = packed_of(ours.get_submodule(path)), packed_of(theirs.get_submodule(path))
        assert (mine.codes_NK2.cpu() == cpus.codes_NK2).float().mean() > 0.9
        scale, other = (model.get_submodule(path).get_buffer("input_global_scale").cpu() for model in (ours, theirs))
        torch.testing.assert_close(scale, other, rtol=1e-2, atol=0)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_full_weights_train_and_export_to_what_was_trained(inner, tmp_path):
    rules = {"quantize": [{"match": LINEARS, "weights": "trained"}], "sparsify": [{"match": r".*down_proj"}]}
    model = transform(tiny(dtype=torch.float32).cuda(), rules, inner=inner)
    seen = losses(model)
    assert seen[-1] < seen[0] - 0.1
    qerl_compile.export(model, tmp_path / "served", target="vllm")
    opened = qerl_compile.load(tmp_path / "served", device="cuda", dtype=torch.float32, inner=inner)
    for group in trained_packed(model, model.qerl.plan):
        for path, want in group.items():
            assert torch.equal(packed_of(opened.get_submodule(path)).codes_NK2, want.codes_NK2)
    with torch.no_grad():
        torch.testing.assert_close(
            opened(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=2e-2, atol=2e-2
        )  # the dense rest was rounded to bf16


@pytest.mark.parametrize("target", ["transformers", "tensorrt-llm", "vllm"])
def test_an_export_is_opened_on_the_gpu_and_its_adapter_learns(target, tmp_path):
    model = transform(tiny().cuda(), {"quantize": [{"match": LINEARS}]}, inner="eager")
    out = tmp_path / "out"
    qerl_compile.export(model, out, target=target)
    opened = qerl_compile.load(out, "nvfp4-lora", device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=2e-2, atol=2e-2)
    seen = losses(opened)
    assert seen[-1] < seen[0] - 0.05


def test_transformers_opens_our_directory_on_the_gpu(tmp_path):
    out = tmp_path / "out"
    qerl_compile.export(
        transform(tiny().cuda(), {"quantize": [{"match": LINEARS}]}, inner="eager"), out, target="transformers"
    )
    config = qerl_compile.QerlNVFP4HfConfig("nvfp4-lora", inner="eager")
    opened = AutoModelForCausalLM.from_pretrained(out, device_map="cuda:0", quantization_config=config)
    assert {tensor.device.type for tensor in opened.state_dict().values()} == {"cuda"}
    seen = losses(opened)
    assert seen[-1] < seen[0] - 0.05
