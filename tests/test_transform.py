"""The transformed model against Hugging Face with dequantized weights, on four families."""

import copy

import pytest
import torch

from qerl_compile.errors import FormatError, GraphError, ModelError, RecipeError
from qerl_compile.loading import load
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import resample_noise, transform
from tests.models import FAMILIES, SOME_FAMILIES, dequantized_oracle, tiny_model

TOKENS_BT = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))


def transformed(family="llama", recipe="qerl-nvfp4-aqn", inner="eager", **options):
    """A tiny model, transformed, and its dequantized oracle."""
    model = tiny_model(family, **options)
    oracle = dequantized_oracle(model, make_plan(model, Recipe.resolve(recipe)))
    return transform(model, recipe, inner=inner), oracle


@pytest.mark.parametrize(
    "family, inner",
    [*((family, "eager") for family in FAMILIES), *((family, "aot_eager") for family in SOME_FAMILIES[:1])],
)
def test_logits_equal_the_dequantized_model(family, inner):
    model, oracle = transformed(family, inner=inner)
    got = model(input_ids=TOKENS_BT, use_cache=False).logits
    want = oracle(input_ids=TOKENS_BT, use_cache=False).logits
    assert (got - want).abs().max() <= 1e-5
    assert want.abs().max() > 0.1


def test_logits_equal_the_dequantized_model_under_inductor():
    model, oracle = transformed("qwen2", inner="inductor", layers=1)
    got = model(input_ids=TOKENS_BT, use_cache=False).logits
    assert (got - oracle(input_ids=TOKENS_BT, use_cache=False).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "family, cache", [*((family, None) for family in FAMILIES), *((family, "static") for family in SOME_FAMILIES[1:])]
)
def test_generate_gives_the_oracles_tokens(family, cache):
    model, oracle = transformed(family)
    options = {"max_new_tokens": 7, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.generate(TOKENS_BT, **options), oracle.generate(TOKENS_BT, **options))


def test_generate_with_left_padding_gives_the_oracles_tokens():
    model, oracle = transformed("llama")
    mask_BT = torch.ones_like(TOKENS_BT)
    mask_BT[0, :4] = mask_BT[2, :1] = 0
    options = {"attention_mask": mask_BT, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(TOKENS_BT, **options), oracle.generate(TOKENS_BT, **options))


@pytest.mark.parametrize("family", SOME_FAMILIES[1:])
def test_whole_graph_decode_gives_the_oracles_tokens(family):
    model = tiny_model(family)
    oracle = dequantized_oracle(model, make_plan(model, Recipe.named("nvfp4-lora")))
    model = transform(model, "nvfp4-lora", inner="eager", decode="whole")
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(TOKENS_BT, **options), oracle.generate(TOKENS_BT, **options))
    regional, whole = model.qerl.compilers
    assert whole.graphs > 0
    assert regional.graphs == 0


def test_graphs_do_not_grow_with_depth():
    graphs = []
    for layers in (2, 5):
        model = transform(tiny_model("llama", layers=layers), "qerl-nvfp4-aqn", inner="eager")
        model(input_ids=TOKENS_BT, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            model.generate(TOKENS_BT, max_new_tokens=5, do_sample=False)
        graphs.append(sum(compiler.graphs for compiler in model.qerl.compilers))
    assert graphs[0] == graphs[1]


def test_every_layer_uses_its_own_weights_adapters_and_noise():
    model, _ = transformed("llama", layers=3)
    clean = model(input_ids=TOKENS_BT, use_cache=False).logits.detach()
    seen = []
    for layer in range(3):
        norm = model.get_submodule(f"model.layers.{layer}.input_layernorm")
        up = model.get_submodule(f"model.layers.{layer}.mlp.up_proj")
        with torch.no_grad():
            norm.noise.fill_(0.1)
            noisy = model(input_ids=TOKENS_BT, use_cache=False).logits
            norm.noise.zero_()
            up.lora_B.fill_(0.05)
            adapted = model(input_ids=TOKENS_BT, use_cache=False).logits
            up.lora_B.zero_()
        seen += [(noisy - clean).abs().max().item(), (adapted - clean).abs().max().item()]
    assert min(seen) > 1e-3
    assert len({round(value, 7) for value in seen}) == 6
    assert torch.equal(model(input_ids=TOKENS_BT, use_cache=False).logits, clean)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_reach_every_adapter_and_nothing_else(inner):
    model, _ = transformed("qwen3", inner=inner)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    model(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 7 * 2


def test_adapter_gradients_equal_those_of_the_dense_formula():
    model, oracle = transformed("llama", layers=1)
    path = "model.layers.0.mlp.down_proj"
    site = model.get_submodule(path)
    with torch.no_grad():
        site.lora_B.normal_(std=0.05)
    a_RK, b_NR = (getattr(site, name).detach().clone().requires_grad_() for name in ("lora_A", "lora_B"))
    dense = oracle.get_submodule(path)
    weight_NK = dense.weight.detach() + (site.lora_alpha / site.lora_rank) * b_NR @ a_RK
    want = torch.func.functional_call(oracle, {f"{path}.weight": weight_NK}, kwargs={"input_ids": TOKENS_BT}).logits
    want.logsumexp(-1).mean().backward()
    model(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean().backward()
    torch.testing.assert_close(site.lora_A.grad, a_RK.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(site.lora_B.grad, b_NR.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_noise_is_on_two_norms_per_layer_and_is_removed_bit_for_bit(family):
    model, _ = transformed(family, dtype=torch.bfloat16)
    clean = model(input_ids=TOKENS_BT, use_cache=False).logits
    count, rms = resample_noise(model, 5e-4, torch.Generator().manual_seed(1))
    assert (count, round(rms / 5e-4, 1)) == (4, 1.0)
    assert not torch.equal(model(input_ids=TOKENS_BT, use_cache=False).logits, clean)
    assert resample_noise(model, 0.0) == (4, 0.0)
    assert torch.equal(model(input_ids=TOKENS_BT, use_cache=False).logits, clean)


def test_noise_rewriting_changes_no_bit_when_it_is_silent():
    plain = transform(tiny_model("llama", dtype=torch.bfloat16), "nvfp4-lora", inner="eager")
    noisy = transform(tiny_model("llama", dtype=torch.bfloat16), "qerl-nvfp4-aqn", inner="eager")
    outputs = [model(input_ids=TOKENS_BT, use_cache=False).logits for model in (plain, noisy)]
    assert torch.equal(*outputs)


def test_bf16_recipe_leaves_the_model_as_it_was_until_trained():
    model = tiny_model("llama", dtype=torch.bfloat16)
    want = model(input_ids=TOKENS_BT).logits
    assert torch.equal(transform(model, "bf16-lora", inner="eager")(input_ids=TOKENS_BT, use_cache=False).logits, want)


def test_the_packed_model_holds_no_dense_copy():
    model, _ = transformed("llama", layers=2)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    packed = sum(model.get_submodule(path).weight_packed.nbytes for path in model.qerl.plan.quantize)
    linears = sum(
        storages[model.get_submodule(path).weight_packed.untyped_storage().data_ptr()] for path in _firsts(model)
    )
    assert linears == packed
    assert all(model.get_submodule(path).weight.untyped_storage().nbytes() <= 4 for path in model.qerl.plan.quantize)


def _tensors(model):
    return [*model.parameters(), *model.buffers()]


def _firsts(model):
    return dict.fromkeys(model.qerl.plan.group_of(path)[0] for path in model.qerl.plan.quantize)


def test_state_dict_round_trip_resumes_adapters_and_packed_weights():
    source, _ = transformed("qwen2")
    target = transform(tiny_model("qwen2", seed=5), "qerl-nvfp4-aqn", inner="eager")
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    state = source.state_dict()
    assert not any(name.endswith(("proj.weight", ".noise", ".decode_scale", ".fused_packed")) for name in state)
    target.load_state_dict(state)
    outputs = [model(input_ids=TOKENS_BT, use_cache=False).logits for model in (source, target)]
    assert torch.equal(*outputs)


def test_assigning_a_state_dict_is_refused():
    model, _ = transformed("llama", layers=1)
    with pytest.raises(ModelError, match="assign"):
        model.load_state_dict(model.state_dict(), assign=True)


def test_deepcopy_is_independent_and_equal():
    model, _ = transformed("llama")
    twin = copy.deepcopy(model)
    want = model(input_ids=TOKENS_BT, use_cache=False).logits
    assert torch.equal(twin(input_ids=TOKENS_BT, use_cache=False).logits, want)
    with torch.no_grad():
        twin.get_submodule("model.layers.0.mlp.gate_proj").weight_packed.zero_()
    assert not torch.equal(twin(input_ids=TOKENS_BT, use_cache=False).logits, want)
    assert torch.equal(model(input_ids=TOKENS_BT, use_cache=False).logits, want)


def test_moves_that_change_nothing_keep_the_model_and_casts_are_refused():
    model, _ = transformed("llama")
    want = model(input_ids=TOKENS_BT, use_cache=False).logits
    assert model.to("cpu") is model
    assert torch.equal(model.float()(input_ids=TOKENS_BT, use_cache=False).logits, want)
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM: expected .* keep its dtypes"):
            cast()


def test_moving_to_another_device_keeps_ghosts_small_and_groups_fused():
    model, _ = transformed("llama", layers=1)
    model.to("meta")
    gate, up = (model.get_submodule(f"model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
    assert {t.device.type for t in _tensors(model)} == {"meta"}
    assert gate.weight.stride() == (0, 0)
    assert gate.fused_packed.shape[0] == gate.weight_packed.shape[0] + up.weight_packed.shape[0]


def test_save_pretrained_of_a_model_without_adapters_names_the_exporters():
    model, _ = transformed("llama", {"quantize": [{"match": ".*_proj"}]}, layers=1)
    with pytest.raises(ModelError, match=r"qerl_compile.export"):
        model.save_pretrained("anywhere")


def test_a_packed_module_called_by_itself_raises_and_names_itself():
    model, _ = transformed("llama", layers=1)
    with pytest.raises(GraphError, match=r"model\.layers\.0\.mlp\.up_proj"):
        model.get_submodule("model.layers.0.mlp.up_proj")(torch.zeros(1, 64))


def test_recompute_keeps_gradients_and_is_what_gradient_checkpointing_switches_on():
    model, _ = transformed("llama", inner="aot_eager")
    loss = model(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean()
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    saved = _saved_bytes(model)
    model.gradient_checkpointing_enable()
    model.zero_grad()
    assert _saved_bytes(model) < 0.6 * saved
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-5, atol=1e-8)


def test_recompute_is_switched_on_by_the_recipe(tmp_path):
    recipe = Recipe.named("nvfp4-lora")
    saving = recipe.with_overrides(["train.recompute=true"])
    plain, saver = (transform(tiny_model("llama"), each, inner="aot_eager") for each in (recipe, saving))
    assert _saved_bytes(saver) < 0.6 * _saved_bytes(plain)
    tiny_model("llama", layers=1).save_pretrained(tmp_path)
    assert [load(tmp_path, each, inner="eager").qerl.recompute for each in (recipe, saving)] == [False, True]


def test_a_device_that_is_not_there_is_refused_before_loading(tmp_path):
    tiny_model("llama", layers=1).save_pretrained(tmp_path)
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ModelError, match=f"device: expected a device that torch can use here; got '{device}'"):
            load(tmp_path, None, device=device)


def _saved_bytes(model):
    """Bytes that autograd keeps between forward and backward, weights excluded."""
    kept, weights = {}, {t.untyped_storage().data_ptr() for t in _tensors(model)}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean()
    loss.backward()
    return sum(kept.values())


def test_layers_with_different_rules_do_not_share_a_graph():
    recipe = {
        "quantize": [{"match": r"model\.layers\.0\..*_proj"}],
        "lora": [
            {"match": r"model\.layers\.0\..*q_proj", "rank": 4},
            {"match": r"model\.layers\.1\..*q_proj", "rank": 8},
        ],
        "noise": {"match": r"model\.layers\.1\..*"},
    }
    model = tiny_model("llama")
    oracle = dequantized_oracle(model, make_plan(model, Recipe.resolve(recipe)))
    model = transform(model, recipe, inner="eager")
    assert (model(input_ids=TOKENS_BT, use_cache=False).logits - oracle(input_ids=TOKENS_BT).logits).abs().max() <= 1e-5
    assert len(model.qerl.compilers) == 2
    assert resample_noise(model, 0.1)[0] == 2


def test_an_untied_head_can_be_packed_as_a_region_of_its_own():
    recipe = {"quantize": [{"match": "lm_head"}]}
    model = tiny_model("llama", layers=1)
    oracle = dequantized_oracle(model, make_plan(model, Recipe.resolve(recipe)))
    model = transform(model, recipe, inner="eager")
    assert (model(input_ids=TOKENS_BT, use_cache=False).logits - oracle(input_ids=TOKENS_BT).logits).abs().max() <= 1e-5


def test_refusals_leave_the_model_untouched():
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight[3, 5] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.down_proj"):
        transform(model, "qerl-nvfp4-aqn")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model, "qerl")
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"quantize": [{"match": "model.layer.0.mlp.up_proj"}]}, r"quantize\[0\]\.match.*'model.layers.0.mlp.up_proj'"),
        ({"quantize": [{"match": ".*_proj"}, {"match": ".*up_proj"}]}, r"quantize\[1\].*earlier rule"),
        ({"lora": [{"match": "nothing"}]}, r"lora\[0\]\.match"),
        ({"noise": {"match": "model.norm"}}, r"noise\.match"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_says_where(recipe, message):
    with pytest.raises(RecipeError, match=message):
        transform(tiny_model("llama", layers=1), recipe)


def test_columns_that_are_no_multiple_of_16_are_refused_by_name():
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.down_proj.*\[64, 120\].*format: none"):
        transform(tiny_model("llama", layers=1, intermediate_size=120), "nvfp4-lora")


def test_a_tied_head_cannot_be_packed():
    with pytest.raises(RecipeError, match=r"lm_head.*tied to model\.embed_tokens"):
        transform(tiny_model("llama", layers=1, tie_word_embeddings=True), {"quantize": [{"match": "lm_head"}]})


def test_what_is_no_dense_model_in_memory_is_refused():
    with pytest.raises(ModelError, match="PreTrainedModel"):
        transform(torch.nn.Linear(16, 16), "nvfp4-lora")
    model, _ = transformed("llama", layers=1)
    with pytest.raises(ModelError, match="transformed already"):
        transform(model, "nvfp4-lora")
    with torch.device("meta"):
        empty = tiny_model.__globals__["tiny_model"]("llama", layers=1)
    with pytest.raises(ModelError, match="meta device"):
        transform(empty, "nvfp4-lora")
    with pytest.raises(RecipeError, match="inductor, aot_eager, eager"):
        transform(tiny_model("llama", layers=1), "nvfp4-lora", inner="induktor")
    with pytest.raises(ModelError, match="'regional' or 'whole'"):
        transform(tiny_model("llama", layers=1), "nvfp4-lora", decode="hole")
