"""Rollout graphs of whole models: equal to training graphs, fed in place, and what a model is afterwards."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from qerl_compile.errors import GraphError, ModelError
from qerl_compile.exporters import export
from qerl_compile.graph import LINEAR
from qerl_compile.stacked_adapters import attach_stacked_adapters, refresh_stacked_adapters
from qerl_compile.transforming import resample_noise, transform
from tests.models import SOME_FAMILIES, tiny_model
from tests.pages import Pages

TOKENS_BT = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
PROJ = r"model\.layers\.\d+\..*"
QUANTIZE = [{"match": rf"{PROJ}_proj"}]
MIXED = [
    {"match": rf"{PROJ}q_proj", "rank": 3, "alpha": 7.0},
    {"match": rf"{PROJ}(v|up|down)_proj", "rank": 5, "alpha": 2.0},
    {"match": rf"{PROJ}o_proj", "rank": 20, "alpha": 20.0},
]  # k and gate have none
RECIPES = {
    "nvfp4": "qerl-nvfp4-aqn",
    "bf16": "bf16-lora-aqn",
    "nvfp4 mixed": {"quantize": QUANTIZE, "lora": MIXED},
    "bf16 mixed": {"lora": MIXED},
    "half": {"quantize": [{"match": rf"{PROJ}(q|gate|up)_proj"}], "lora": MIXED},  # k/v is a dense group
    "no adapters": {"quantize": QUANTIZE},
}


def trained(family="llama", recipe="qerl-nvfp4-aqn", inner="eager", **options):
    """A transformed model with adapters that do something, and noise."""
    model = transform(tiny_model(family, **options), recipe, inner=inner)
    train(model, 1)
    resample_noise(model, 0.05, torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def train(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1, generator=generator)


def train_logits(model, tokens=TOKENS_BT):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def rollout_logits(model, tokens=TOKENS_BT):
    return model(input_ids=tokens, use_cache=False, qerl_cache=Pages(len(tokens))).logits


def graphs(model):
    return [compiler.graphs for compiler in model.qerl.compilers]


CASES = [
    *((family, "nvfp4", "eager") for family in SOME_FAMILIES),
    *((family, "bf16", "aot_eager") for family in SOME_FAMILIES),
    ("qwen2", "nvfp4", "aot_eager"),
    ("qwen2", "bf16", "eager"),
    *(("qwen2", recipe, "eager") for recipe in ("nvfp4 mixed", "bf16 mixed", "half", "no adapters")),
]


@pytest.mark.parametrize("family, recipe, inner", CASES)
def test_a_rollout_graph_computes_what_the_training_graph_computes(family, recipe, inner):
    model = trained(family, RECIPES[recipe], inner)
    plain = transform(tiny_model(family), RECIPES[recipe], inner="eager")
    refresh_stacked_adapters(model)
    want, got = train_logits(model), rollout_logits(model)
    assert (got - want).abs().max() <= 1e-5
    if recipe != "no adapters":
        assert (want - train_logits(plain)).abs().max() > 1e-2  # adapters matter
    assert not got.requires_grad


def test_a_rollout_graph_computes_the_same_under_inductor():
    model = trained("qwen2", RECIPES["half"], "inductor", layers=1)
    refresh_stacked_adapters(model)
    assert (rollout_logits(model) - train_logits(model)).abs().max() <= 1e-5


def test_bf16_differs_by_rounding_only():
    model = trained("qwen2", dtype=torch.bfloat16)
    refresh_stacked_adapters(model)
    want = train_logits(model).float()
    assert (rollout_logits(model).float() - want).abs().max() <= 0.03 * want.abs().max()
    assert model.model.layers[0].self_attn.q_proj.stacked_lora_A.dtype == torch.bfloat16


class Watch:
    """A last pass that counts what a graph calls."""

    def __call__(self, program):
        self.calls = Counter(node.target for node in program.graph.nodes if node.op == "call_function")

    def gemms(self):
        qerl = torch.ops.qerl
        names = (qerl.quantized_linear, qerl.adapted_linear, qerl.adapted_dense_linear)
        return [self.calls[LINEAR], *(self.calls[name.default] for name in names)]


PRODUCTS = {
    "nvfp4": ([14, 4, 0, 0], [0, 0, 4, 0]),
    "bf16": ([21, 0, 0, 0], [0, 0, 0, 4]),
    "nvfp4 mixed": ([10, 4, 0, 0], [0, 0, 4, 0]),
    "half": ([14, 2, 0, 0], [0, 0, 2, 3]),  # q, gate/up; k/v, o, down
    "no adapters": ([0, 4, 0, 0], [0, 4, 0, 0]),
}


@pytest.mark.parametrize(
    "family, recipe",
    [
        *((family, "nvfp4") for family in SOME_FAMILIES),
        *(("qwen2", recipe) for recipe in PRODUCTS if recipe != "nvfp4"),
    ],
)
def test_products_per_layer_before_and_after(family, recipe):
    """linear, quantized_linear, adapted_linear, adapted_dense_linear: 14 LoRA products and 4 become 4 calls."""
    model = trained(family, RECIPES[recipe], layers=1)
    refresh_stacked_adapters(model)
    found = []
    for call in (train_logits, rollout_logits):
        watch = Watch()
        kind = model.model.layers[0]._compiled_call_impl.graphs
        _ = kind.rollout
        for compiler in model.qerl.compilers:
            compiler.passes = [*compiler.passes, watch]
        call(model)
        found.append(watch.gemms())
        if call is rollout_logits:
            assert watch.calls[torch.cat] == 2  # rotary embedding of q and k; no weights, no biases
    assert found == list(PRODUCTS[recipe])


def test_adapters_and_noise_change_in_place_without_new_graphs():
    model = trained("qwen2")
    assert refresh_stacked_adapters(model)
    buffers = {name: tensor.data_ptr() for name, tensor in model.named_buffers()}
    first = rollout_logits(model)
    count = graphs(model)
    train(model, 2)
    assert torch.equal(rollout_logits(model), first)  # not before they are refreshed
    assert not refresh_stacked_adapters(model)
    second = rollout_logits(model)
    assert (second - first).abs().max() > 1e-2
    resample_noise(model, 0.0)
    third = rollout_logits(model)
    assert (third - second).abs().max() > 1e-3
    assert {name: tensor.data_ptr() for name, tensor in model.named_buffers()} == buffers
    assert graphs(model) == count
    assert (third - train_logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
def test_graphs_do_not_grow_with_depth_or_batch_size(recipe):
    counts = []
    for layers in (2, 4):
        model = trained("llama", RECIPES[recipe], layers=layers)
        refresh_stacked_adapters(model)
        for rows, columns in ((3, 11), (2, 5), (5, 7), (4, 11)):  # prefill
            rollout_logits(model, TOKENS_BT[:1].repeat(rows, 1)[:, :columns])
        for rows in (2, 5, 3, 8):  # decode
            rollout_logits(model, TOKENS_BT[:1, :1].repeat(rows, 1))
        counts.append(graphs(model))
    assert counts == [[0, 2], [0, 2]]  # one for prefill, one for decode; none for training


def test_every_layer_reads_its_own_stacked_factors():
    model = trained(layers=3)
    refresh_stacked_adapters(model)
    before, seen = rollout_logits(model), set()
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            kept = module.stacked_lora_B.clone()
            module.stacked_lora_B.zero_()
            seen.add(round((rollout_logits(model) - before).abs().max().item(), 6))
            module.stacked_lora_B.copy_(kept)
    assert len(seen) == 12
    assert min(seen) > 1e-4


def test_each_layer_is_handed_its_own_pages():
    model = trained(layers=3)
    refresh_stacked_adapters(model)
    pages = Pages(3)
    model(input_ids=TOKENS_BT, use_cache=False, qerl_cache=pages)
    assert pages.asked == [0, 1, 2]


def test_training_is_untouched_by_a_rollout():
    want = trained("qwen2", "bf16-lora-aqn")
    model = trained("qwen2", "bf16-lora-aqn")
    refresh_stacked_adapters(model)
    rollout_logits(model)
    for one in (want, model):
        one(input_ids=TOKENS_BT, use_cache=False).logits.logsumexp(-1).mean().backward()
    for (name, p), (_, q) in zip(want.named_parameters(), model.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name
    rollout_logits(model)


def test_a_rollout_without_buffers_says_what_to_call():
    model = trained(layers=1)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="refresh_stacked_adapters") as fault:
        rollout_logits(model)
    assert isinstance(fault.value.inner_exception, GraphError)


def test_an_ordinary_model_is_refused():
    with pytest.raises(ModelError, match=r"qerl_compile\.transform"):
        refresh_stacked_adapters(nn.Linear(2, 2))


def test_attaching_leaves_factors_zero_and_is_done_once():
    model = trained(layers=1)
    assert attach_stacked_adapters(model)
    assert not attach_stacked_adapters(model)
    assert not model.model.layers[0].mlp.down_proj.stacked_lora_A.any()


@pytest.mark.parametrize("recipe", ["nvfp4", "bf16", "half"])
def test_the_state_dict_is_what_they_were(recipe):
    model = trained("qwen2", RECIPES[recipe])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refresh_stacked_adapters(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(_bytes(after[name]), _bytes(before[name])) for name in before)


ATTENTION_ONLY = {"quantize": [{"match": rf"{PROJ}self_attn.*"}], "lora": MIXED}  # gate/up is a dense group


@pytest.mark.parametrize("recipe, target", [(ATTENTION_ONLY, "vllm"), (RECIPES["bf16"], "peft")])
def test_exports_after_a_rollout_are_those_before(recipe, target, tmp_path):
    model = trained("qwen2", recipe, layers=1)
    export(model, tmp_path / "before", target=target)
    refresh_stacked_adapters(model)
    export(model, tmp_path / "after", target=target)
    files = sorted(file.name for file in (tmp_path / "before").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def _bytes(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("recipe", ["bf16", "half"])
def test_dense_groups_take_no_further_memory(recipe):
    model = trained("qwen2", RECIPES[recipe])
    plan = model.qerl.plan
    before = _storage_bytes(model)
    refresh_stacked_adapters(model)
    stacked = sum(t.nbytes for name, t in model.named_buffers() if "stacked_lora" in name)
    assert _storage_bytes(model) == before + stacked
    for group in plan.dense_groups:
        storages = {model.get_submodule(path).weight.untyped_storage().data_ptr() for path in group}
        assert len(storages) == 1
    assert len(plan.dense_groups) == 2 * (2 if recipe == "bf16" else 1)


def _storage_bytes(model):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(storages.values())


def _tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("recipe", ["nvfp4", "half"])
def test_a_deep_copy_is_independent_and_makes_its_own_buffers(recipe):
    model = trained("qwen2", RECIPES[recipe])
    refresh_stacked_adapters(model)
    want = rollout_logits(model)
    twin = copy.deepcopy(model)
    assert {t.data_ptr() for t in _tensors(twin)}.isdisjoint({t.data_ptr() for t in _tensors(model)})
    assert not any("stacked_lora" in name or "fused_weight" in name for name, _ in twin.named_buffers())
    refresh_stacked_adapters(twin)
    train(twin, 9)
    with torch.no_grad():
        for module in (twin.model.layers[0].mlp.down_proj, twin.model.layers[1].self_attn.o_proj):
            held = module.weight_packed if hasattr(module, "weight_packed") else module.weight
            held.zero_()
    refresh_stacked_adapters(twin)
    assert (rollout_logits(twin) - train_logits(twin)).abs().max() <= 1e-5
    assert not torch.equal(rollout_logits(twin), want)
    refresh_stacked_adapters(model)
    assert torch.equal(rollout_logits(model), want)


@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
def test_a_move_drops_the_buffers_and_the_next_rollout_makes_them(recipe):
    model = trained("llama", RECIPES[recipe], layers=1)
    refresh_stacked_adapters(model)
    model.to("meta")
    assert {t.device.type for t in _tensors(model)} == {"meta"}
    assert not any("stacked_lora" in name or "fused_weight" in name for name, _ in model.named_buffers())
    assert refresh_stacked_adapters(model)
    assert not refresh_stacked_adapters(model)
    assert any("stacked_lora_A" in name for name, _ in model.named_buffers())


def test_loaded_weights_reach_a_dense_group_and_replaced_ones_are_laid_together_again():
    source, model = trained("llama", "bf16-lora", seed=4), trained("llama", "bf16-lora")
    refresh_stacked_adapters(model)
    model.load_state_dict(source.state_dict())
    assert not refresh_stacked_adapters(model)
    assert (rollout_logits(model) - train_logits(source)).abs().max() <= 1e-5
    up = model.model.layers[1].mlp.up_proj
    up.weight.data = torch.zeros_like(up.weight)  # no longer a slice
    assert refresh_stacked_adapters(model)
    assert (rollout_logits(model) - train_logits(model)).abs().max() <= 1e-5


def test_weights_that_layers_share_stay_out_of_dense_groups():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    model = transform(model, {"lora": [{"match": rf"{PROJ}(o|up)_proj", "rank": 4}]}, inner="eager")
    attention = tuple(tuple(f"model.layers.{i}.self_attn.{name}_proj" for name in "qkv") for i in range(2))
    assert model.qerl.plan.dense_groups == attention
    train(model, 1)
    refresh_stacked_adapters(model)
    assert (rollout_logits(model) - train_logits(model)).abs().max() <= 1e-5


def test_refreshing_in_inference_mode_makes_buffers_that_can_be_refreshed_outside():
    model = trained(layers=1)
    with torch.inference_mode():
        refresh_stacked_adapters(model)
        inside = rollout_logits(model)
    train(model, 3)
    refresh_stacked_adapters(model)
    assert (rollout_logits(model) - train_logits(model)).abs().max() <= 1e-5
    assert not torch.equal(inside, rollout_logits(model))
