"""The PeftModel that a transformed model with an adapter is: every public name of PEFT's works or says why not."""

import copy
import inspect
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.integrations.peft import PeftAdapterMixin

from qerl_compile.adapter_files import adapter_tensors
from qerl_compile.adapters_off import learned_parameters
from qerl_compile.errors import CheckpointError, ExportError, ModelError
from qerl_compile.peft_face import PeftFace
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import transform
from tests.models import tiny_model

TOKENS_BT = torch.arange(3, 15).reshape(2, 6)
RECIPE = {"quantize": [{"match": ".*_proj"}], "lora": [{"match": ".*_proj", "rank": 4, "alpha": 8.0}]}
FILES = ["adapter_config.json", "adapter_model.safetensors"]

# Of PeftModel's public names, those that the Hugging Face model has too (its own are used) ...
THE_MODELS_OWN = {"forward", "generate", "from_pretrained", "push_to_hub"}
# ... those that work as PEFT wrote them, on what PeftFace gives (called below) ...
AS_IN_PEFT = {"active_peft_config", "base_model_torch_dtype", "modules_to_save", "supports_lora_conversion"}
AS_IN_PEFT |= {"create_or_update_model_card"}
# ... and those that are refused: merges, wrappers that do not exist, prompt learning.
REFUSED = {
    *("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"),
    *("disable_adapters", "enable_adapters", "disable_adapter_layers", "enable_adapter_layers"),
    *("enable_peft_hotswap", "get_layer_status", "get_model_status"),
    *("get_prompt", "get_prompt_embedding_to_save", "prepare_model_for_gradient_checkpointing"),
}


def made(recipe=RECIPE, **options):
    """A transformed model with a B that is not zero."""
    model = transform(tiny_model("llama", layers=1), recipe, inner="eager", **options)
    with torch.no_grad():
        for parameter in learned_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


@pytest.fixture(scope="module")
def shared():
    """A model for tests that leave it as it is."""
    return made()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS_BT, use_cache=False).logits


def learned(model):
    return [parameter.detach().clone() for parameter in learned_parameters(model)]


def equal(one, other):
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def public(cls):
    return {name for name in vars(cls) if not name.startswith("_")}


def test_it_is_a_peft_model_and_what_it_was(shared):
    assert isinstance(shared, PeftModel)
    assert isinstance(shared, LlamaForCausalLM)
    assert type(shared).__name__ == "LlamaForCausalLM"
    assert type(shared).__getattr__ is torch.nn.Module.__getattr__  # PEFT's would look into the decoder
    assert not hasattr(shared, "layers")
    assert (
        list(inspect.signature(shared.forward).parameters)
        == list(inspect.signature(LlamaForCausalLM.forward).parameters)[1:]
    )


def test_without_an_adapter_it_is_none_and_is_not_saved(tmp_path):
    model = transform(tiny_model("llama", layers=1), {"quantize": RECIPE["quantize"]}, inner="eager")
    assert not isinstance(model, PeftModel)
    with pytest.raises(ModelError, match=r"got a transformed model without adapters\. Use qerl_compile\.export"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_of_peft_has_been_decided_on():
    theirs = public(PeftModel) | public(PeftAdapterMixin)
    assert theirs - public(PeftFace) - THE_MODELS_OWN == AS_IN_PEFT
    assert all(hasattr(LlamaForCausalLM, name) for name in THE_MODELS_OWN)
    tuner = {name for name in public(LoraModel) | public(LoraModel.__base__) if "merge" in name or "unload" in name}
    assert {"merge_adapter", "merge_and_unload", "unload", "unmerge_adapter"} <= tuner
    assert tuner - public(PeftFace) <= {"supports_merging_mixed_precision"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_done_says_why_and_changes_nothing(name, shared):
    before = learned(shared)
    with pytest.raises(ModelError, match=rf"LlamaForCausalLM\.{name}: expected .*; got .*\. [A-Z]"):
        getattr(shared, name)()
    assert equal(learned(shared), before)


def test_a_merge_says_that_it_would_be_lost(shared):
    with pytest.raises(ModelError, match="rounded to 4 bits again and lose what was learned"):
        shared.merge_and_unload()


def test_what_works_as_peft_wrote_it(shared, tmp_path):
    assert shared.active_peft_config.r == 4
    assert shared.base_model_torch_dtype == torch.float32
    assert shared.modules_to_save is None
    assert shared.supports_lora_conversion() is False
    shared.create_or_update_model_card(str(tmp_path))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_names_counts_and_configuration(shared, capsys):
    assert (shared.active_adapter, shared.active_adapters, shared.peft_type) == ("default", ["default"], "LORA")
    assert shared.get_base_model() is shared
    assert list(shared.peft_config) == ["default"]
    config = shared.peft_config["default"]
    assert (config.r, config.lora_alpha, config.peft_type) == (4, 8, "LORA")
    plain = tiny_model("llama", layers=1)
    adapters = sum(4 * sum(module.weight.shape) for path, module in plain.named_modules() if path.endswith("_proj"))
    total = plain.num_parameters() + adapters
    assert shared.get_nb_trainable_parameters() == (adapters, total)
    shared.print_trainable_parameters()
    expected = (
        f"trainable params: {adapters:,d} || all params: {total:,d} || trainable%: {100 * adapters / total:.4f}\n"
    )
    assert capsys.readouterr().out == expected


def test_disable_adapter_is_a_block(shared):
    before = logits(shared)
    assert shared.has_active_enabled_adapter
    with shared.disable_adapter():
        assert not shared.has_active_enabled_adapter
        assert not torch.equal(logits(shared), before)
    assert torch.equal(logits(shared), before)


def test_adapters_are_saved_into_new_and_old_directories_and_loaded_back(shared, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.json").write_text("{}")
    (tmp_path / "old/adapter_model.safetensors").write_text("half a file")
    for name in ("new", "old"):
        shared.save_pretrained(tmp_path / name, state_dict=None, is_main_process=True, safe_serialization=True)
        other = transform(tiny_model("llama", layers=1), RECIPE, inner="eager")
        assert not equal(learned(other), learned(shared))
        other.load_adapter(tmp_path / name, "default", is_trainable=True)
        assert equal(learned(other), learned(shared))
        assert all(parameter.requires_grad for parameter in learned_parameters(other))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "old"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == FILES
    assert sorted(file.name for file in (tmp_path / "old").iterdir()) == [*FILES, "tokenizer.json"]
    saved = load_file(tmp_path / "old/adapter_model.safetensors")
    assert saved.keys() == shared.get_adapter_state_dict().keys() == adapter_tensors(shared).keys()
    assert json.loads((tmp_path / "old/adapter_config.json").read_text())["r"] == 4


def test_another_process_than_the_first_writes_nothing(shared, tmp_path):
    shared.save_pretrained(tmp_path / "out", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_adapter_leaves_an_old_one_alone(shared, tmp_path):
    shared.save_pretrained(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    model = copy.deepcopy(shared)
    with torch.no_grad():
        learned_parameters(model)[1][0, 0] = float("nan")
    with pytest.raises(ExportError, match="expected finite numbers"):
        model.save_pretrained(tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_trained_norms_are_saved_and_loaded_too(tmp_path):
    recipe = Recipe.resolve(RECIPE).model_copy(update={"trainable_norms": ".*"})
    model, other = made(recipe), transform(tiny_model("llama", layers=1), recipe, inner="eager")
    model.save_pretrained(tmp_path / "out")
    other.load_adapter(tmp_path / "out")
    assert equal(learned(other), learned(model))
    assert len(learned(model)) == 2 * 7 + 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: m.save_pretrained(d / "out", push_to_hub=True), r"got push_to_hub=True"),
        (lambda m, d: m.save_pretrained(d / "out", selected_adapters=["ref"]), r"selected_adapters=\['ref'\]"),
        (lambda m, d: m.load_adapter("org/hub-id"), r"load_adapter: expected a directory .* got 'org/hub-id'"),
        (lambda m, d: m.load_adapter(d, "other"), r"expected the adapter in use, 'default'; got 'other'"),
        (lambda m, d: m.set_adapter("other"), r"set_adapter: expected one of default; got 'other'"),
        (lambda m, d: m.delete_adapter("default"), r"delete_adapter: expected an adapter that is not in use"),
        (lambda m, d: m.set_requires_grad("other"), r"expected the adapter in use"),
        (lambda m, d: m.add_adapter("default", m.peft_config["default"]), r"expected a new name; got 'default'"),
        (lambda m, d: m.add_adapter("b", LoraConfig(r=16)), r"expected the model's own configuration, .*'r': 16"),
        (
            lambda m, d: m.add_adapter(LoraConfig()),
            r"expected a name, .*; got LoraConfig",
        ),  # as PeftAdapterMixin has it
        (
            lambda m, d: get_peft_model(m, LoraConfig(target_modules=["q_proj"])),
            r"peft_config: expected the one adapter",
        ),
    ],
)
def test_requests_that_cannot_be_met_are_refused(call, message, shared, tmp_path):
    model = copy.deepcopy(shared)
    before = learned(model)
    with pytest.raises(ModelError, match=message):
        call(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert equal(learned(shared), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, d: m.save_pretrained(d / "new"),
        lambda m, d: m.load_adapter(d / "saved"),
        lambda m, d: m.add_adapter("ref", m.peft_config["default"]),
    ],
)
def test_zeros_are_neither_saved_nor_copied(call, shared, tmp_path):
    shared.save_pretrained(tmp_path / "saved")
    with shared.disable_adapter(), pytest.raises(ModelError, match=r"got a call inside disable_adapter\(\)"):
        call(shared, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_damaged_adapter_changes_nothing(shared, tmp_path):
    shared.save_pretrained(tmp_path / "out")
    file = tmp_path / "out/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    before = learned(shared)
    with pytest.raises(CheckpointError):
        shared.load_adapter(tmp_path / "out")
    assert equal(learned(shared), before)
    shutil.rmtree(tmp_path / "out")


def test_an_added_adapter_is_a_frozen_copy_that_changes_places_with_the_one_in_use(tmp_path):
    model = made()
    start, first = learned(model), logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    assert list(model.peft_config) == ["default", "ref"]
    with torch.no_grad():
        for parameter in learned_parameters(model):
            parameter.mul_(1.5)
    trained, second = learned(model), logits(model)
    graphs = [compiler.graphs for compiler in model.qerl.compilers]
    model.set_adapter("ref")
    assert model.active_adapter == "ref"
    assert equal(learned(model), start)
    assert torch.equal(logits(model), first)
    with pytest.raises(ModelError, match=r"Call set_adapter\('default'\) first"):
        model.save_pretrained(tmp_path / "out")
    model.set_adapter("default")
    assert equal(learned(model), trained)
    assert torch.equal(logits(model), second)
    assert [compiler.graphs for compiler in model.qerl.compilers] == graphs
    model.delete_adapter("ref")
    assert list(model.peft_config) == ["default"]


def test_a_deep_copy_has_adapters_of_its_own(shared):
    model = copy.deepcopy(shared)
    model.add_adapter("ref", model.peft_config["default"])
    assert isinstance(model, PeftModel)
    assert list(shared.peft_config) == ["default"]
    assert torch.equal(logits(model), logits(shared))


def test_an_adapter_may_be_frozen(shared):
    model = copy.deepcopy(shared)
    model.set_requires_grad("default", False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad(["default"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learned_parameters(model)}


def test_generation_with_one_whole_graph_is_that_of_regions(shared):
    whole = made(decode="whole")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(whole.generate(TOKENS_BT, **settings), shared.generate(TOKENS_BT, **settings))


def test_asking_again_for_checkpointing_compiles_nothing_again():
    model = made()
    model.gradient_checkpointing_enable()
    logits(model)
    compilers = list(model.qerl.compilers)
    model.gradient_checkpointing_enable()
    assert model.qerl.compilers == compilers
