"""Adapters as PEFT files: PEFT computes what a manual merge gives, and reading them back gives the same factors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qerl_compile.adapter_files import adapter_tensors, adapters_of, norm_name, trained_norms_of, write_adapter
from qerl_compile.adapter_reading import read_adapter
from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.exporters import export
from qerl_compile.passes import TrainedNorms

SITES = {
    "uniform": dict.fromkeys(("q_proj", "v_proj", "down_proj"), (4, 8)),
    "ranks and alphas differ": {"q_proj": (4, 8), "down_proj": (2, 8), "model.layers.1.mlp.up_proj": (4, 3.5)},
    "one module of many": {"model.layers.1.self_attn.k_proj": (3, 6)},
    "head": {"lm_head": (4, 8), "o_proj": (4, 8)},
}


def merged(model: nn.Module, dense: nn.Module) -> nn.Module:
    with torch.no_grad():
        for path, adapter in adapters_of(model).items():
            weight = dense.get_submodule(path).weight
            weight += (adapter.b_NR @ adapter.a_RK * (adapter.alpha / adapter.rank)).to(weight.dtype)
    return dense


def train_norms(model: nn.Module, *ends: str) -> dict[str, nn.Parameter]:
    """Give the norms whose paths end so trained weights away from the base's."""
    generator = torch.Generator().manual_seed(7)
    for path, module in model.named_modules():
        if path.endswith(ends):
            TrainedNorms.state(module, module.weight)
            module.trained_weight.data.add_(0.2 * torch.randn(module.weight.shape, generator=generator))
    return trained_norms_of(model)


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.a_RK.zero_()
            adapter.b_NR.zero_()
    return model


@pytest.fixture
def adapted(state):
    def make(sites: str = "uniform", **kwargs) -> nn.Module:
        model = state.tiny_model("qwen2", dtype=torch.float32, **kwargs)
        state.add_lora(model, SITES[sites])
        return model

    return make


@pytest.mark.parametrize("sites", SITES)
def test_peft_on_the_base_gives_what_a_manual_merge_gives(sites, state, adapted, input_ids_BT, tmp_path):
    from peft import PeftModel

    model, base = adapted(sites), state.tiny_model("qwen2", dtype=torch.float32)
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    expected = merged(model, state.tiny_model("qwen2", dtype=torch.float32))
    with torch.no_grad():
        plain = base(input_ids=input_ids_BT).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(input_ids=input_ids_BT).logits
        ours = expected(input_ids=input_ids_BT).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert (theirs - plain).abs().max() > 1e-3


def test_peft_loads_the_adapter_on_a_bf16_base(state, input_ids_BT, tmp_path):
    from peft import PeftModel

    model, base = state.tiny_model("llama"), state.tiny_model("llama")
    state.pack(model)
    state.add_lora(model, SITES["uniform"])
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    expected = merged(model, state.tiny_model("llama").float())
    with torch.no_grad():
        theirs, ours = peft(input_ids=input_ids_BT).logits, expected(input_ids=input_ids_BT).logits
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=0.05)


@pytest.mark.parametrize("sites", SITES)
def test_reading_gives_back_every_factor_bit_for_bit(sites, adapted, tmp_path):
    model, other = adapted(sites), zeroed(adapted(sites))
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    read_adapter(other, tmp_path / "adapter")
    for path, adapter in adapters_of(model).items():
        assert torch.equal(adapters_of(other)[path].a_RK, adapter.a_RK)
        assert torch.equal(adapters_of(other)[path].b_NR, adapter.b_NR)
        assert adapters_of(other)[path].b_NR.requires_grad


def test_the_files_have_the_names_shapes_and_keys_that_peft_and_vllm_read(adapted, tmp_path):
    write_adapter(adapted(), tmp_path / "adapter", base_name="org/base")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["down_proj", "q_proj", "v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    assert {key: config[key] for key in expected} == expected
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 6
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 96)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (64, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_differing_ranks_and_alphas_go_to_patterns_of_escaped_paths(adapted, tmp_path):
    write_adapter(adapted("ranks and alphas differ"), tmp_path / "adapter", base_name="org/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
        + ["model.layers.1.mlp.up_proj"]
    )
    assert sorted(config["rank_pattern"].items()) == [(rf"model\.layers\.{i}\.mlp\.down_proj", 2) for i in (0, 1)]
    assert config["alpha_pattern"] == {r"model\.layers\.1\.mlp\.up_proj": 3.5}


def test_the_same_adapter_is_the_same_bytes(adapted, tmp_path):
    for name in ("one", "two"):
        write_adapter(adapted("ranks and alphas differ"), tmp_path / name, base_name="org/base")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_an_adapter_made_by_peft_is_read_into_the_same_function(state, adapted, input_ids_BT, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = state.tiny_model("qwen2", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"])
    peft = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
        theirs = peft(input_ids=input_ids_BT).logits
    peft.save_pretrained(tmp_path / "adapter")
    model = adapted()  # rank 4, alpha 8: another scaling than 32 / sqrt(4)
    read_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        ours = merged(model, state.tiny_model("qwen2", dtype=torch.float32))(input_ids=input_ids_BT).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)


def test_a_pattern_with_wildcards_is_matched_as_peft_does(adapted, tmp_path):
    model = adapted()
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    edit_config(tmp_path / "adapter", alpha_pattern={"layers.0.*q_proj": 16, "q_proj": 24, "proj": 99})
    other = adapted()
    read_adapter(other, tmp_path / "adapter")
    for path, adapter in adapters_of(model).items():
        factor = {"model.layers.0.self_attn.q_proj": 2.0, "model.layers.1.self_attn.q_proj": 3.0}.get(path, 1.0)
        assert torch.equal(adapters_of(other)[path].b_NR, adapter.b_NR * factor)


NORMS = {
    "both of every layer": (("layernorm",), ["input_layernorm", "post_attention_layernorm"]),
    "one of every layer": (("input_layernorm",), ["input_layernorm"]),
    "one of one layer": (("1.input_layernorm",), ["model.layers.1.input_layernorm"]),
    "the last, whose name ends those of others": (("model.norm",), ["model.norm"]),
}


@pytest.mark.parametrize("norms", NORMS)
def test_peft_on_the_base_puts_trained_norms_in_their_place(norms, state, adapted, input_ids_BT, tmp_path):
    from peft import PeftModel

    ends, names = NORMS[norms]
    model, base = adapted(), state.tiny_model("qwen2", dtype=torch.float32)
    trained = train_norms(model, *ends)
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"] == names
    expected = merged(model, state.tiny_model("qwen2", dtype=torch.float32))
    without = state.tiny_model("qwen2", dtype=torch.float32)
    with torch.no_grad():
        lora_only = merged(model, without)(input_ids=input_ids_BT).logits
        for path, weight in trained.items():
            expected.get_submodule(path).weight.copy_(weight)
        peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        theirs, ours = peft(input_ids=input_ids_BT).logits, expected(input_ids=input_ids_BT).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
    assert (theirs - lora_only).abs().max() > 1e-2
    held = {name for name, _ in peft.named_parameters() if "modules_to_save" in name}
    assert held == {f"base_model.model.{path}.modules_to_save.default.weight" for path in trained}


def test_peft_rounds_trained_norms_to_the_dtype_of_a_bf16_base(state, input_ids_BT, tmp_path):
    from peft import PeftModel

    model = state.tiny_model("llama")
    state.add_lora(model, SITES["uniform"])
    trained = train_norms(model, "layernorm")
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    peft = PeftModel.from_pretrained(state.tiny_model("llama"), str(tmp_path / "adapter")).eval()
    for path, weight in trained.items():
        held = peft.get_parameter(f"base_model.model.{path}.modules_to_save.default.weight")
        assert torch.equal(held, weight.bfloat16())
    with torch.no_grad():
        assert peft(input_ids=input_ids_BT).logits.isfinite().all()


def test_norms_are_whole_float32_tensors_under_the_names_of_peft_and_read_back_bit_for_bit(adapted, tmp_path):
    model, other = adapted(), zeroed(adapted())
    trained = train_norms(model, "layernorm")
    train_norms(other, "layernorm")
    for weight in trained_norms_of(other).values():
        weight.data.zero_()
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 6 + 4
    for path, weight in trained.items():
        assert norm_name(path) == f"base_model.model.{path}.weight"
        assert tensors[norm_name(path)].dtype == torch.float32
        assert torch.equal(tensors[norm_name(path)], weight)
    read_adapter(other, tmp_path / "adapter")
    for path, weight in trained.items():
        assert torch.equal(trained_norms_of(other)[path], weight)


def test_norms_saved_by_peft_itself_are_read(state, adapted, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = state.tiny_model("qwen2", dtype=torch.float32)
    saved = ["input_layernorm", "post_attention_layernorm"]
    targets = ["q_proj", "v_proj", "down_proj"]
    peft = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=saved))
    with torch.no_grad():
        for index, parameter in enumerate(p for name, p in peft.named_parameters() if "modules_to_save" in name):
            parameter.fill_(index + 1.5)
    peft.save_pretrained(tmp_path / "adapter")
    model = adapted()
    trained = train_norms(model, "layernorm")
    read_adapter(model, tmp_path / "adapter")
    assert [weight.mean().item() for weight in trained.values()] == [1.5, 2.5, 3.5, 4.5]


def test_norms_may_be_left_out_for_engines_that_refuse_them(adapted, tmp_path):
    model = adapted()
    train_norms(model, "layernorm")
    write_adapter(model, tmp_path / "plain", base_name="org/base", norms=False)
    write_adapter(adapted(), tmp_path / "never", base_name="org/base")
    for file in (tmp_path / "never").iterdir():
        assert (tmp_path / "plain" / file.name).read_bytes() == file.read_bytes()


def test_a_diverged_norm_is_not_written(adapted, tmp_path):
    model = adapted()
    train_norms(model, "layernorm")["model.layers.1.input_layernorm"].data[3] = float("nan")
    with pytest.raises(
        ExportError, match=r"model\.layers\.1\.input_layernorm\.trained_weight: expected finite numbers"
    ):
        write_adapter(model, tmp_path / "adapter", base_name="org/base")
    assert len(adapter_tensors(model, norms=False)) == 2 * 6


N0 = norm_name("model.layers.0.input_layernorm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(N0), r"expected every tensor of the model; got 1 missing: '.*0\.input_layernorm\.weight'"),
        (lambda t: t.update({norm_name("model.norm"): torch.ones(64)}), r"got 1 extra: .*model\.norm\.weight"),
        (lambda t: t.update({N0: torch.ones(32)}), r"0\.input_layernorm\.weight': expected shape \[64\]; got \[32\]"),
        (lambda t: t.update({N0: torch.ones(64, dtype=torch.int8)}), r"expected F32, BF16 or F16; got I8"),
        (lambda t: t[N0][5].fill_(float("inf")), r"0\.input_layernorm\.weight.*inf at \[5\]"),
    ],
)
def test_norms_that_do_not_fit_are_refused_by_name(change, message, adapted, tmp_path):
    model = adapted()
    train_norms(model, "layernorm")
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    edit_tensors(tmp_path / "adapter", change)
    refused_without_a_change(model, tmp_path / "adapter", message)


def test_norms_for_a_model_that_trains_none_are_refused(adapted, tmp_path):
    model = adapted()
    train_norms(model, "layernorm")
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    message = r"modules_to_save: expected an adapter without it; got \['input_layernorm', .* trainable_norms"
    refused_without_a_change(adapted(), tmp_path / "adapter", message)


def test_the_card_of_an_adapter_with_norms_says_where_they_are(adapted, state, tmp_path):
    model = adapted()
    train_norms(model, "layernorm")
    state.record(model)
    export(model, tmp_path / "with", target="peft")
    export(model, tmp_path / "without", target="peft", norms_in_base=True)
    text = (tmp_path / "with/README.md").read_text()
    assert "| Trained norms | 4, here, as whole tensors" in text
    assert "vllm serve" not in text  # it would refuse the adapter
    text = (tmp_path / "without/README.md").read_text()
    assert "| Trained norms | 4, in the base that was exported with the trained norms" in text
    assert "vllm serve BASE_WITH_TRAINED_NORMS --enable-lora" in text


def edit_config(directory, **changes):
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type: expected 'LORA'; got 'IA3'"),
        ({"use_dora": True}, r"use_dora: expected an adapter without it; got True; DoRA scales"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: expected an adapter without it; got \['lm_head'\]"),
        ({"a_feature_of_2030": {"x": 1}}, r"a_feature_of_2030: .* it is not a feature of plain LoRA"),
        ({"bias": "all"}, r"bias: expected 'none'; got 'all'"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: expected an initialisation that leaves .*; got 'pissa'"),
        ({"lora_alpha": "8"}, r"lora_alpha of model\.layers\.0\.self_attn\.q_proj: expected a finite number; got '8'"),
        ({"lora_alpha": float("nan")}, r"expected a finite number; got nan"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern: expected a mapping; got \['q_proj'\]"),
        ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern: expected module names, .* got '\(a\+\)\+\$'"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, r"alpha_pattern: expected module names, dots and up to four"),
        ({"alpha_pattern": {r"\9": 1}}, r"alpha_pattern: expected module names"),
    ],
)
def test_a_config_that_we_would_get_wrong_is_refused_by_key(changes, message, adapted, tmp_path):
    write_adapter(adapted(), tmp_path / "adapter", base_name="org/base")
    edit_config(tmp_path / "adapter", **changes)
    refused_without_a_change(adapted(), tmp_path / "adapter", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(Q0 + "B.weight"),
            r"expected every tensor of the model; got 1 missing: '.*q_proj\.lora_B\.weight'",
        ),
        (
            lambda t: t.update({Q0.replace("q_proj", "k_proj") + "A.weight": torch.ones(4, 64)}),
            r"against the recipe's lora rules: expected no tensor that the model does not have; got 1 extra: .*k_proj",
        ),
        (
            lambda t: t.update({Q0 + "A.weight": torch.ones(16, 64)}),
            r"q_proj\.lora_A\.weight': expected shape \[4, 64\]; got \[16, 64\]\. Set rank: 16",
        ),
        (
            lambda t: t.update({Q0 + "B.weight": torch.ones(64, 16)}),
            r"q_proj\.lora_B\.weight': expected shape \[64, 4\]; got \[64, 16\]\. Set rank: 16",
        ),
        (
            lambda t: t.update({Q0 + "A.weight": torch.ones(4, 32)}),
            r"expected shape \[4, 64\]; got \[4, 32\]\. Load an adapter of this base model",
        ),
        (
            lambda t: t.update({Q0 + "A.weight": torch.ones(4, 64, dtype=torch.int8)}),
            r"expected F32, BF16 or F16; got I8",
        ),
        (lambda t: t[Q0 + "A.weight"].view(-1)[70].fill_(float("nan")), r"q_proj\.lora_A\.weight.*nan at \[1, 6\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, adapted, tmp_path):
    write_adapter(adapted(), tmp_path / "adapter", base_name="org/base")
    edit_tensors(tmp_path / "adapter", change)
    refused_without_a_change(adapted(), tmp_path / "adapter", message)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused_by_name(name, adapted, tmp_path):
    write_adapter(adapted(), tmp_path / "adapter", base_name="org/base")
    (tmp_path / "adapter" / name).unlink()
    refused_without_a_change(adapted(), tmp_path / "adapter", rf"{name}: expected a readable file; got No such file")


def refused_without_a_change(model, directory, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        read_adapter(model, directory)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_16_bits_is_read_exactly(dtype, adapted, tmp_path):
    model = adapted()
    write_adapter(model, tmp_path / "adapter", base_name="org/base")
    edit_tensors(tmp_path / "adapter", lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    other = adapted()
    read_adapter(other, tmp_path / "adapter")
    for path, adapter in adapters_of(model).items():
        assert torch.equal(adapters_of(other)[path].a_RK, adapter.a_RK.to(dtype).float())


def test_a_diverged_adapter_is_not_written(adapted, tmp_path):
    model = adapted()
    with torch.no_grad():
        adapters_of(model)["model.layers.1.self_attn.v_proj"].b_NR[3, 1] = float("inf")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.self_attn\.v_proj\.lora_B: expected finite numbers"):
        write_adapter(model, tmp_path / "adapter", base_name="org/base")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_an_adapter_is_refused(state, tmp_path):
    with pytest.raises(ExportError, match=r"Qwen2ForCausalLM: expected modules with lora_A and lora_B; got none"):
        write_adapter(state.tiny_model("qwen2"), tmp_path / "adapter", base_name="org/base")


def test_an_existing_directory_is_refused(adapted, tmp_path):
    with pytest.raises(ExportError, match="an output directory that does not exist yet"):
        write_adapter(adapted(), tmp_path, base_name="org/base")


def test_an_exported_adapter_can_be_published_and_still_loads(state, input_ids_BT, tokenizer, tmp_path):
    from huggingface_hub import ModelCard
    from peft import PeftModel

    model = state.tiny_model("llama")
    state.pack(model)
    state.add_lora(model, SITES["uniform"])
    state.record(model)
    export(model, tmp_path / "out", target="peft", tokenizer=tokenizer)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= files
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "org/base"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "14 linears rounded to NVFP4" in card.text
    peft = PeftModel.from_pretrained(state.tiny_model("llama"), str(tmp_path / "out"))
    with torch.no_grad():
        assert peft(input_ids=input_ids_BT).logits.isfinite().all()
