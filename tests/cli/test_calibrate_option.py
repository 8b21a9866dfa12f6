"""`transform --calibrate-on`: text from a file or a task, and scales that reach the checkpoint."""

import itertools
import json
import shlex

from safetensors.torch import load_file

import qerl_compile
from qerl_compile.recipe import Recipe
from tests.cli.conftest import refusal, succeed

SMALL = ("--set", "calibration={samples: 4, tokens: 16, activations: true, kv_cache: fp8}")


def test_scales_measured_on_a_task_are_in_the_checkpoint(world, tmp_path):
    task = f"{world}/sums.jsonl:held_out=0.3"
    text = succeed("transform", world / "base", "--calibrate-on", task, *SMALL, "-o", tmp_path / "out")
    first, _, wrote, _ = text.splitlines()
    assert first.startswith("calibrated on 64 tokens: squared error of a layer's output ")
    assert wrote == f"wrote {tmp_path / 'out'}  NVFP4 checkpoint"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    attention = "model.layers.0.self_attn"
    assert tensors[f"{attention}.k_scale"].item() > 0
    scales = [tensors[f"{attention}.{name}_proj.input_global_scale"].item() for name in "qkv"]
    assert scales[0] > 0
    assert len(set(scales)) == 1
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["kv_cache_scheme"]["num_bits"] == 8
    again = qerl_compile.load(tmp_path / "out", inner="eager", device="cpu")
    assert again.get_submodule(f"{attention}.q_proj").input_global_scale.item() == scales[0]


def test_a_text_file_serves_too_and_a_short_one_is_refused(world, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    words = ("--set", "quantize=[{match: '.*_proj', rounding: gptq}]", "-o", tmp_path / "out")
    line = refusal("transform", world / "base", *words)
    assert "--calibrate-on FILE" in line
    line = refusal("transform", world / "base", "--calibrate-on", tmp_path / "short.txt", *words)
    assert "calibration texts: expected at least 512 tokens, to fill one sample; got 10" in line
    assert not (tmp_path / "out").exists()


def test_the_next_command_is_one_that_takes_the_packed_checkpoint(world, tmp_path):
    """What a checkpoint has met already (2:4) or can no longer meet (trained weights) would be refused on it."""
    rules = ("--set", "quantize=[{match: '.*_proj'}]", "--set", "sparsify=[{match: '.*_proj'}]")
    text = succeed("transform", world / "base", *rules, "-o", tmp_path / "sparse")
    words = shlex.split(text.splitlines()[-1])
    next_rules = Recipe().with_overrides(after for word, after in itertools.pairwise(words) if word == "--set")
    model = qerl_compile.load(tmp_path / "sparse", next_rules, inner="eager", device="cpu")
    assert model.qerl.plan.quantize
    trained = ("--recipe", "bf16-lora", "--set", "lora=[]", "--set", "quantize=[{match: '.*_proj', weights: trained}]")
    text = succeed("transform", world / "base", *trained, "-o", tmp_path / "trained")
    assert "trained}" not in text.splitlines()[-1]
    assert "2 fused groups" in text


def test_text_that_no_rule_reads_is_refused(world, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 4000)
    words = ("--calibrate-on", tmp_path / "text.txt", "-o", tmp_path / "out")
    line = refusal("transform", world / "base", *words)
    assert "--calibrate-on: expected a rule that reads text" in line
    assert not (tmp_path / "out").exists()
