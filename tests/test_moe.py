"""Mixtures of experts end to end: packed stacks against a dense oracle, files with one tensor per expert, rollouts."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qerl_compile
from qerl_compile.errors import CheckpointError, ExportError, FormatError, GraphError, ModelError, RecipeError
from qerl_compile.expert_stacks import expert_stacks
from qerl_compile.exporters.onnx import export_onnx
from qerl_compile.exporters.verify.layers import layer_qualities
from qerl_compile.formats.nvfp4 import dequantize
from qerl_compile.inspection import layer_stages
from qerl_compile.loading import empty_model
from qerl_compile.passes.experts import packed_stack_of
from qerl_compile.passes.quantize import packed_of
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.rl.rollout.types import Sampling
from tests.models import LONG, SIZES, tiny_mixture

IDS = torch.tensor([[5, 9, 17, 33, 2, 8, 99], [7, 100, 3, 4, 60, 61, 62]])
RECIPE = "qerl-nvfp4-aqn"
ATTENTION = r".*self_attn\.\w+_proj"
EXPERTS = r".*\.experts\.\d+\.\w+_proj"
STACKS = [f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (0, 1) for leaf in ("gate_up_proj", "down_proj")]


def oracle_of(model, dense):
    """A plain copy of `dense` with the values that `model` has packed."""
    oracle = copy.deepcopy(dense)
    for path in model.qerl.plan.quantize:
        weight = oracle.get_submodule(path).weight
        weight.data = dequantize(packed_of(model.get_submodule(path)), weight.dtype)
    for name, (stack, _) in model.qerl.plan.experts.items():
        held = packed_stack_of(model.get_submodule(stack.module), stack.leaf)
        whole = oracle.get_parameter(name)
        for place in stack.places.values():
            part = held.part(place.expert, place.rows.start // stack.part_rows)
            whole.data[place.expert, place.rows] = dequantize(part, whole.dtype)
    return oracle


@pytest.fixture(scope="module")
def dense():
    return tiny_mixture()


@pytest.fixture(scope="module")
def model(dense):
    return qerl_compile.transform(copy.deepcopy(dense), RECIPE, inner="eager")


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory):
    """The dense model as transformers writes it: one tensor per expert and projection."""
    directory = tmp_path_factory.mktemp("mixture") / "dense"
    dense.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def attention_only(dense):
    rules = [{"match": EXPERTS, "format": "none"}, {"match": r".*_proj", "format": "nvfp4"}]
    recipe = {"version": 1, "name": "a", "quantize": rules}
    return qerl_compile.transform(copy.deepcopy(dense), recipe, inner="eager")


def assert_same_experts(one, other):
    assert list(one.qerl.plan.experts) == list(other.qerl.plan.experts) == STACKS
    for stack, _ in one.qerl.plan.experts.values():
        held = [packed_stack_of(each.get_submodule(stack.module), stack.leaf) for each in (one, other)]
        assert torch.equal(*(each.codes_ENK2 for each in held))
        assert torch.equal(*(each.block_decode_scale_ENG.view(torch.uint8) for each in held))
        decode = [each.get_submodule(stack.module).get_buffer(f"{stack.leaf}_decode_scale") for each in (one, other)]
        assert torch.allclose(*decode, rtol=1e-6)  # a divisor that went through a multiplier may be one bit off


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# Packed


def test_names_of_experts_are_those_that_transformers_writes(dense, saved):
    stacks = expert_stacks(dense)
    assert list(stacks) == STACKS
    assert stacks[STACKS[0]].members[3] == (
        "model.layers.0.mlp.experts.3.gate_proj",
        "model.layers.0.mlp.experts.3.up_proj",
    )
    with safe_open(saved / "model.safetensors", "pt") as file:
        for name, stack in stacks.items():
            for path, place in stack.places.items():
                assert torch.equal(
                    file.get_tensor(f"{path}.weight"), dense.get_parameter(name)[place.expert, place.rows]
                )


def test_all_experts_are_packed_and_the_router_is_not(model):
    plan = model.qerl.plan
    assert list(plan.experts) == STACKS
    assert len(plan.quantize) == 8  # q, k, v and o of two layers
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert plan.noise == ("model.layers.0.input_layernorm", "model.layers.1.input_layernorm")
    assert all("self_attn" in path for path in plan.lora)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_logits_are_those_of_the_dequantized_model(model, dense, dtype, tolerance):
    """In bfloat16 the graph has torch's grouped product, in float32 the stand-in of transformers."""
    plain, packed = dense, model
    if dtype != torch.float32:
        plain = tiny_mixture(dtype)
        packed = qerl_compile.transform(copy.deepcopy(plain), RECIPE, inner="eager")
    wanted = logits(oracle_of(packed, plain)).float()
    assert (logits(packed).float() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (logits(plain).float() - wanted).abs().max() > 3 * tolerance * wanted.abs().max()  # rounding shows
    assert packed.qerl.compilers[0].graphs == 1


def test_gate_and_up_of_an_expert_share_a_scale_and_experts_do_not(model):
    scalars = model.model.layers[0].mlp.experts.gate_up_proj_global_scale
    assert scalars.shape == (4, 2)
    assert torch.equal(scalars[:, 0], scalars[:, 1])
    assert len(set(scalars[:, 0].tolist())) > 1
    assert model.model.layers[0].mlp.experts.gate_up_proj_decode_scale.shape == (4, 1)


def test_gradients_of_adapters_are_those_through_the_dequantized_experts(model, dense):
    """The oracle is the same model with its experts dense, at dequantized values: adapters as they are."""
    rule = {"match": ATTENTION, "format": "nvfp4"}
    recipe = Recipe.named(RECIPE).model_dump() | {"quantize": [rule], "lora": [{"match": ATTENTION, "rank": 4}]}
    packed_recipe = recipe | {"quantize": [rule, {"match": EXPERTS, "format": "nvfp4"}]}
    mine = qerl_compile.transform(copy.deepcopy(dense), packed_recipe, inner="eager")
    plain = qerl_compile.transform(oracle_of(mine, dense), recipe, inner="eager")
    for each in (mine, plain):
        generator = torch.Generator().manual_seed(3)
        for name, parameter in each.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.normal_(std=0.1, generator=generator)
        each(IDS).logits.logsumexp(-1).sum().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys() and len(found) == 16
    for name, grad in found.items():
        assert grad.isfinite().all()
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_the_packed_model_holds_no_dense_expert(model):
    experts = model.model.layers[0].mlp.experts
    assert set(experts._parameters) == {
        f"{leaf}_{own}" for leaf in ("gate_up_proj", "down_proj") for own in ("packed", "scale")
    }
    assert experts.gate_up_proj.isnan().all()
    assert experts.gate_up_proj.untyped_storage().nbytes() == 64 * 64 * 4  # one matrix for all experts of all layers
    other = model.model.layers[1].mlp.experts.gate_up_proj
    assert experts.gate_up_proj.data_ptr() == other.data_ptr()
    assert not [name for name in model.state_dict() if name in STACKS]


def test_experts_called_outside_a_graph_are_refused(model):
    with pytest.raises(GraphError, match=r"layers\.0\.mlp\.experts: expected a call from inside a rewritten graph"):
        model.model.layers[0].mlp.experts(torch.ones(1, 64), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))


def test_a_copy_computes_the_same_and_a_loaded_state_is_taken_over(model, dense):
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    changed = {name: t.clone() for name, t in model.state_dict().items()}
    for name in changed:
        if name.endswith("down_proj_global_scale"):
            changed[name] *= 2  # halves what experts give
    twin.load_state_dict(changed)
    halved = oracle_of(twin, dense)
    assert torch.allclose(logits(twin), logits(halved), atol=1e-5)
    assert not torch.allclose(logits(twin), logits(model), atol=1e-3)


# Recipes


def test_experts_can_be_left_dense(attention_only, dense):
    assert not attention_only.qerl.plan.experts
    assert torch.allclose(logits(attention_only), logits(oracle_of(attention_only, dense)), atol=1e-5)


@pytest.mark.parametrize(
    "rules, message",
    [
        (
            [{"match": r".*\.experts\.0\.\w+_proj", "format": "nvfp4"}],
            r"quantize: .*experts\.1\.\w+_proj: expected one treatment",
        ),
        (
            [{"match": EXPERTS, "weights": "trained"}],
            r"experts that are frozen and rounded to nearest; got weights trained",
        ),
        ([{"match": r".*\.experts\.9\.\w+_proj", "format": "nvfp4"}], r"matches none of \d+ modules"),
    ],
    ids=["one expert", "trained", "no such expert"],
)
def test_rules_that_an_operator_cannot_follow_are_refused(dense, rules, message):
    with pytest.raises(RecipeError, match=message):
        make_plan(dense, Recipe.resolve({"version": 1, "name": "a", "quantize": rules}))


def test_columns_that_are_no_multiple_of_the_block_are_refused():
    model = tiny_mixture(moe_intermediate_size=24, num_hidden_layers=1)
    with pytest.raises(FormatError, match=r"experts\.0\.down_proj: expected in_features to be a multiple of 16"):
        make_plan(model, Recipe.named(RECIPE))


def test_the_loop_over_experts_is_refused_with_the_remedy():
    model = tiny_mixture(num_hidden_layers=1)
    model.set_experts_implementation("eager")
    with pytest.raises(GraphError, match=r"Build it with experts_implementation='grouped_mm'"):
        make_plan(model, Recipe.named(RECIPE))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_without_names_of_their_own_stay_dense_and_that_is_said(family):
    """Mixtral's files rename the router as well; GPT-OSS stores [E, K, N] and has one tensor in files too."""
    config, model_class = (getattr(transformers, f"{family}{kind}") for kind in ("Config", "ForCausalLM"))
    sizes = {**SIZES, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    with torch.device("meta"):
        model = model_class(config(**sizes, num_experts_per_tok=2))
    with pytest.warns(UserWarning, match=r"2 stacks of experts stay dense, such as model\.layers\.0\.mlp\.experts\."):
        plan = make_plan(model, Recipe.named(RECIPE))
    assert not plan.experts
    assert len(plan.quantize) == 4


def test_noise_stays_off_a_norm_that_router_and_shared_experts_read():
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 1, "first_k_dense_replace": 0},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
        **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    )
    with torch.device("meta"):
        plan = make_plan(transformers.DeepseekV3ForCausalLM(config), Recipe.named(RECIPE))
    assert len(plan.experts) == 2
    assert "model.layers.0.mlp.shared_experts.gate_proj" in plan.quantize
    assert plan.noise == ("model.layers.0.input_layernorm", "model.layers.0.self_attn.q_a_layernorm")


def test_the_kernel_of_a_convolution_is_not_taken_for_experts():
    with torch.device("meta"):
        model = transformers.Lfm2ForCausalLM(
            transformers.Lfm2Config(**{**SIZES, "num_hidden_layers": 1, "layer_types": ["conv"]})
        )
    assert model.model.layers[0].conv.conv.weight.dim() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(model, Recipe.named(RECIPE)).quantize


def test_nan_in_an_expert_is_refused_before_anything_is_packed(dense):
    broken = copy.deepcopy(dense)
    broken.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("nan")
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts\.down_proj: expected finite"):
        qerl_compile.transform(broken, RECIPE, inner="eager")
    assert broken.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


def test_calibration_refuses_experts(dense):
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj: expected a model whose layers are linears"):
        qerl_compile.calibrate(copy.deepcopy(dense), RECIPE, ["a text"], tokenizer=object())


def test_the_rewritten_graph_names_the_packed_stacks(saved):
    stages = dict(layer_stages(empty_model(saved), Recipe.named(RECIPE)))
    assert list(stages) == ["capture", "noise", "lora", "fuse", "quantize", "experts"]
    lines = [line for line in stages["experts"].splitlines() if "qerl.grouped_quantized_linear(" in line]
    assert len(lines) == 2
    assert "model_layers_0_mlp_experts_gate_up_proj_packed" in lines[0]
    assert "grouped_mm" not in stages["experts"]


# Files


def test_a_dense_checkpoint_loads_dense_or_packed(saved, dense, model):
    plain = qerl_compile.load(saved, inner="eager").state_dict()
    assert plain.keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in dense.state_dict().items())
    assert_same_experts(qerl_compile.load(saved, RECIPE, inner="eager"), model)


def test_a_checkpoint_with_stacked_experts_loads_too(saved, dense, model, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    save_file({name: t.contiguous() for name, t in dense.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same_experts(qerl_compile.load(tmp_path, RECIPE, inner="eager"), model)


@pytest.mark.parametrize("target", ["vllm", "tensorrt-llm", *(["transformers"] if LONG else [])])
def test_an_export_names_every_expert_and_loads_back_bit_for_bit(model, target, tmp_path):
    qerl_compile.export(model, tmp_path / "out", target=target)
    tensors = load_file(tmp_path / "out/model.safetensors")
    codes, scalar = (
        ("weight", "weight_scale_2") if target == "tensorrt-llm" else ("weight_packed", "weight_global_scale")
    )
    expert = "model.layers.1.mlp.experts.3"
    held = packed_stack_of(model.model.layers[1].mlp.experts, "gate_up_proj").part(3, 1)
    assert torch.equal(tensors[f"{expert}.up_proj.{codes}"], held.codes_NK2)
    assert tensors[f"{expert}.up_proj.{scalar}"].item() == tensors[f"{expert}.gate_proj.{scalar}"].item()
    assert not [name for name in tensors if name.startswith(tuple(STACKS))]
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= set(ignored)
    again = qerl_compile.load(tmp_path / "out", dtype=torch.float32, inner="eager")
    assert_same_experts(again, model)
    with pytest.raises(RecipeError, match=r"experts\.0\.\w+_proj: expected a full-precision weight to train"):
        rules = [{"match": EXPERTS, "weights": "trained"}]
        qerl_compile.load(tmp_path / "out", {"version": 1, "name": "a", "quantize": rules}, inner="eager")
    if target == "vllm":
        assert torch.allclose(logits(again), logits(model), atol=0.02)  # embeddings and router went through bf16


def test_the_worst_matrix_of_a_stack_is_what_verification_tells_of(model, dense):
    """Of a copy that differs in one expert, and of full weights, as a merge writes them."""
    changed, full = copy.deepcopy(model), oracle_of(model, dense)
    changed.model.layers[1].mlp.experts.down_proj_packed.data[2, :, 0] ^= 0x88
    full.model.layers[0].mlp.experts.gate_up_proj.data[3, -1] *= 1.5
    for exported, merged, bits, worse in ((changed, False, [True, False], 3), (full, True, [None, None], 0)):
        found = {each.path: each for each in layer_qualities(exported, model, merged=merged, original=None)}
        assert [found[name].same_bits for name in (STACKS[0], STACKS[3])] == bits
        assert [found[name].sqnr_db < 40 for name in STACKS] == [index == worse for index in range(4)]


def test_experts_that_stay_dense_are_exported_one_by_one_and_listed(attention_only, dense, tmp_path):
    qerl_compile.export(attention_only, tmp_path / "out", target="vllm")
    tensors = load_file(tmp_path / "out/model.safetensors")
    path = "model.layers.0.mlp.experts.1.down_proj"
    assert torch.equal(tensors[f"{path}.weight"], dense.model.layers[0].mlp.experts.down_proj[1].bfloat16())
    assert path in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]


def test_from_pretrained_packs_experts_that_the_file_has_dense(attention_only, tmp_path):
    qerl_compile.export(attention_only, tmp_path / "out", target="transformers")
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=qerl_compile.QerlNVFP4HfConfig(RECIPE, inner="eager")
    )
    assert_same_experts(opened, qerl_compile.load(tmp_path / "out", RECIPE, inner="eager"))


def test_packed_experts_are_refused_where_nobody_can_read_them(model, tmp_path):
    qerl_compile.export(model, tmp_path / "out", target="transformers")
    with pytest.raises(ModelError, match=r"packed linears, for from_pretrained; got packed experts"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ExportError, match=r"experts\.gate_up_proj: expected linears"):
        export_onnx(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_gate_and_up_with_unequal_scales_are_decoded_each_with_its_own(model, tmp_path):
    """As other writers may have it. Engines would compute wrongly, so it is read, and not exported for them."""
    qerl_compile.export(model, tmp_path / "out", target="vllm")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in tensors:
        if name.endswith("up_proj.weight_global_scale"):
            tensors[name] = tensors[name] * 2
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    unequal = qerl_compile.load(tmp_path / "out", dtype=torch.float32, inner="eager")
    assert unequal.model.layers[0].mlp.experts.gate_up_proj_decode_scale.shape == (4, 2)
    base = tiny_mixture()
    for name, parameter in base.named_parameters():
        if name not in unequal.qerl.plan.experts and name.removesuffix(".weight") not in unequal.qerl.plan.quantize:
            parameter.data = unequal.get_parameter(name).data  # went through bf16
    assert torch.allclose(logits(unequal), logits(oracle_of(unequal, base)), atol=1e-5)
    with pytest.raises(ExportError, match="one global scale for linears that engines fuse"):
        qerl_compile.export(unequal, tmp_path / "again", target="vllm")


def test_a_checkpoint_with_only_some_experts_packed_is_refused(model, saved, tmp_path):
    qerl_compile.export(model, tmp_path / "out", target="vllm")
    tensors, path = load_file(tmp_path / "out/model.safetensors"), "model.layers.0.mlp.experts.2.down_proj"
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
        del tensors[f"{path}.{leaf}"]
    tensors[f"{path}.weight"] = load_file(saved / "model.safetensors")[f"{path}.weight"].bfloat16()
    save_file(tensors, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"experts\.down_proj: expected the experts of a layer all packed .* got 3 of 4"
    ):
        qerl_compile.load(tmp_path / "out", inner="eager")


def test_a_missing_expert_is_named(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: 'model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight'"):
        qerl_compile.load(tmp_path, RECIPE, inner="eager")


def test_a_dense_merge_names_every_expert_and_decodes_it(model, tmp_path):
    from qerl_compile.exporters.merging.dense import DenseMerge

    merge = DenseMerge(model, None)
    held = packed_stack_of(model.model.layers[0].mlp.experts, "gate_up_proj").part(2, 0)
    wanted = dequantize(held, torch.float32).bfloat16()
    assert torch.equal(merge.tensor("model.layers.0.mlp.experts.2.gate_proj.weight"), wanted)
    assert merge.shapes["model.layers.0.mlp.experts.2.down_proj.weight"] == (64, 32)
    assert not set(STACKS) & set(merge.shapes)


# Rollouts


def test_rollouts_sample_what_the_dequantized_model_samples(model, dense):
    found = PagedSampler(model, rows=3, page_tokens=4).generate([(5, 9, 17, 33), (7,)], 1, Sampling(6, (), 0, 0.0))
    oracle = oracle_of(model, dense)
    for rollout, prompt in zip(found.rollouts, [(5, 9, 17, 33), (7,)], strict=True):
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert list(rollout.completion_ids) == tokens[len(prompt) :]
