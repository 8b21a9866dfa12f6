"""Trainable norms in whole models: float32 weights that both kinds of graph read, the base kept; saved and read."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from qerl_compile.adapter_files import norm_name, trained_norms_of, write_adapter
from qerl_compile.adapter_reading import adapter_norms, read_adapter
from qerl_compile.errors import CheckpointError, RecipeError
from qerl_compile.exporters import export
from qerl_compile.loading import load
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout import PagedSampler, Sampling
from qerl_compile.stacked_adapters import refresh_stacked_adapters
from qerl_compile.transforming import resample_noise, transform
from tests.models import SOME_FAMILIES, tiny_model
from tests.pages import Pages
from tests.rl.toy import toy_recipe, toy_trainer

TOKENS_BT = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
NORMS = [f"model.layers.{i}.{name}_layernorm" for i in range(2) for name in ("input", "post_attention")]


def recipe(name="qerl-nvfp4-aqn", pattern=".*"):
    return Recipe.named(name).model_copy(update={"trainable_norms": pattern})


def made(family="llama", name="qerl-nvfp4-aqn", pattern=".*", inner="eager", **options):
    return transform(tiny_model(family, **options), recipe(name, pattern), inner=inner)


def train_logits(model, tokens=TOKENS_BT):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def rollout_logits(model):
    refresh_stacked_adapters(model)
    return model(input_ids=TOKENS_BT, use_cache=False, qerl_cache=Pages(len(TOKENS_BT))).logits


def loss(model):
    return model(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean()


@torch.no_grad()
def train(model, seed=1):
    """Move everything that is trained, as many steps of an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize(
    "family, dtype", [*((family, torch.bfloat16) for family in SOME_FAMILIES), ("llama", torch.float32)]
)
def test_before_the_first_update_the_model_computes_what_it_did_bit_for_bit(family, dtype):
    plain = transform(tiny_model(family, dtype=dtype), "qerl-nvfp4-aqn", inner="eager")
    model = made(family, dtype=dtype)
    assert len(trained_norms_of(model)) == 4
    assert torch.equal(train_logits(model), train_logits(plain))
    assert torch.equal(rollout_logits(model), rollout_logits(plain))


def test_adapters_and_the_chosen_norms_are_trained_and_nothing_else():
    model = made(pattern=r".*\.1\.input_layernorm")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"model.layers.1.input_layernorm.trained_weight"}
    assert model.qerl.plan.trained_norms == ("model.layers.1.input_layernorm",)
    off = transform(tiny_model("llama"), "qerl-nvfp4-aqn", inner="eager")
    assert trained_norms_of(off) == {}
    assert off.qerl.plan.trained_norms == ()


@pytest.mark.parametrize("family, inner", [("llama", "aot_eager"), ("qwen3", "eager"), ("gemma3", "eager")])
def test_gradients_are_those_of_a_plain_model_whose_norms_are_trained(family, inner):
    plain = tiny_model(family)
    model = transform(copy.deepcopy(plain), recipe("bf16-lora"), inner=inner)
    loss(plain).backward()
    loss(model).backward()
    for path, weight in trained_norms_of(model).items():
        want = plain.get_submodule(path).weight.grad
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(weight.grad, want, rtol=1e-4, atol=1e-6)
        assert model.get_submodule(path).weight.grad is None


def test_recomputed_activations_give_the_same_gradients():
    kept, recomputed = made(inner="aot_eager"), made(inner="aot_eager")
    recomputed.gradient_checkpointing_enable()
    for model in (kept, recomputed):
        train(model)
        resample_noise(model, 0.1, torch.Generator().manual_seed(0))
        loss(model).backward()
    for path, weight in trained_norms_of(kept).items():
        assert torch.equal(trained_norms_of(recomputed)[path].grad, weight.grad)


def test_steps_of_1e_5_add_up_on_a_bf16_base_whose_bits_stay():
    model = made(dtype=torch.bfloat16)
    base = {path: model.get_submodule(path).weight.clone() for path in NORMS}
    before = train_logits(model)
    optimizer = torch.optim.AdamW(trained_norms_of(model).values(), lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, weight in trained_norms_of(model).items():
        moved = (weight.detach() - base[path].float()).abs()
        assert moved.max().item() == pytest.approx(3e-5, rel=0.05)
        assert moved.mean() > 1e-5
        assert torch.equal(model.get_submodule(path).weight, base[path])
        assert torch.equal(weight.bfloat16(), base[path])  # what a bf16 weight would have kept of it
    assert not torch.equal(train_logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rollouts_see_updates_in_place_and_noise_on_top_of_them(family):
    plain = tiny_model(family)
    model = transform(copy.deepcopy(plain), recipe("bf16-lora-aqn"), inner="eager")
    sampler = PagedSampler(model, rows=2, page_tokens=4)
    sampler.generate([(5, 9)], 2, Sampling(3, (2,), 0, seed=(1,)))
    train_logits(model), rollout_logits(model)
    counts = [compiler.graphs for compiler in model.qerl.compilers]
    with torch.no_grad():
        for index, (path, weight) in enumerate(trained_norms_of(model).items()):
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
            plain.get_submodule(path).weight.copy_(weight)
    assert (train_logits(model) - train_logits(plain)).abs().max() <= 1e-5
    assert (rollout_logits(model) - train_logits(plain)).abs().max() <= 1e-5
    _, rms = resample_noise(model, 0.1, torch.Generator().manual_seed(7))
    assert rms == pytest.approx(0.1, rel=0.2)
    with torch.no_grad():
        for path in trained_norms_of(model):
            plain.get_submodule(path).weight.add_(model.get_submodule(path).noise)
    assert (train_logits(model) - train_logits(plain)).abs().max() <= 1e-5
    (one, _) = sampler.generate([(5, 9)], 2, Sampling(3, (2,), 0, seed=(1,)))
    logp = train_logits(plain, torch.tensor([[5, 9, *one.completion_ids]])).log_softmax(-1)[0, 1:-1]
    want = logp.gather(1, torch.tensor(one.completion_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(one.logps), want, rtol=0, atol=1e-5)
    assert [compiler.graphs for compiler in model.qerl.compilers] == counts


def test_layers_of_which_only_some_are_trained_have_graphs_of_their_own():
    model = made(pattern=r"model\.layers\.1\..*", layers=3)
    assert len({model.qerl.plan.kind(layer) for layer in model.qerl.plan.layers}) == 2
    clean = train_logits(model)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.trained_weight.mul_(1.5)
    assert not torch.equal(train_logits(model), clean)


def test_a_deep_copy_trains_on_its_own():
    model = made()
    train(model)
    want, twin = train_logits(model), copy.deepcopy(model)
    assert torch.equal(train_logits(twin), want)
    train(twin, 2)
    assert not torch.equal(train_logits(twin), want)
    assert torch.equal(train_logits(model), want)
    assert torch.equal(rollout_logits(model), rollout_logits(copy.deepcopy(model)))


def test_a_state_dict_carries_the_trained_weights():
    model, other = made(), made()
    train(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(train_logits(other), train_logits(model))


def test_the_base_is_recovered_by_putting_its_weights_in_for_a_while():
    """What a KL reference does beside zeroing lora_B: the norm's own `weight` is the base's for ever."""
    plain = transform(tiny_model("llama"), "qerl-nvfp4-aqn", inner="eager")
    model = made()
    train(model)
    with torch.no_grad():
        for parameter in (parameter for name, parameter in model.named_parameters() if "lora_B" in name):
            parameter.zero_()
        for path, weight in trained_norms_of(model).items():
            weight.copy_(model.get_submodule(path).weight)
    assert torch.equal(train_logits(model), train_logits(plain))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trainable_norms": r"model\.norm"}, r"trainable_norms: .*matches none of 4 modules"),
        ({"trainable_norms": r".*q_norm"}, r"trainable_norms: .*matches none of 4 modules"),
        ({"lora": ()}, r"trainable_norms: expected lora rules as well, .* got a recipe without adapters"),
    ],
)
def test_a_pattern_that_trains_nothing_is_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        transform(tiny_model("qwen3"), recipe().model_copy(update=changes), inner="eager")


# Files


def base_directory(tmp_path, dtype=torch.float32):
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_saved_policy_is_loaded_with_the_same_bits(tmp_path):
    base = base_directory(tmp_path)
    model = load(base, recipe(), inner="eager", device="cpu")
    train(model)
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    assert adapter_norms(tmp_path / "adapter") == tuple(NORMS)
    for chosen in (recipe(), "qerl-nvfp4-aqn", recipe(pattern=r".*\.0\.input_layernorm")):  # the adapter's norms count
        again = load(base, chosen, inner="eager", device="cpu", adapter=tmp_path / "adapter")
        assert list(trained_norms_of(again)) == NORMS
        for path, weight in trained_norms_of(model).items():
            assert torch.equal(trained_norms_of(again)[path], weight)
            assert trained_norms_of(again)[path].requires_grad
        assert torch.equal(train_logits(again), train_logits(model))


def test_an_adapter_without_norms_describes_the_bases_norms(tmp_path):
    base = base_directory(tmp_path)
    plain = load(base, "qerl-nvfp4-aqn", inner="eager", device="cpu")
    train(plain)
    write_adapter(plain, tmp_path / "adapter", base_name="org/base")
    again = load(base, recipe(), inner="eager", device="cpu", adapter=tmp_path / "adapter")
    assert list(trained_norms_of(again)) == NORMS  # the recipe's rule holds, from the base's values on
    assert torch.equal(train_logits(again), train_logits(plain))
    train(again, 3)
    read_adapter(again, tmp_path / "adapter")
    assert torch.equal(train_logits(again), train_logits(plain))


def test_an_adapter_of_another_model_is_refused_by_its_norms(tmp_path):
    model = made(layers=3)
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    with pytest.raises(RecipeError, match=r"layers\.2\..*: expected an adapter on a linear that the model calls"):
        load(base_directory(tmp_path), None, inner="eager", device="cpu", adapter=tmp_path / "adapter")
    gemma = made("gemma3", name="bf16-lora")
    write_adapter(gemma, tmp_path / "gemma", base_name="org/base")
    with pytest.raises(RecipeError, match=r"pre_feedforward_layernorm: expected trained weights of norms that feed"):
        load(tmp_path / "base", None, inner="eager", device="cpu", adapter=tmp_path / "gemma")


def test_a_checkpoint_for_serving_has_the_bases_norms_or_the_trained_ones(tmp_path):
    model = made(dtype=torch.bfloat16)
    base = {name: model.get_parameter(name).clone() for name in (f"{path}.weight" for path in NORMS)}
    train(model)
    resample_noise(model, 0.1)
    export(model, tmp_path / "base", target="vllm")
    export(model, tmp_path / "trained", target="vllm", norms_in_base=True)
    plain, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "trained"))
    assert plain.keys() == trained.keys()
    assert not any("trained_weight" in name for name in plain)
    for name in plain:
        if name in base:
            assert torch.equal(plain[name], base[name])
            weight = trained_norms_of(model)[name.removesuffix(".weight")]
            assert torch.equal(trained[name], weight.detach().bfloat16())
            assert not torch.equal(trained[name], plain[name])
        else:
            assert torch.equal(trained[name].view(torch.uint8), plain[name].view(torch.uint8))
    assert "4 were trained beside the adapter; not included" in (tmp_path / "base/README.md").read_text()
    assert "4 were trained beside the adapter; included, trained" in (tmp_path / "trained/README.md").read_text()


def test_an_adapter_for_such_a_checkpoint_has_no_norms_and_both_make_the_policy(tmp_path):
    model = made()
    train(model)
    with torch.no_grad():
        for weight in trained_norms_of(model).values():
            weight.copy_(weight.bfloat16())
    want = train_logits(model)
    export(model, tmp_path / "served", target="vllm", norms_in_base=True)
    export(model, tmp_path / "lora", target="peft", norms_in_base=True)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert not any(norm_name(path) in load_file(tmp_path / "lora/adapter_model.safetensors") for path in NORMS)
    served = load(
        tmp_path / "served", None, dtype=torch.float32, inner="eager", device="cpu", adapter=tmp_path / "lora"
    )
    rounded = tiny_model("llama").to(torch.bfloat16).float()  # the export's embeddings and head are bf16
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        model.get_parameter(name).data.copy_(rounded.get_parameter(name))
    assert not torch.equal(train_logits(model), want)
    torch.testing.assert_close(train_logits(served), train_logits(model), rtol=0, atol=1e-5)
    assert "BASE_WITH_TRAINED_NORMS" in (tmp_path / "lora/README.md").read_text()


def test_an_adapter_that_names_other_modules_is_refused(tmp_path):
    model = made()
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    file = tmp_path / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    assert config["modules_to_save"] == ["input_layernorm", "post_attention_layernorm"]
    for saved in (["input_layernorm"], ["input_layernorm", "post_attention_layernorm", "lm_head"], "layernorm", [3]):
        file.write_text(json.dumps(config | {"modules_to_save": saved}))
        if saved == "layernorm":
            read_adapter(model, tmp_path / "adapter")
            continue
        with pytest.raises(CheckpointError, match="modules_to_save: expected the 4 norms that the model trains"):
            read_adapter(model, tmp_path / "adapter")


# The loop


def test_the_trainer_trains_norms_beside_the_adapters():
    chosen = toy_recipe(train__steps=4).model_copy(update={"trainable_norms": ".*"})
    model = tiny_model("llama", vocab_size=16, eos_token_id=1)
    model = transform(model, chosen, inner="eager")
    model.fresh_state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer, rows = toy_trainer(chosen, model)
    norms = trained_norms_of(model)
    assert {id(weight) for weight in norms.values()} <= {id(parameter) for parameter in trainer.parameters}
    trainer.train()
    moved = [path for path, weight in norms.items() if not torch.equal(weight, model.get_submodule(path).weight)]
    assert moved == NORMS
    for name, tensor in model.state_dict().items():
        if name.endswith("layernorm.weight"):
            assert torch.equal(tensor, model.fresh_state[name])
    steps = [row for row in rows if "loss" in row]
    assert [row["noise/sites"] for row in steps] == [4] * 4
