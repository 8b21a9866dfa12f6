import json
import shlex

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.conftest import refusal, succeed

IDS = torch.tensor([[5, 60, 61, 100, 7, 30]])


def last_line(text):
    return text.splitlines()[-1].removeprefix("next  ")


def test_a_runs_adapter_loads_with_peft_on_the_base(run, world, tmp_path):
    from peft import PeftModel

    out = tmp_path / "adapter"
    text = succeed("export", run.path, "--target", "peft", "-o", out)
    assert f"wrote {out}  PEFT adapter" in text
    want = f"vllm serve {world}/base --enable-lora --max-lora-rank 32 --lora-modules trained={out}"
    assert last_line(text) == want
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    before = base(input_ids=IDS).logits
    model = PeftModel.from_pretrained(base, out)
    assert (model(input_ids=IDS).logits - before).abs().max() > 0.1
    written, trained = (load_file(path / "adapter_model.safetensors") for path in (out, run.path / "adapter"))
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], trained[name]) for name in trained)
    assert (out / "tokenizer.json").is_file()


def test_a_runs_packed_base_equals_that_of_transform(run, packed, tmp_path):
    out = tmp_path / "served"
    text = succeed("export", run.path, "--target", "sglang", "-o", out)
    assert last_line(text) == (
        f"python -m sglang.launch_server --model-path {out} --lora-paths trained={run.path}/adapter"
    )
    exported, transformed = (load_file(path / "model.safetensors") for path in (out, packed.path))
    assert exported.keys() == transformed.keys()
    for name, tensor in transformed.items():
        assert torch.equal(exported[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_packed_directory_is_exported_as_it_is(packed, tmp_path):
    out = tmp_path / "with space"
    text = succeed("export", packed.path, "--target", "vllm", "-o", out)
    assert shlex.split(last_line(text)) == ["vllm", "serve", str(out)]
    assert (out / "model.safetensors").read_bytes() == (packed.path / "model.safetensors").read_bytes()


def test_exports_that_cannot_be_are_refused_and_leave_nothing(world, packed, run, tmp_path):
    out = tmp_path / "out"
    assert "expected at least one linear packed" in refusal("export", world / "base", "--target", "vllm", "-o", out)
    assert "expected modules with lora_A" in refusal("export", packed.path, "--target", "peft", "-o", out)
    assert "got 'vlm'" in refusal("export", tmp_path / "no-such-model", "--target", "vlm", "-o", out)
    assert "got an existing one" in refusal("export", tmp_path / "none", "--target", "vllm", "-o", run.path)
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_the_target_does_not_have_is_refused_before_the_model_is_looked_for(tmp_path):
    out = tmp_path / "out"
    missing = tmp_path / "no-such-model"
    assert "got format" in refusal("export", missing, "--target", "peft", "--format", "modelopt", "-o", out)
    assert "got neither" in refusal("export", missing, "--target", "vllm", "--keep-failing", "-o", out)
    budget = ("--verify", "--budget", "sqnr=1")
    assert "merge_kl" in refusal("export", missing, "--target", "vllm", *budget, "-o", out)
    assert "got onnx" in refusal("export", missing, "--target", "onnx", "--verify", "-o", out)
    assert "got 'both'" in refusal("export", missing, "--target", "vllm", "--merge", "both", "-o", out)
    assert "got '5'" in refusal("export", missing, "--target", "vllm", "--activations", "5", "-o", out)
    assert "got base" in refusal("export", missing, "--target", "peft", "--verify", "--base", "x", "-o", out)


def test_a_packed_base_is_exported_for_tensorrt_llm_and_measured_on_the_way(packed, world, tmp_path):
    out, text = tmp_path / "trt", tmp_path / "text.txt"
    text.write_text("One and one is two, and two and two is four. " * 4)
    wide = ("--budget", "perplexity_increase=1e9", "--budget", "sqnr_db=0")  # of a random model
    said = succeed(
        *("export", packed.path, "--target", "tensorrt-llm", "--verify", "--text", text, "--base", world / "base"),
        *(*wide, "-o", out),
    )
    assert "Schema of tensorrt-llm" in said
    assert last_line(said) == f"trtllm-serve {out}"
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert "Quality" in (out / "README.md").read_text()


def test_a_merge_over_its_budget_is_refused_with_the_number_and_leaves_only_its_page(run, tmp_path):
    out = tmp_path / "merged"
    said = refusal("export", run.path, "--target", "vllm", "--merge", "nvfp4", "--budget", "merge_kl=0", "-o", out)
    assert "KL to the model with its adapter" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.quality.html"]


def test_a_merged_run_is_a_dense_model_that_computes_what_was_trained(run, tmp_path):
    out = tmp_path / "dense"
    wide = [word for name in ("merge_kl=9", "effect_kept=0", "sqnr_db=0") for word in ("--budget", name)]
    said = succeed("export", run.path, "--target", "vllm", "--merge", "dequantized", *wide, "-o", out)
    assert "bf16 weights with the adapter merged (dequantized)" in said
    names = load_file(out / "model.safetensors")
    assert not [name for name in names if "weight_packed" in name or "lora" in name]
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(out)(input_ids=IDS).logits).all()
