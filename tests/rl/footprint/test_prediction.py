import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qerl_compile import loading
from qerl_compile.errors import CheckpointError, ModelError
from qerl_compile.formats.nvfp4 import quantize
from qerl_compile.loading import load
from qerl_compile.recipe import Recipe
from qerl_compile.rl.footprint import Predictor, predict, resident
from qerl_compile.rl.footprint.fitting import candidates, fitting, refuse_too_large
from qerl_compile.rl.footprint.liveness import rounded
from qerl_compile.rl.footprint.prediction import OUTSIDE_BYTES
from qerl_compile.rl.footprint.resident import skeleton, source_of
from qerl_compile.rl.rollout.memory import Workload
from qerl_compile.rl.rollout.paged import PagedSampler
from qerl_compile.stacked_adapters import attach_stacked_adapters
from qerl_compile.transforming import transform
from tests.models import SIZES, SOME_FAMILIES, tiny_model

TRAIN = (
    "train.prompts_per_step=4", "train.group_size=4", "train.max_new_tokens=448", "train.eval_size=4",
    "train.rollout_batch=16",
)  # fmt: skip
MIB = 2**20
LAYERS = 8


def held_bytes(model):
    """What a model in memory holds: every storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(map(rounded, storages.values()))


def mixtral(directory):
    """As it is published: transformers renames router and experts as it reads."""
    sizes = {**SIZES, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(
        directory, max_shard_size="40KB"
    )


def mixtral_without_shards(directory):
    mixtral(directory)
    for shard in directory.glob("*.safetensors"):
        shard.unlink()


def wide_model():
    return tiny_model("qwen2", layers=LAYERS, dtype=torch.bfloat16, hidden_size=128, intermediate_size=512)


def recipe(name="qerl-nvfp4-aqn", *sets):
    return Recipe.named(name).with_overrides([*TRAIN, *sets])


@pytest.fixture(scope="module")
def predictor():
    """Of a model whose layers dwarf its head, in bf16."""
    return Predictor(wide_model().config, recipe())


@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize("name", ["qerl-nvfp4-aqn", "bf16-lora"])
def test_bytes_after_load_and_of_stacked_adapters_are_those_of_a_real_model(family, name):
    model = transform(tiny_model(family, dtype=torch.bfloat16), name, inner="eager")
    before = held_bytes(model)
    attach_stacked_adapters(model)
    held = skeleton(source_of(model.config), Recipe.named(name)).held
    assert held.after_load == pytest.approx(before, rel=1e-3)
    assert held.after_load + held.stacked == pytest.approx(held_bytes(model), rel=1e-3)
    assert held.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (held.packed > 0) == (name == "qerl-nvfp4-aqn")


def test_pages_are_those_that_the_engine_makes(predictor):
    train = predictor.recipe.train
    sampler = PagedSampler(wide_model(), rows=train.rollout_batch, page_tokens=64)
    cache, _ = sampler._memory(Workload((64,) * 4, train.group_size, train.max_new_tokens, 64))
    made = sum(t.nbytes for t in (*cache.keys, *cache.values))
    found = predictor.footprint(prompt_tokens=64)
    assert found.pages_wanted == made


def test_what_layers_keep_is_what_autograd_saves_in_a_real_run(predictor):
    rows, positions = 2, 96
    model = transform(wide_model(), predictor.recipe, inner="aot_eager")
    static = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in static:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(rows * positions).view(rows, positions) % 100
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    (graph,) = predictor._training(recompute=False)
    assert LAYERS * graph.kept_bytes(rows, positions) == pytest.approx(kept, rel=0.1)  # the final norm saves a little


def test_with_recompute_only_the_layers_inputs_are_kept(predictor):
    train = predictor.recipe.train.model_copy(update={"recompute": True})
    graph = predictor._training(recompute=True)[0]
    assert graph.kept_bytes(4, 100) == 4 * 100 * 128 * 2
    plain, less = predictor.footprint(), predictor.footprint(train=train)
    assert less.training["kept activations"] < plain.training["kept activations"] / 10
    assert less.rollout_peak == plain.rollout_peak


def test_activations_grow_in_step_with_tokens(predictor):
    graph = predictor._training(recompute=False)[0]
    one, two, three = (graph.kept_bytes(rows, 512) for rows in (2, 4, 6))
    assert three - two == two - one > 0


@pytest.mark.parametrize(
    ("setting", "phase", "part"),
    [
        ({"rollout_cache": "freed"}, "training", "pages"),
        ({"optimizer": "adamw_8bit"}, "training", "moments"),
        ({"rollout_batch": 4}, "rollout", "pages"),
        ({"rollout_memory_gib": 0.002}, "rollout", "pages"),
        ({"micro_batch_tokens": 1024}, "training", "kept activations"),
        ({"max_new_tokens": 64}, "rollout", "pages"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_setting_that_saves_memory_saves_it_where_it_should(predictor, setting, phase, part):
    train = predictor.recipe.train.model_copy(update=setting)
    before, after = predictor.footprint(), predictor.footprint(train=train)
    assert getattr(after, phase)[part] < getattr(before, phase)[part]
    assert getattr(after, f"{phase}_peak") < getattr(before, f"{phase}_peak")


def test_peaks_are_the_sums_of_their_parts(predictor):
    found = predictor.footprint()
    assert found.rollout_peak == sum(found.rollout.values())
    assert found.training_peak == sum(found.training.values())
    assert found.after_load <= min(found.rollout_peak, found.training_peak)
    assert found.training_most >= found.training_peak
    assert found.over == 0


def test_a_run_that_fits_is_not_refused(predictor):
    found = predictor.footprint(predictor.footprint().peak + OUTSIDE_BYTES)
    assert found.over == 0
    refuse_too_large(predictor, found)


def test_the_setting_that_a_refusal_names_fits(predictor):
    peak = predictor.footprint().peak
    for share in (0.99, 0.7):
        device_bytes = int(peak * share) + OUTSIDE_BYTES
        found = predictor.footprint(device_bytes)
        assert found.over == pytest.approx(peak * (1 - share), rel=0.05)
        with pytest.raises(ModelError) as refused:
            refuse_too_large(predictor, found)
        fit = fitting(predictor, device_bytes)
        assert fit is not None
        assert len(fit.overrides) == 1
        assert f"Set {fit.overrides[0]}, " in refused.value.do
        changed = predictor.recipe.with_overrides(fit.overrides)
        assert predictor.footprint(device_bytes, train=changed.train).over == 0
        assert found.phase in refused.value.got


def test_where_one_setting_is_not_enough_a_refusal_names_two(predictor):
    train, now = predictor.recipe.train, predictor.footprint()
    singles = [train.model_copy(update={key: value}) for key, value in candidates(train, now, 256)]
    device_bytes = min(predictor.footprint(train=single).peak for single in singles) - 1 + OUTSIDE_BYTES
    with pytest.raises(ModelError, match=r"Set train\.recompute=true and train\.\w+=\d+, with which"):
        refuse_too_large(predictor, predictor.footprint(device_bytes))
    fit = fitting(predictor, device_bytes)
    assert fit is not None
    changed = predictor.recipe.with_overrides(fit.overrides)
    assert predictor.footprint(device_bytes, train=changed.train).over == 0


def test_a_model_whose_weights_do_not_fit_wants_a_larger_gpu(predictor):
    found = predictor.footprint(OUTSIDE_BYTES + MIB // 2)
    with pytest.raises(ModelError, match="larger GPU"):
        refuse_too_large(predictor, found)


def test_a_directory_is_planned_before_its_weights_are_there(tmp_path):
    model = wide_model()
    model.config.save_pretrained(tmp_path)
    source = source_of(tmp_path)
    assert source.lacks_weights
    assert not source.layout.linears
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in source.model.named_parameters()} == shapes


def test_a_directory_that_is_packed_is_not_planned_without_its_tensors(tmp_path):
    wide_model().config.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "modelopt"},', 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        source_of(tmp_path)


def test_a_packed_directory_beside_whose_config_lies_modelopts_is_not_planned_as_dense(tmp_path):
    wide_model().config.save_pretrained(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        source_of(tmp_path)


def without_shards(directory):
    wide_model().save_pretrained(directory, max_shard_size="400KB")
    shards = list(directory.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        shard.unlink()


def with_gguf(directory):
    wide_model().config.save_pretrained(directory)
    (directory / "model-q4_k_m.gguf").write_bytes(b"GGUF")


def with_pickle(directory):
    wide_model().config.save_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")


def of_another_depth(directory):
    tiny_model("llama", layers=1).save_pretrained(directory)
    tiny_model("llama", layers=2).config.save_pretrained(directory)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_shards, r"every shard it names; got no 'model-00001-of-"),
        (with_gguf, r"GGUF and pickles are not read"),
        (with_pickle, r"'pytorch_model\.bin', which may be a pickle"),
        (of_another_depth, r"every tensor of the model; got 9 missing: 'model\.layers\.1"),
        (mixtral, r"got 1\d under names that only transformers' own loading maps"),
    ],
)
def test_a_local_directory_that_load_would_refuse_is_refused_in_its_words(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=words) as planned:
        source_of(tmp_path)
    with pytest.raises(CheckpointError) as loaded:
        load(tmp_path, inner="eager", device="cpu")
    assert str(planned.value) == str(loaded.value)


def test_of_a_hub_id_the_index_alone_says_which_names_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "model_directory", lambda path_or_id, *, weights=True: tmp_path / path_or_id)
    for name, make in (("qwen", without_shards), ("mixtral", mixtral_without_shards)):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    source = source_of("qwen")
    assert source.checkpoint is None
    assert not source.lacks_weights  # `load` fetches them
    with pytest.raises(CheckpointError, match=r"index\.json: expected tensors under the names that MixtralForCausalLM"):
        source_of("mixtral")


def test_packed_weights_that_no_layer_multiplies_with_are_refused_as_by_load(tmp_path, monkeypatch):
    """No model here has any, so the plan is made as if o_proj were not called."""
    tiny_model("llama", layers=1, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    path = "model.layers.0.self_attn.o_proj"
    packed = quantize(tensors.pop(f"{path}.weight"))
    tensors |= {
        f"{path}.weight_packed": packed.codes_NK2,
        f"{path}.weight_scale": packed.block_decode_scale_NG,
        f"{path}.weight_global_scale": packed.global_scale,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = source_of(tmp_path)
    assert set(source.layout.linears) == {path}
    make_plan = resident.make_plan
    monkeypatch.setattr(
        resident, "make_plan", lambda *given, packed, **options: make_plan(*given, packed=packed - {path}, **options)
    )
    with pytest.raises(CheckpointError, match=f"1 that none calls: '{path}'"):
        skeleton(source, Recipe())


def test_code_in_a_directory_is_refused_unless_it_is_trusted(tmp_path):
    wide_model().config.save_pretrained(tmp_path)
    (tmp_path / "modeling_x.py").write_text("raise SystemExit")
    with pytest.raises(CheckpointError, match=r"--trust-remote-code"):
        predict(tmp_path, recipe())
    assert source_of(tmp_path, trust_remote_code=True).lacks_weights


def test_a_model_with_weights_is_refused():
    with pytest.raises(ModelError, match=r"Pass model\.config"):
        predict(tiny_model("llama"), "nvfp4-lora")
