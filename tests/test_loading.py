"""`load` against `transform`, on checkpoints written to disk; packed directories, adapters, refusals, and the peak."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qerl_compile import loading
from qerl_compile.errors import CheckpointError, ModelError, QerlError, RecipeError
from qerl_compile.exporters import export
from qerl_compile.formats.nvfp4 import dequantize, quantize, quantize_group
from qerl_compile.loading import empty_model, load, usable_device
from qerl_compile.transforming import transform
from tests.models import SIZES, tiny_model

TOKENS_BT = torch.arange(14).reshape(2, 7)
LAYER = "model.layers.0"
RECIPE = {"quantize": [{"match": ".*_proj"}], "lora": [{"match": ".*[qo]_proj", "rank": 4, "alpha": 8.0}], "noise": {}}


def bits(model) -> dict[str, bytes]:
    return {
        n: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()
    }


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS_BT, use_cache=False).logits


def save(model, directory: Path, **options) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def dense(directory: Path):
    """What transformers itself loads; `model.to(bfloat16)` would also cast the rotary frequencies."""
    return AutoModelForCausalLM.from_pretrained(directory)


def eager(directory: Path, recipe=RECIPE, **options):
    return load(directory, recipe, inner="eager", device="cpu", **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A one-layer bf16 Llama on disk; tests copy it before they change it."""
    return save(tiny_model("llama", layers=1, dtype=torch.bfloat16), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, llama) -> Path:
    """The same model as our exporter writes it."""
    out = tmp_path_factory.mktemp("packed") / "model"
    export(eager(llama, {"quantize": [{"match": ".*_proj"}]}), out, target="vllm")
    return out


@pytest.fixture
def copied(tmp_path, llama) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])  # q/k/v biases; a tied head and a scaled embedding
def test_loading_equals_transforming_bit_for_bit(tmp_path, family):
    save(tiny_model(family, layers=1, dtype=torch.bfloat16), tmp_path)
    want = transform(dense(tmp_path), RECIPE, inner="eager", seed=3)
    got = eager(tmp_path, seed=3)
    assert type(got).__name__ == type(want).__name__
    assert got.qerl.plan == want.qerl.plan
    assert bits(got) == bits(want)
    assert torch.equal(logits(got), logits(want))
    assert not got.training


def test_shards_make_no_difference(tmp_path):
    model = tiny_model("qwen3", layers=2, dtype=torch.bfloat16)
    one, many = save(model, tmp_path / "one"), save(model, tmp_path / "many", max_shard_size="20KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    assert bits(eager(many)) == bits(eager(one))


def test_the_checkpoints_dtype_decides_the_bytes_and_the_asked_one_the_activations(tmp_path):
    model = tiny_model("llama", layers=1)
    save(model, tmp_path)
    got = eager(tmp_path, dtype=torch.bfloat16)
    up = got.get_submodule(f"{LAYER}.mlp.down_proj")
    assert torch.equal(up.weight_packed, quantize(model.get_submodule(f"{LAYER}.mlp.down_proj").weight).codes_NK2)
    assert {up.weight.dtype, got.model.norm.weight.dtype, logits(got).dtype} == {torch.bfloat16}


def test_without_a_recipe_a_dense_model_is_itself(llama):
    got = load(llama, inner="eager", device="cpu")
    assert torch.equal(logits(got), logits(dense(llama)))
    assert not any(parameter.requires_grad for parameter in got.parameters())


def test_an_exported_directory_round_trips_without_requantizing(llama, packed):
    again = load(packed, inner="eager", device="cpu")
    first = eager(llama, {"quantize": [{"match": ".*_proj"}]})
    assert bits(again) == bits(first)
    assert again.qerl.plan.groups == first.qerl.plan.groups
    assert torch.equal(logits(again), logits(first))


def test_a_packed_directory_can_be_trained_on_with_adapters_and_noise(llama, packed):
    assert bits(eager(packed)) == bits(eager(llama))
    got = eager(packed)
    got(input_ids=TOKENS_BT, use_cache=False).logits.float().logsumexp(-1).mean().backward()
    assert got.get_submodule(f"{LAYER}.self_attn.o_proj").lora_B.grad.abs().sum() > 0


def test_members_of_a_group_that_came_packed_keep_their_bytes_and_the_rest_is_packed_beside_them(copied):
    """q is packed on disk with a scale of its own, k and v are dense: one scale for all three is impossible."""
    file = copied / "model.safetensors"
    tensors = load_file(file)
    names = {leaf: f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkv"}
    q = quantize(tensors.pop(f"{names['q']}.weight"))
    tensors |= {
        f"{names['q']}.weight_packed": q.codes_NK2,
        f"{names['q']}.weight_scale": q.block_decode_scale_NG,
        f"{names['q']}.weight_global_scale": q.global_scale,
    }
    save_file(tensors, file)
    got = eager(copied, {"quantize": [{"match": ".*[qkv]_proj"}]})
    rest = {name: tensors[f"{name}.weight"] for name in (names["k"], names["v"])}
    want = {names["q"]: q, **quantize_group(rest)}
    for name, expected in want.items():
        assert torch.equal(got.get_submodule(name).weight_packed, expected.codes_NK2)
    oracle = tiny_model("llama", layers=1, dtype=torch.bfloat16).float()
    for name, expected in want.items():
        oracle.get_submodule(name).weight.data = dequantize(expected, torch.float32)
    torch.testing.assert_close(logits(got).float(), logits(oracle), atol=0.05, rtol=0.05)


def test_an_adapter_from_disk_is_loaded_and_decides_the_sites(tmp_path, llama):
    source = eager(llama)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    export(source, tmp_path / "adapter", target="peft")
    other_rules = {**RECIPE, "lora": [{"match": ".*up_proj", "rank": 64}]}
    got = eager(llama, other_rules, adapter=tmp_path / "adapter")
    assert got.qerl.plan.lora == source.qerl.plan.lora
    assert bits(got) == bits(source)
    assert torch.equal(logits(got), logits(source))
    trained = {name for name, parameter in got.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4


def test_an_adapter_for_another_model_is_refused(tmp_path, llama):
    source = eager(save(tiny_model("llama", layers=2, dtype=torch.bfloat16), tmp_path / "deep"))
    export(source, tmp_path / "adapter", target="peft")
    with pytest.raises(RecipeError, match=r"model\.layers\.1\.self_attn\.o_proj: expected an adapter on a linear"):
        eager(llama, adapter=tmp_path / "adapter")


def test_no_dense_weight_survives_and_only_one_group_waits(tmp_path, monkeypatch):
    """Weights are counted as they come from the file: what is not packed yet is at most one group and the newest."""
    save(tiny_model("llama", layers=2, dtype=torch.bfloat16), tmp_path)
    arrived: dict[str, weakref.ref] = {}
    peaks = []
    original = loading.read_tensors

    def watched(*args):
        for name, tensor in original(*args):
            if name.endswith("_proj.weight"):
                arrived[name] = weakref.ref(tensor)
            peaks.append([key for key, reference in arrived.items() if reference() is not None])
            yield name, tensor
            del tensor

    monkeypatch.setattr(loading, "read_tensors", watched)
    model = eager(tmp_path)
    gc.collect()
    assert len(arrived) == 14
    assert [name for name, reference in arrived.items() if reference() is not None] == []
    # File order is by name: down, gate and up of a layer, then k, o, q, v. The frame before the yield holds one more.
    assert max(map(len, peaks)) <= 4
    for path in model.qerl.plan.quantize:
        assert model.get_submodule(path).weight.untyped_storage().nbytes() == 2


def test_nothing_is_left_on_meta(llama):
    model = eager(llama)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_generation_settings_and_the_name_of_the_base_come_along(copied):
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "max_new_tokens": 3}))
    model = eager(copied)
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.qerl.base_name == str(copied)


def test_a_checkpoint_that_asks_for_checkpointing_gets_the_recompute_pass(copied):
    edit_config(copied, gradient_checkpointing=True)
    assert eager(copied).qerl.recompute
    assert not any(getattr(module, "gradient_checkpointing", False) for module in eager(copied).modules())


def test_an_empty_model_has_shapes_only(llama):
    model = empty_model(llama)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.dtype == torch.bfloat16
    assert empty_model(llama, dtype=torch.float32).dtype == torch.float32


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


UP = f"{LAYER}.mlp.up_proj"
PACKED_CONFIG = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}


def poison(tensors):
    tensors[f"{UP}.weight"][3, 5] = float("nan")


def half_packed(tensors):
    tensors[f"{UP}.weight_packed"] = torch.zeros(128, 32, dtype=torch.uint8)
    tensors[f"{UP}.weight_scale"] = torch.ones(128, 4).to(torch.float8_e4m3fn)
    del tensors[f"{UP}.weight"]


def wrongly_packed(tensors):
    half_packed(tensors)
    tensors[f"{UP}.weight_scale"] = torch.ones(128, 4)
    tensors[f"{UP}.weight_global_scale"] = torch.ones(1)


def packed_with_zero_scale(tensors):
    half_packed(tensors)
    tensors[f"{UP}.weight_global_scale"] = torch.zeros(1)


def in_eight_bits(tensors):
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda t: t.pop(f"{UP}.weight"), CheckpointError, (f"{UP}.weight",)),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), CheckpointError, ("model.extra.weight",)),
        (lambda t: t.update({f"{UP}.weight": torch.ones(64, 64)}), CheckpointError, ("[128, 64]", "[64, 64]")),
        (lambda t: t.update({"lm_head.weight": torch.ones(128)}), CheckpointError, ("lm_head.weight", "[128]")),
        (poison, CheckpointError, (f"{UP}.weight", "nan")),
        (half_packed, CheckpointError, (UP, "no weight_global_scale", "Export the checkpoint again")),
        (wrongly_packed, CheckpointError, (f"{UP}.weight_scale", "dtype F8_E4M3", "F32")),
        (packed_with_zero_scale, CheckpointError, (f"{UP}.weight_global_scale", "model.safetensors", "0.0")),
        (in_eight_bits, CheckpointError, (f"{UP}.weight", "BF16 or F16 or F32 or F64", "F8_E4M3")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copied, change, error, words):
    edit_tensors(copied, change)
    refused(copied, error, words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("'gptq'", "bf16 checkpoint")),
        ({"quantization_config": "fp8"}, ("'fp8'",)),
        ({"quantization_config": {**PACKED_CONFIG, "format": "pack-quantized"}}, ("'pack-quantized'",)),
        (
            {"quantization_config": {**PACKED_CONFIG, "config_groups": {"g": {"input_activations": {"num_bits": 4}}}}},
            ("config_groups.g.weights", "a mapping", "None"),
        ),
        ({"quantization_config": PACKED_CONFIG}, ("quantization_config", "*.weight_packed")),
        ({"model_type": "no_such_model"}, ("no_such_model",)),
        ({"hidden_size": "wide"}, ("config.json",)),
        ({"num_hidden_layers": 2}, ("model.layers.1",)),
        ({"intermediate_size": 96}, ("shape [96, 64], from config.json", "shape [128, 64]")),
    ],
)
def test_configs_that_do_not_fit_are_refused(copied, changes, words):
    edit_config(copied, **changes)
    refused(copied, CheckpointError, words)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"device": "gpu"}, ModelError, ("device", "'gpu'")),
        ({"decode": "hole"}, ModelError, ("'regional' or 'whole'",)),
        ({"inner": "induktor"}, RecipeError, ("'induktor'",)),
        ({"recipe": {"quantize": [{"match": "nothing"}]}}, RecipeError, ("quantize[0].match",)),
        ({"recipe": "no-such"}, RecipeError, ("no-such",)),
        ({"adapter": "no-such-directory"}, CheckpointError, ("no-such-directory",)),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_weight_is_read(llama, monkeypatch, options, error, words):
    monkeypatch.setattr(loading, "_stream", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(error) as fault:
        load(llama, **{"recipe": RECIPE, "inner": "eager", "device": "cpu", **options})
    assert all(word in str(fault.value) for word in words)


def refused(directory: Path, error: type[QerlError], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as fault:
        eager(directory)
    for word in words:
        assert word in str(fault.value)


def test_a_checkpoint_whose_names_transformers_changes_is_said_to_be_whole_and_how_it_loads(tmp_path):
    sizes = {**SIZES, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, dtype="bfloat16")).to(torch.bfloat16)
    published = save(model, tmp_path / "published")
    refused(
        published,
        CheckpointError,
        (
            f"names that MixtralForCausalLM has for them, such as '{LAYER}.mlp.",
            f"got 13 under names that only transformers' own loading maps to these, such as '{LAYER}.block_sparse_moe.",
            "The files are whole: ",
            "save_pretrained(OTHER, save_original_format=False)",
        ),
    )
    other = save(dense(published), tmp_path / "other", save_original_format=False)
    with pytest.warns(UserWarning, match=r"2 stacks of experts stay dense"):
        got = eager(other)
    assert len(got.qerl.plan.quantize) == 4
    assert torch.equal(got.get_parameter(f"{LAYER}.mlp.gate.weight"), model.get_parameter(f"{LAYER}.mlp.gate.weight"))


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        load(tmp_path / "nothing", inner="eager")


def test_a_device_is_the_one_asked_for_or_the_best_there_is():
    assert usable_device("meta") == torch.device("meta")
    assert usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
