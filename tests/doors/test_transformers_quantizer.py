"""transformers opens our directories, and what it hands back is what `load` gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import qerl_compile
from qerl_compile import QerlNVFP4HfConfig
from qerl_compile.errors import CheckpointError, ModelError, RecipeError
from qerl_compile.model import QerlModel
from tests.models import tiny_model

IDS = torch.arange(1, 17).reshape(2, 8)
LORA = QerlNVFP4HfConfig("nvfp4-lora", inner="eager")
PACKED = QerlNVFP4HfConfig(inner="eager")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """(dense, packed) of each family."""
    made = {}

    def directory(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            model = tiny_model(family, dtype=torch.bfloat16)
            model.save_pretrained(root / "dense")
            packed = qerl_compile.transform(model, "nvfp4-lora", inner="eager")
            qerl_compile.export(packed, root / "packed", target="transformers")
            made[family] = root / "dense", root / "packed"
        return made[family]

    return directory


def equal_bits(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])  # biases and an untied head; a tied one
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_packed_directory_opens_as_the_model_that_load_gives(family, directories):
    _, packed = directories(family)
    got = AutoModelForCausalLM.from_pretrained(packed, quantization_config=LORA)
    want = qerl_compile.load(packed, "nvfp4-lora", inner="eager", device="cpu")
    assert isinstance(got, QerlModel)
    assert type(got) is type(want)
    equal_bits(got, want)
    assert got.qerl.plan == want.qerl.plan
    assert {name for name, p in got.named_parameters() if p.requires_grad} == {
        name for name, p in want.named_parameters() if p.requires_grad
    }
    assert not hasattr(got.config, "quantization_config")
    assert got.generation_config.to_dict() == want.generation_config.to_dict()


def test_without_a_recipe_it_stays_as_it_is_and_needs_no_config(directories):
    _, packed = directories("qwen2")
    got = AutoModelForCausalLM.from_pretrained(packed)
    assert got.qerl.inner == "inductor"
    assert got.qerl.plan.lora == {}
    equal_bits(got, qerl_compile.load(packed, inner="eager", device="cpu"))


def test_a_dense_directory_is_quantized_at_load_to_the_same_bytes(directories):
    dense, _ = directories("gemma3")
    got = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LORA)
    want = qerl_compile.load(dense, "nvfp4-lora", inner="eager", device="cpu")
    assert type(got) is type(want)
    equal_bits(got, want)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_it_trains_generates_and_saves_a_peft_adapter(directories, tmp_path):
    _, packed = directories("qwen2")
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=LORA)
    want = qerl_compile.load(packed, "nvfp4-lora", inner="eager", device="cpu")
    assert torch.equal(model(IDS).logits, want(IDS).logits)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and g.isfinite().all() for g in gradients)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert model(IDS, labels=IDS).loss < loss
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 10)
    model.save_pretrained(tmp_path / "adapter")
    again = qerl_compile.load(packed, inner="eager", device="cpu", adapter=tmp_path / "adapter")
    equal_bits(again, model)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dtype_is_that_of_what_is_dense_and_attention_is_as_asked(directories):
    _, packed = directories("qwen2")
    model = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=PACKED, dtype=torch.float32, attn_implementation="eager"
    )
    assert model.config._attn_implementation == "eager"
    assert model.model.embed_tokens.weight.dtype == torch.float32
    linear = model.model.layers[0].mlp.down_proj
    assert (linear.weight_scale.dtype, linear.weight.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert model(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_one_device_is_taken(device_map, directories):
    _, packed = directories("qwen2")
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PACKED, device_map=device_map)
    wanted = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in model.parameters()} == {wanted}


@pytest.mark.parametrize("device_map", ["balanced", {"model": "cpu", "lm_head": "meta"}, {"": "disk"}])
def test_several_devices_are_refused_before_anything_is_read(device_map, directories):
    _, packed = directories("qwen2")
    with pytest.raises(ModelError, match="one device for the whole model"):
        AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)


def test_a_dense_directory_needs_a_recipe(directories):
    dense, _ = directories("qwen2")
    with pytest.raises(RecipeError, match="not packed yet; got none"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=QerlNVFP4HfConfig())


def test_faulty_options_are_refused(directories):
    dense, _ = directories("qwen2")
    with pytest.raises(RecipeError, match="built-in recipe"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=QerlNVFP4HfConfig("nvfp5"))
    with pytest.raises(ModelError, match="decode: expected 'regional' or 'whole'"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=QerlNVFP4HfConfig("nvfp4-lora", decode="x"))


def test_a_directory_may_name_a_built_in_recipe_but_no_path(directories, tmp_path):
    _, packed = directories("qwen2")
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config |= {"recipe": "nvfp4-lora", "inner": "eager"}
    assert AutoModelForCausalLM.from_pretrained(packed, config=config).qerl.plan.lora
    config.quantization_config["recipe"] = str(tmp_path / "secret.yaml")
    with pytest.raises(RecipeError, match=r"quantization_config\.recipe: expected a mapping, or a built-in name"):
        AutoModelForCausalLM.from_pretrained(packed, config=config)


def _copy(packed: Path, out: Path, change) -> Path:
    import shutil

    shutil.copytree(packed, out)
    held = load_file(out / "model.safetensors")
    change(held)
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    return out


EMBEDDING = "model.embed_tokens.weight"
BLOCKS = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("model.norm.weight"), "1 missing: 'model.norm.weight'", id="a norm missing"),
        pytest.param(lambda t: t.pop(BLOCKS), "weight_scale", id="block scales missing"),
        pytest.param(lambda t: t.update({BLOCKS: t[BLOCKS].view(torch.uint8)}), "F8_E4M3", id="block scales as bytes"),
        pytest.param(lambda t: t["model.norm.weight"].fill_(torch.nan), "finite numbers", id="NaN in a norm"),
        pytest.param(lambda t: t[BLOCKS].view(torch.uint8).fill_(0x7F), "NaN in", id="NaN in block scales"),
        pytest.param(lambda t: t.update({"x.weight": torch.ones(1)}), "1 extra: 'x.weight'", id="a tensor too many"),
        pytest.param(lambda t: t.update({"x.k_scale": torch.ones(1)}), "1 extra: 'x.k_scale'", id="a cache of nothing"),
        pytest.param(
            lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}), "got F8_E4M3", id="8-bit embedding"
        ),
    ],
)
def test_what_load_refuses_is_refused_here(change, message, directories, tmp_path):
    """transformers itself fills what is missing with random numbers and lets NaN through."""
    _, packed = directories("qwen2")
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(_copy(packed, tmp_path / "bad", change))


def test_pickles_and_code_beside_the_weights_are_refused(directories, tmp_path):
    bad = _copy(directories("qwen2")[1], tmp_path / "bad", lambda tensors: None)
    (bad / "more.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="may be a pickle"):
        AutoModelForCausalLM.from_pretrained(bad)


def test_the_config_can_be_printed_and_written():
    config = QerlNVFP4HfConfig("nvfp4-lora", ignore=["lm_head"])
    values = json.loads(config.to_json_string())
    assert values["quant_method"] == "qerl-nvfp4"
    assert values["ignore"] == ["lm_head"]
    assert values["recipe"]["name"] == "nvfp4-lora"
    assert "qerl-nvfp4" in repr(config)
    assert QerlNVFP4HfConfig.from_dict(values).to_dict() == values


def test_the_name_that_transformers_has_itself_is_left_alone():
    assert AUTO_QUANTIZER_MAPPING["nvfp4"].__module__.startswith("transformers.")
    assert AUTO_QUANTIZER_MAPPING["qerl-nvfp4"].__module__ == "qerl_compile.doors.transformers_quantizer"


def test_it_is_registered_whichever_is_imported_first_and_again_after_a_reload():
    code = """
import importlib, inspect, sys
import qerl_compile
assert "transformers" not in sys.modules
from transformers.quantizers import auto
def registered():
    return "qerl-nvfp4" in auto.AUTO_QUANTIZER_MAPPING and "qerl-nvfp4" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert registered()
assert "def register_quantizer" in inspect.getsource(auto)  # its loader answers as before
importlib.reload(auto)
assert registered()
for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
    del mapping["qerl-nvfp4"]
del sys.modules["qerl_compile"]  # as if transformers had been there first
import qerl_compile
assert registered()
importlib.reload(qerl_compile)
importlib.reload(auto)  # found by one opener; two would ask each other for ever
assert registered()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_transformers_that_the_door_does_not_fit_is_still_usable():
    """A stand-in for a version whose registry has other names; importing it must warn and not fail."""
    code = """
import sys, types, warnings, importlib.machinery
import qerl_compile
class Old:
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "transformers.quantizers", "transformers.quantizers.auto"):
            return importlib.machinery.ModuleSpec(name, self, is_package=not name.endswith("auto"))
    def create_module(self, spec): return None
    def exec_module(self, module): pass
sys.meta_path.insert(1, Old())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers.quantizers.auto
assert any("qerl-nvfp4 is not registered" in str(each.message) for each in caught), caught
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
