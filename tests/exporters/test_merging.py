"""The merge modes beside the sums they stand for; what is refused; that a merge leaves the model as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_compile.adapter_files import adapters_of, trained_norms_of
from qerl_compile.adapters_off import adapters_off
from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.exporters import export
from qerl_compile.exporters.merging import DenseMerge, Master, check_merge, master_directory, requantized, write_dense
from qerl_compile.exporters.merging.requantized import merge_group, round_without_bias
from qerl_compile.formats import e2m1
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize, quantize
from qerl_compile.loading import load
from qerl_compile.passes.quantize import packed_of
from tests.models import tiny_model

RECIPE = {
    "quantize": [{"match": r".*(q|k|v|o|gate|up)_proj"}],  # down_proj stays dense
    "lora": [{"match": r".*(q|o|down)_proj", "rank": 4, "alpha": 8.0}],
    "trainable_norms": ".*input_layernorm",
}
ADAPTED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LAYER = "model.layers.0."


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def base(request, tmp_path_factory):
    """A bf16 checkpoint: Qwen2 has biases and a head of its own, Gemma 3 a tied head."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model(request.param, layers=1, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def trained(directory, recipe=RECIPE):
    """A transformed model whose adapter and norms look trained."""
    model = load(directory, recipe, inner="eager", device="cpu")
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters_of(model).values():
        adapter.b_NR.data.normal_(0, 0.5, generator=generator)
    for weight_D in trained_norms_of(model).values():
        weight_D.data.add_(torch.randn(weight_D.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def model(base):
    return trained(base)


def delta_of(model, path):
    module = model.get_submodule(path)
    return (module.lora_B @ module.lora_A * (8.0 / 4)).detach()


def bits(model):
    return {name: tensor.detach().view(-1).view(torch.uint8).clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["dequantized", "bf16-master"])
def test_a_dense_merge_holds_what_its_name_says(mode, model, base, tmp_path):
    before = bits(model)
    master = Master(base, model) if mode == "bf16-master" else None
    (tmp_path / "out").mkdir()
    write_dense(DenseMerge(model, master), tmp_path / "out", mode=mode)
    found, original = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        path = name.removesuffix(".weight")
        module = model.get_submodule(name.rpartition(".")[0])
        packed = packed_of(module) if name.endswith("weight") else None
        expected = original[name]
        if packed is not None and mode == "dequantized":
            expected = dequantize(packed, torch.float32)
        if path.removeprefix(LAYER) in ADAPTED:
            expected = expected.float() + delta_of(model, path)
        if path in trained_norms_of(model):
            expected = module.trained_weight.detach()
        assert torch.equal(tensor, expected.bfloat16()), name
    assert {name: value.tolist() for name, value in before.items()} == {n: v.tolist() for n, v in bits(model).items()}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert f"merged ({mode})" in (tmp_path / "out/README.md").read_text()


def test_a_dense_merge_is_an_ordinary_model_for_transformers(model, base, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "out").mkdir()
    write_dense(DenseMerge(model, None), tmp_path / "out", mode="dequantized")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: list(value) for key, value in info.items()} == {key: [] for key in info}
    with torch.no_grad():
        theirs = plain(input_ids=torch.arange(12)[None]).logits.float()
        ours = model(input_ids=torch.arange(12)[None], use_cache=False).logits.float()
        with adapters_off(model):
            off = model(input_ids=torch.arange(12)[None], use_cache=False).logits.float()
    assert (theirs - ours).norm() < 0.1 * (off - ours).norm()  # bf16 rounding against the whole adapter


def test_shards_are_written_with_an_index(model, tmp_path, monkeypatch):
    monkeypatch.setattr("qerl_compile.exporters.merging.dense.SHARD_BYTES", 30_000)
    write_dense(DenseMerge(model, None), tmp_path, mode="dequantized")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert {name for file in set(index.values()) for name in load_file(tmp_path / file)} == set(index)


def test_inside_requantized_the_model_holds_the_merge_and_afterwards_what_it_had(model, tmp_path):
    before, order = bits(model), [name for name, _ in model.named_parameters()]
    merged_norm = model.get_submodule(f"{LAYER}input_layernorm").trained_weight.detach().bfloat16()
    down_NK = model.get_submodule(f"{LAYER}mlp.down_proj").weight.detach().float() + delta_of(
        model, f"{LAYER}mlp.down_proj"
    )
    with requantized(model):
        assert not adapters_of(model)
        assert not trained_norms_of(model)
        export(model, tmp_path / "out", target="vllm")
        q_proj = packed_of(model.get_submodule(f"{LAYER}self_attn.q_proj"))
    assert bits(model).keys() == before.keys()
    assert all(torch.equal(now, before[name]) for name, now in bits(model).items())
    assert [name for name, _ in model.named_parameters()] == order  # optimizers count on it
    found = load_file(tmp_path / "out/model.safetensors")
    own = model.get_submodule(f"{LAYER}self_attn.q_proj")
    assert torch.equal(found[f"{LAYER}self_attn.q_proj.weight_packed"], q_proj.codes_NK2)
    target_NK = dequantize(packed_of(own), torch.float32) + delta_of(model, f"{LAYER}self_attn.q_proj")
    assert (dequantize(q_proj, torch.float32) - target_NK).norm() < 0.3 * target_NK.norm()
    scales = [found[f"{LAYER}self_attn.{name}_proj.weight_global_scale"] for name in "qkv"]
    assert torch.equal(scales[0], q_proj.global_scale)
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[0], scales[2])
    assert torch.equal(found[f"{LAYER}input_layernorm.weight"], merged_norm)
    assert torch.equal(found[f"{LAYER}mlp.down_proj.weight"], down_NK.bfloat16())
    assert not [name for name in found if "lora" in name or "trained" in name]


def test_a_failure_inside_requantized_restores_the_model_too(model):
    before = bits(model)
    with pytest.raises(RuntimeError, match="disk full"), requantized(model):
        raise RuntimeError("disk full")
    assert all(torch.equal(now, before[name]) for name, now in bits(model).items())


def packed_and_delta(size: float):
    generator = torch.Generator().manual_seed(1)
    packed = quantize(torch.randn(24, 64, generator=generator))
    return packed, torch.randn(24, 64, generator=generator) * size


def merge_packed(packed, delta_NK, path="w"):
    return merge_group({path: packed}, {path: delta_NK})[path]


def test_rounding_without_bias_has_the_number_as_its_mean():
    """Over r evenly spread in [0, 1), to the width of the spread; values of E2M1 stay, larger ones are clipped."""
    units = torch.tensor([0.0, 0.1, 0.5, 0.7, 1.9, 2.0, 2.3, 3.9, 4.0, 4.5, 5.9, 6.0, 7.0])
    units = torch.cat([units, -units])
    random = (torch.arange(1000) + 0.5) / 1000
    rounded = round_without_bias(units[:, None].expand(-1, 1000).contiguous(), random.expand(len(units), -1))
    torch.testing.assert_close(rounded.mean(1), units.clamp(-6, 6), rtol=0, atol=2e-3)
    assert set(rounded.abs().unique().tolist()) <= set(e2m1.MAGNITUDES)
    exact = torch.tensor(e2m1.VALUES)
    assert torch.equal(round_without_bias(exact, torch.full_like(exact, 1 - 2**-24)), exact)


def test_merging_nothing_changes_no_value():
    packed, _ = packed_and_delta(0)
    merged = merge_packed(packed, torch.zeros(24, 64))
    assert torch.equal(dequantize(merged, torch.float32), dequantize(packed, torch.float32))
    assert torch.equal(merged.block_decode_scale_NG.view(torch.uint8), packed.block_decode_scale_NG.view(torch.uint8))


def test_a_small_adapter_survives_in_sums_where_nearest_rounding_loses_it():
    """Every weight moves by a thousandth in one direction, as the rows of a low-rank product do."""
    packed = quantize(torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)))
    before_NK, delta_NK = dequantize(packed, torch.float32), torch.full((64, 1024), 1e-3)
    nearest = quantize(before_NK + delta_NK)
    merged = merge_packed(packed, delta_NK)
    for found, low, high in ((nearest, -0.1, 0.2), (merged, 0.7, 1.2)):
        kept = (dequantize(found, torch.float32) - before_NK).sum() / delta_NK.sum()
        assert low < kept < high
    changed = (merged.codes_NK2 != packed.codes_NK2).float().mean()
    assert 0 < changed < 0.1


def test_a_merge_is_the_same_each_time_and_another_for_another_module():
    packed, delta_NK = packed_and_delta(0.01)
    first, again, other = (merge_packed(packed, delta_NK, path) for path in ("a", "a", "b"))
    assert torch.equal(first.codes_NK2, again.codes_NK2)
    assert not torch.equal(first.codes_NK2, other.codes_NK2)


def test_an_adapter_larger_than_the_weight_is_rounded_afresh_and_to_nearest():
    packed, large_NK = packed_and_delta(2.0)
    target_NK = dequantize(packed, torch.float32) + large_NK
    merged = merge_packed(packed, large_NK)
    error = (dequantize(merged, torch.float32) - target_NK).norm() / target_NK.norm()
    assert error < 0.1
    assert not torch.equal(merged.global_scale, packed.global_scale)


def test_linears_that_share_a_matrix_scale_go_on_sharing_one():
    packed, delta_NK = packed_and_delta(2.0)
    others = {"q": packed, "k": packed}
    merged = merge_group(others, {"q": delta_NK})
    assert torch.equal(merged["q"].global_scale, merged["k"].global_scale)
    assert not torch.equal(merged["q"].global_scale, packed.global_scale)
    small = merge_group(others, {"q": delta_NK * 0.01})
    assert torch.equal(small["q"].global_scale, packed.global_scale)
    assert small["k"] is packed


def test_a_multiplier_is_kept_with_the_old_scales():
    packed, delta_NK = packed_and_delta(0.03)
    multiplier = PackedNVFP4(
        packed.codes_NK2, packed.block_decode_scale_NG, packed.global_scale.reciprocal(), "multiplier"
    )
    merged = merge_packed(multiplier, delta_NK)
    assert merged.direction == "multiplier"
    assert torch.equal(merged.global_scale, multiplier.global_scale)


def test_modes_and_models_that_cannot_be_merged_are_refused(model, base):
    with pytest.raises(ExportError, match="merge: expected one of dequantized, bf16-master, nvfp4; got 'nvfp'"):
        check_merge(model, "nvfp")
    with pytest.raises(ExportError, match="expected modules with lora_A and lora_B; got none"):
        check_merge(load(base, {"quantize": RECIPE["quantize"]}, inner="eager", device="cpu"), "nvfp4")
    with adapters_off(model), pytest.raises(ExportError, match="a model whose adapter is on"):
        check_merge(model, "nvfp4")
    check_merge(model, "nvfp4")


def test_an_adapter_on_a_tied_head_is_refused():
    from torch import nn

    model = tiny_model("gemma3", layers=1)
    model.lm_head.lora_A, model.lm_head.lora_B = nn.Parameter(torch.ones(2, 64)), nn.Parameter(torch.ones(128, 2))
    model.lm_head.lora_rank, model.lm_head.lora_alpha = 2, 2.0
    with pytest.raises(ExportError, match=r"lm_head: .* tied to model\.embed_tokens\.weight"):
        check_merge(model, "dequantized")


def edited(base, tmp_path, change):
    """A copy of the base with tensors changed."""
    import shutil

    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{LAYER}self_attn.q_proj.weight", torch.randn_like, r"up to 4-bit rounding, some 20 dB; got -?\d\.\d dB"),
        (f"{LAYER}mlp.down_proj.weight", lambda w: w * 1.01, r"down_proj\.weight' equal to the model's; got another"),
    ],
)
def test_a_master_with_other_numbers_is_refused_when_they_are_read(name, change, message, model, base, tmp_path):
    torch.manual_seed(0)
    other = edited(base, tmp_path, lambda tensors: tensors.update({name: change(tensors[name])}))
    master = Master(other, model)
    with pytest.raises(ExportError, match=message):
        master.read(name)
    assert torch.equal(Master(base, model).read(name), load_file(base / "model.safetensors")[name])


def test_a_master_of_other_names_or_shapes_or_packed_is_refused_at_once(model, base, tmp_path):
    name = f"{LAYER}self_attn.q_proj.weight"
    other = edited(base, tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :32].contiguous()}))
    with pytest.raises(ExportError, match=r"q_proj\.weight' of shape \[64, 64\]; got shape \[64, 32\]"):
        Master(other, model)
    other = edited(base, tmp_path / "second", lambda tensors: tensors.pop(name))
    with pytest.raises(ExportError, match=r"expected every weight of the model; got no '.*q_proj\.weight'"):
        Master(other, model)
    export(model, tmp_path / "packed", target="vllm")
    with pytest.raises(ExportError, match="expected dense weights in 16 bits; got a checkpoint that is quantized"):
        Master(tmp_path / "packed", model)


def test_the_master_is_what_the_model_recorded_unless_it_is_named(model, base, tmp_path):
    assert master_directory(model, None) == base
    assert master_directory(model, tmp_path) == tmp_path
    with pytest.raises(ExportError, match="the directory or hub id of the bf16 base model"):
        master_directory(tiny_model("llama", layers=1), None)
    with pytest.raises(CheckpointError, match="no directory of that name"):
        master_directory(model, tmp_path / "gone")
