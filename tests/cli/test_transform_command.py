import json

from tests.cli.conftest import next_command, refusal, succeed, tiny
from tests.models import tiny_mixture
from tests.tokenizer import byte_tokenizer


def test_transform_writes_a_packed_checkpoint_and_says_so(packed):
    first, wrote, _ = packed.text.splitlines()
    assert first == (
        "LlamaForCausalLM: 7 linears to NVFP4 in 1 layers, 2 fused groups; "
        "in training the recipe adds 7 adapters and 2 noisy norms"
    )
    assert wrote == f"wrote {packed.path}  NVFP4A16 checkpoint"
    names = {file.name for file in packed.path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    config = json.loads((packed.path / "config.json").read_text())
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"


def test_experts_are_counted_among_the_linears(tmp_path):
    tiny_mixture(num_hidden_layers=1, vocab_size=259).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    text = succeed("transform", tmp_path / "base", "-o", tmp_path / "out")
    assert text.startswith("Qwen3MoeForCausalLM: 16 linears (12 of experts) to NVFP4 in 1 layers")


def test_the_command_that_transform_names_trains_on_what_it_wrote(packed):
    words = next_command(packed.text)
    assert words[:3] == ["qerl-compile", "train", str(packed.path)]
    text = succeed(*words[1:], *tiny(train__steps=1, train__eval_every=0))
    out = packed.path.parent / "packed-run"
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert next_command(text)[1:3] == ["export", str(out)]


def test_overrides_are_carried_into_the_next_command(world, tmp_path):
    text = succeed("transform", world / "base", "--set", "lora=[]", "--set", "noise=null", "-o", tmp_path / "a b")
    words = next_command(text)
    assert words[words.index("--set") : words.index("--task")] == [
        *("--set", "lora=[]", "--set", "noise=null", "--set", "train.eval_size=64")
    ]
    assert words[-1] == f"{tmp_path}/a b-run"


def test_an_existing_output_is_refused_before_any_work_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    line = refusal("transform", tmp_path / "no-such-model", "-o", tmp_path / "out")
    assert "expected an output directory that does not exist yet; got an existing one" in line
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_recipe_that_packs_nothing_is_refused_before_loading(tmp_path):
    line = refusal("transform", tmp_path / "no-such-model", "--recipe", "bf16-lora", "-o", tmp_path / "out")
    assert "recipe bf16-lora: quantize: expected at least one rule" in line


def test_a_transform_that_fails_leaves_nothing_behind(world, tmp_path):
    rule = "quantize=[{match: '.*nothing_like_this'}]"
    refusal("transform", world / "base", "--set", rule, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
