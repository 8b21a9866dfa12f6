"""The ONNX export computes what the transformed model computes, in onnxruntime and in onnx's reference evaluator."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qerl_compile.adapter_files import adapters_of, trained_norms_of
from qerl_compile.exporters.onnx import export_onnx
from qerl_compile.formats.nvfp4 import dequantize
from qerl_compile.passes.quantize import packed_of
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import resample_noise, transform
from tests.models import tiny_model

IDS_BT = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
MASK_BT = torch.ones_like(IDS_BT)
MASK_BT[1, :2] = 0  # a padded row
CASES = {
    "llama": ("kept", {"layers": 2}),
    "qwen2": ("folded", {"layers": 1}),  # biases
    "gemma3": ("kept", {"layers": 1, "dtype": torch.bfloat16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
}
"""Family: adapter mode and what the model is; each is exported once, for torch takes seconds to trace a layer."""


@dataclass
class Exported:
    """A transformed model, the same function without any of our code, and the directory."""

    model: Any
    oracle: Any
    out: Path


def transformed(family, **options):
    """A model with trained norms, adapters that are not zero and noise that an export must not see; and its oracle."""
    plain = tiny_model(family, **options)
    recipe = Recipe.named("qerl-nvfp4-aqn").model_copy(update={"trainable_norms": ".*"})
    model = transform(copy.deepcopy(plain), recipe, inner="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.b_NR.normal_(std=0.1, generator=generator)
        for weight_D in trained_norms_of(model).values():
            weight_D.add_(torch.randn(weight_D.shape, generator=generator) * 0.1)
    return model, float32_oracle(model, plain)


def float32_oracle(model, plain):
    """The plain float32 model with the transformed one's weights, adapters added into them."""
    oracle = plain.float()
    for path, adapter in adapters_of(model).items():
        w_NK = dequantize(packed_of(model.get_submodule(path)), torch.float32)
        w_NK += adapter.b_NR.data @ adapter.a_RK.data * (adapter.alpha / adapter.rank)
        oracle.get_submodule(path).weight.data = w_NK
    for path, weight_D in trained_norms_of(model).items():
        oracle.get_submodule(path).weight.data = weight_D.data
    scale = oracle.get_input_embeddings()._buffers.get("embed_scale")
    if scale is not None:  # Gemma rounds it to the dtype of the embedding
        scale.copy_(scale.to(model.dtype))
    return oracle.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    done = {}

    def get(family):
        if family not in done:
            mode, options = CASES[family]
            model, oracle = transformed(family, **options)
            resample_noise(model, 0.1)
            out = tmp_path_factory.mktemp(family) / "out"
            export_onnx(model, out, runtime="onnxruntime", adapter=mode)
            resample_noise(model, 0.0)
            done[family] = Exported(model, oracle, out)
        return done[family]

    return get


def session(out):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(out / "model.onnx", options, providers=["CPUExecutionProvider"])


def run(graph, ids_BT, mask_BT, past, config):
    """One call: (logits, the cache that comes out of it); `past` is None before the first."""
    shape = (len(ids_BT), config.num_key_value_heads, 0, config.head_dim)
    past = past or [np.zeros(shape, np.float32)] * (2 * config.num_hidden_layers)
    names = [f"past_key_values.{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]
    logits, *present = graph.run(
        None,
        {
            "input_ids": ids_BT.numpy(),
            "attention_mask": mask_BT.numpy(),
            **dict(zip(names, past, strict=True)),
        },
    )
    return torch.from_numpy(logits), present


def prefill_and_decode(graph, config):
    """Logits of a prompt in one call and of two more steps with the cache: [B, T, V]."""
    parts, past = [], None
    for start, end in ((0, 7), (7, 8), (8, 9)):
        logits, past = run(graph, IDS_BT[:, start:end], MASK_BT[:, :end], past, config)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def logits_of(model):
    positions = (MASK_BT.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=IDS_BT, attention_mask=MASK_BT, position_ids=positions).logits.float()


def relative(got_BTV, want_BTV):
    kept = MASK_BT.bool()
    return ((got_BTV - want_BTV)[kept].abs().max() / want_BTV[kept].abs().max()).item()


@pytest.mark.parametrize("family", CASES)
def test_onnxruntime_prefills_and_decodes_to_the_logits_of_plain_float32_weights(family, exported):
    case = exported(family)
    assert relative(prefill_and_decode(session(case.out), case.model.config), logits_of(case.oracle)) < 1e-4


def test_onnxruntime_gives_the_logits_of_the_transformed_model(exported):
    case = exported("llama")
    assert relative(prefill_and_decode(session(case.out), case.model.config), logits_of(case.model)) < 1e-4


def test_eight_greedy_tokens_are_those_of_the_transformed_model(exported):
    case = exported("llama")
    graph, config, past = session(case.out), case.model.config, None
    ids_BT, mask_BT, tokens = IDS_BT, MASK_BT, []
    for _ in range(8):
        logits, past = run(graph, ids_BT, mask_BT, past, config)
        ids_BT = logits[:, -1:].argmax(-1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
        tokens.append(ids_BT)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = case.model.generate(IDS_BT, attention_mask=MASK_BT, **options)
    assert torch.equal(torch.cat(tokens, dim=1), want[:, IDS_BT.shape[1] :])


def test_the_reference_evaluator_gives_the_logits_of_the_transformed_model(tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, _ = transformed("qwen3", layers=1)
    export_onnx(model, tmp_path / "out")
    graph = ReferenceEvaluator(str(tmp_path / "out/model.onnx"))
    assert relative(prefill_and_decode(graph, model.config), logits_of(model)) < 1e-4

    proto = onnx.load(tmp_path / "out/model.onnx")
    assert [(each.domain, each.version) for each in proto.opset_import] == [("", 23)]
    assert proto.ir_version == 11  # the first that has 4-bit floats
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    name = "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(name)
    codes, block = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    assert (codes.data_type, list(codes.dims)) == (onnx.TensorProto.FLOAT4E2M1, [64, 64])
    assert codes.raw_data == linear.weight_packed.numpy().tobytes()
    assert (block.data_type, list(block.dims)) == (onnx.TensorProto.FLOAT8E4M3FN, [64, 4])
    assert block.raw_data == linear.weight_scale.view(torch.uint8).numpy().tobytes()
    decoders = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert len(decoders) == 2 * len(adapters_of(model))


def test_a_16_bit_model_keeps_its_tables_in_16_bits_and_a_tied_head_is_stored_once(exported):
    import onnx

    case = exported("gemma3")
    proto = onnx.load(case.out / "model.onnx", load_external_data=False)
    vocabulary = [tensor for tensor in proto.graph.initializer if list(tensor.dims) == [128, 64]]
    wide = [tensor.name for tensor in vocabulary if tensor.data_type == onnx.TensorProto.BFLOAT16]
    assert len(wide) == 1
    readers = [node for node in proto.graph.node if wide[0] in node.input]
    assert sorted(node.op_type for node in readers) == ["Cast", "Gather"]  # the head, and rows that are cast later


def test_an_adapter_is_two_small_matrices_when_kept_and_makes_its_linear_dense_when_folded(exported):
    import onnx

    kept = onnx.load(exported("llama").out / "model.onnx", load_external_data=False)
    folded = onnx.load(exported("qwen2").out / "model.onnx", load_external_data=False)
    names = [{tensor.name: tensor for tensor in proto.graph.initializer} for proto in (kept, folded)]
    name = "model.layers.0.mlp.down_proj"
    assert {f"{name}.{leaf}" for leaf in ("weight_packed", "weight_scale", "lora_A", "lora_B")} <= set(names[0])
    assert f"{name}.weight" not in names[0]
    assert list(names[1][f"{name}.weight"].dims) == [64, 128]
    assert not [each for each in names[1] if "lora_" in each or "weight_packed" in each]


def test_axes_have_names_and_no_path_of_this_machine_is_in_the_file(exported):
    import onnx

    out = exported("llama").out
    proto = onnx.load(out / "model.onnx", load_external_data=False)
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    assert axes["input_ids"] == ["batch", "sequence"]
    assert axes["attention_mask"] == ["batch", "total_sequence"]
    assert axes["past_key_values.1.value"] == ["batch", 2, "past_sequence", 16]
    assert axes["present.1.value"] == ["batch", 2, "total_sequence", 16]
    assert axes["logits"] == ["batch", "sequence", 128]
    assert b".py" not in (out / "model.onnx").read_bytes()
