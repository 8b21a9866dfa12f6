"""The NVFP4A16 export: transformers reloads it to the same logits, and what cannot be served is refused."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from torch import nn

from qerl_compile.errors import ExportError
from qerl_compile.exporters import export
from qerl_compile.exporters.compressed_tensors import export_compressed_tensors
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize, quantize
from qerl_compile.transforming import transform
from tests.models import tiny_model


def reload(directory):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    return model.eval(), info


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("shard_size_bytes", [5e9, 20_000])
def test_transformers_reloads_the_export_to_the_logits_of_the_decoded_weights(
    family, tied, shard_size_bytes, state, input_ids_BT, tmp_path
):
    model = state.tiny_model(family, tied=tied)
    dense = state.pack(model)
    export_compressed_tensors(model, tmp_path / "out", shard_size_bytes=shard_size_bytes)
    loaded, info = reload(tmp_path / "out")
    assert {key: list(value) for key, value in info.items()} == {key: [] for key in info}
    with torch.no_grad():
        theirs, ours = loaded(input_ids=input_ids_BT).logits, dense(input_ids=input_ids_BT).logits
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dense_rest_is_bfloat16_so_that_a_model_of_any_dtype_reloads(dtype, state, input_ids_BT, tmp_path):
    model = state.tiny_model("qwen2", dtype=dtype)
    dense = state.pack(model)
    export_compressed_tensors(model, tmp_path / "out")
    loaded, _ = reload(tmp_path / "out")
    q_proj, ours = loaded.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        theirs, expected = loaded(input_ids=input_ids_BT).logits, dense(input_ids=input_ids_BT).logits
    assert torch.equal(q_proj.bias, ours.bias.bfloat16())
    packed = PackedNVFP4(ours.weight_packed.data, ours.weight_scale.data, ours.weight_global_scale, "divisor")
    assert torch.equal(q_proj.weight, dequantize(packed, torch.bfloat16))
    torch.testing.assert_close(theirs.float(), expected.float(), rtol=0, atol=0.02)


def test_files_are_readable_as_the_umask_allows(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "out")
    (tmp_path / "plain").write_text("")
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_sharded_export_has_an_index_that_covers_every_tensor_once(state, tmp_path):
    model = state.tiny_model("qwen2")
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "out", shard_size_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    found = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), shard.name)
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in model.state_dict().values())


def test_tensors_are_the_attached_state_and_nothing_else(state, tmp_path):
    model = state.tiny_model("qwen2", tied=True)
    state.pack(model)
    state.add_lora(model, {"q_proj": (4, 8), "lm_head": (4, 8)})
    export_compressed_tensors(model, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    layer = {
        *(
            f"self_attn.{p}_proj.{leaf}"
            for p in "qkvo"
            for leaf in ("weight_packed", "weight_scale", "weight_global_scale")
        ),
        *(f"self_attn.{p}_proj.bias" for p in "qkv"),
        *(
            f"mlp.{p}_proj.{leaf}"
            for p in ("gate", "up", "down")
            for leaf in ("weight_packed", "weight_scale", "weight_global_scale")
        ),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
    }
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(tensors) == expected | {f"model.layers.{index}.{name}" for index in (0, 1) for name in layer}
    q_proj = model.model.layers[1].self_attn.q_proj
    name = "model.layers.1.self_attn.q_proj."
    assert torch.equal(tensors[name + "weight_packed"], q_proj.weight_packed)
    assert tensors[name + "weight_scale"].dtype == torch.float8_e4m3fn
    assert torch.equal(tensors[name + "weight_scale"].view(torch.uint8), q_proj.weight_scale.view(torch.uint8))
    assert tensors[name + "weight_global_scale"].dtype == torch.float32
    assert torch.equal(tensors[name + "weight_global_scale"], q_proj.weight_global_scale)
    assert torch.equal(tensors[name + "bias"], q_proj.bias)


def test_members_of_a_group_may_be_slices_of_one_storage(state, input_ids_BT, tmp_path):
    model = state.tiny_model("llama")
    dense = state.pack(model)
    mlp = model.model.layers[0].mlp
    for leaf in ("weight_packed", "weight_scale"):
        parts = [mlp.gate_proj._parameters[leaf], mlp.up_proj._parameters[leaf]]
        whole = torch.cat([part.data.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        for part, rows in zip(parts, whole.chunk(2), strict=True):
            part.data = rows
    export_compressed_tensors(model, tmp_path / "out", shard_size_bytes=40_000)
    loaded, _ = reload(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=input_ids_BT).logits, dense(input_ids=input_ids_BT).logits)


def test_the_config_names_the_format_and_every_dense_linear(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "nvfp4-pack-quantized"
    assert quantization["quantization_status"] == "compressed"
    assert quantization["ignore"] == ["lm_head"]
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    weights = group["weights"]
    assert (weights["num_bits"], weights["type"], weights["strategy"], weights["group_size"]) == (
        4,
        "float",
        "tensor_group",
        16,
    )
    assert (tmp_path / "out/generation_config.json").exists()


def test_a_layer_left_dense_is_ignored_and_reloads(state, input_ids_BT, tmp_path):
    model = state.tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    weight = down.weight.detach().clone()
    dense = state.pack(model)
    del down.weight_packed, down.weight_scale, down.weight_global_scale, down.weight
    down.weight = nn.Parameter(weight)
    dense.model.layers[1].mlp.down_proj.weight.data = weight
    export_compressed_tensors(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    loaded, _ = reload(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=input_ids_BT).logits, dense(input_ids=input_ids_BT).logits)


def test_the_card_says_where_it_comes_from_and_how_to_check_it(state, tokenizer, tmp_path):
    import hashlib

    from huggingface_hub import ModelCard

    model = state.tiny_model("llama")
    state.pack(model)
    state.add_lora(model, {"q_proj": (4, 8)})
    state.record(model)
    export_compressed_tensors(model, tmp_path / "out", tokenizer=tokenizer)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert {"nvfp4", "compressed-tensors", "qerl-compile"} <= set(card.data.tags)
    assert "LoRA factors of 2 modules are exported separately" in card.text
    assert "match: .*_proj" in card.text
    rows = dict(re.findall(r"^\| (\S+) \| \d+ \| `([0-9a-f]{64})` \|$", card.text, flags=re.MULTILINE))
    files = {file.name for file in (tmp_path / "out").iterdir()} - {"README.md"}
    assert set(rows) == files >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    for name, digest in rows.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


def test_the_card_does_not_publish_a_local_path(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    export_compressed_tensors(model, tmp_path / "out", base_name=str(tmp_path / "my-model"))
    text = (tmp_path / "out/README.md").read_text()
    assert "my-model" in text
    assert str(tmp_path) not in text
    assert "base_model:" not in text


def test_the_tokenizer_is_saved_beside_the_weights(state, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    model = state.tiny_model("llama")
    state.pack(model)
    export(model, tmp_path / "out", target="vllm", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["w7"]) == [7]


def test_exporting_leaves_the_model_as_it_was(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_json_string()
    export_compressed_tensors(model, tmp_path / "out")
    assert model.config.to_json_string() == config
    assert all(torch.equal(tensor.view(torch.uint8), before[name]) for name, tensor in model.state_dict().items())


def damaged(name, value, index=0):
    def damage(model):
        model.state_dict()[name].view(-1)[index] = value

    return damage


def unshare(model):
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight_global_scale.mul_(2)


def half_packed(model):
    attention = model.model.layers[0].self_attn
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
        delattr(attention.k_proj, leaf)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("model.norm.weight", float("nan")), r"model\.norm\.weight: expected finite numbers; got NaN or Inf"),
        (
            damaged("model.embed_tokens.weight", float("inf"), 77),
            r"model\.embed_tokens\.weight: expected finite numbers",
        ),
        (damaged("model.layers.1.self_attn.q_proj.bias", float("nan")), r"model\.layers\.1\.self_attn\.q_proj\.bias: "),
        (
            damaged("model.layers.0.mlp.up_proj.weight_global_scale", float("nan")),
            r"model\.layers\.0\.mlp\.up_proj: global_scale: expected a finite and positive number; got nan",
        ),
        (
            damaged("model.layers.0.mlp.up_proj.weight_scale", float("nan"), 5),
            r"model\.layers\.0\.mlp\.up_proj: block_decode_scale_NG: expected no NaN, no sign bit set; got byte 0x7F",
        ),
        (
            unshare,
            r"layers\.0\.mlp: expected one global scale for linears that engines fuse; got .*gate_proj .*up_proj",
        ),
        (half_packed, r"layers\.0\.self_attn: expected all of .* packed or none.* got only .*q_proj, .*v_proj"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_by_name_before_anything_is_written(damage, message, state, tmp_path):
    model = state.tiny_model("qwen2")
    state.pack(model)
    with torch.no_grad():
        damage(model)
    with pytest.raises(ExportError, match=message):
        export_compressed_tensors(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_partners_quantized_apart_are_refused(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model, shared=False)
    with pytest.raises(ExportError, match=r"model\.layers\.0\.self_attn: expected one global scale"):
        export_compressed_tensors(model, tmp_path / "out")


def test_a_dense_model_is_refused(state, tmp_path):
    with pytest.raises(ExportError, match=r"LlamaForCausalLM: expected at least one linear packed.*save_pretrained"):
        export_compressed_tensors(state.tiny_model("llama"), tmp_path / "out")


def test_an_unknown_target_is_refused(state, tmp_path):
    known = "onnx, peft, sglang, tensorrt-llm, transformers, vllm"
    with pytest.raises(ExportError, match=rf"target: expected one of {known}; got 'onx'"):
        export(state.tiny_model("llama"), tmp_path / "out", target="onx")


def test_an_existing_directory_is_refused_before_the_model_is_looked_at(tmp_path):
    with pytest.raises(ExportError, match=r"expected an output directory that does not exist yet; got an existing one"):
        export_compressed_tensors(nn.Linear(16, 16), tmp_path)


def test_an_untied_head_that_equals_nothing_else_is_written_even_when_quantized(state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    state.attach(model.lm_head, quantize(model.lm_head.weight.detach()))
    export_compressed_tensors(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["ignore"] == []
    _, info = reload(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("size", [0, -1, float("inf"), float("nan")])
def test_a_shard_size_that_is_no_number_of_bytes_is_refused_before_anything_is_written(size, state, tmp_path):
    model = state.tiny_model("llama")
    state.pack(model)
    with pytest.raises(ExportError, match="shard_size_bytes: expected a finite number of at least 1"):
        export_compressed_tensors(model, tmp_path / "out", shard_size_bytes=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("target", "flag"), [("vllm", "--lora-modules"), ("sglang", "--lora-paths")])
def test_a_card_tells_each_engine_how_it_takes_the_adapter(target, flag, tmp_path):
    model = transform(tiny_model("llama"), "nvfp4-lora", inner="eager")
    export_compressed_tensors(model, tmp_path / "out", target=target)
    card = (tmp_path / "out/README.md").read_text()
    assert [word for word in ("--lora-modules", "--lora-paths") if word in card] == [flag]
