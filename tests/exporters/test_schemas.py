"""The table of what engines accept, and each mistake that was seen to break one."""

import json
import shutil

import pytest
import torch
from oracle_llmcompressor import FIXTURE
from safetensors.torch import load_file, save_file

from qerl_compile.errors import ExportError
from qerl_compile.exporters import TARGETS, export, schemas, serving
from qerl_compile.exporters.schemas import ACCEPTED, ENGINES, accepted_by, check_schema, split_target

MODELOPT_CONFIG = {  # nvidia-modelopt 0.47 wrote this (design/formats.md, section 2.3)
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"},
            "targets": ["Linear"],
            "weights": {"dynamic": False, "group_size": 16, "num_bits": 4, "type": "float"},
        }
    },
    "ignore": ["lm_head", "model.embed_tokens"],
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_algo": "NVFP4",
    "quant_method": "modelopt",
}
Q = "model.layers.0.self_attn.q_proj"


def test_every_serving_target_has_rows_and_every_row_says_how_we_know():
    assert set(ENGINES) == set(TARGETS) - {"peft", "onnx"}
    assert all(row.source and row.schemes for row in ACCEPTED)
    assert len({(row.engine, row.version, row.method, *sorted(row.schemes)) for row in ACCEPTED}) == len(ACCEPTED)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("vllm", ("vllm", None)), ("vllm==0.33", ("vllm", "0.33")), ("vllm==0.33.0", ("vllm", "0.33.0"))],
)
def test_a_target_may_name_a_version(target, expected):
    assert split_target(target) == expected
    assert {row.version for row in accepted_by(target)} == {"0.33.0"}


def test_a_target_without_a_version_means_the_newest_row_and_one_with_a_version_its_own():
    assert {row.version for row in accepted_by("transformers")} == {"5.23.0"}
    assert {row.version for row in accepted_by("transformers==5.17")} == {"5.17.0"}


@pytest.mark.parametrize("target", ["vllm==0.3", "vllm==0.34", "vllm==", "vllm==0.33.0.1", "sglang==0.33", "llama.cpp"])
def test_what_was_not_looked_at_is_refused(target):
    with pytest.raises(ExportError, match="target"):
        split_target(target)


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers"])
def test_what_llmcompressor_wrote_is_accepted(target):
    for kept in json.loads(FIXTURE.read_text()).values():
        assert check_schema(kept["quantization_config"], target) == []


@pytest.mark.parametrize("target", ["vllm", "sglang", "tensorrt-llm"])
def test_what_modelopt_wrote_is_accepted(target):
    assert check_schema(MODELOPT_CONFIG, target) == []


def test_an_engine_is_told_which_format_it_wants():
    theirs = json.loads(FIXTURE.read_text())["llama"]["quantization_config"]
    (problem,) = check_schema(theirs, "tensorrt-llm")
    assert str(problem) == (
        "quantization_config.quant_method: expected modelopt, for tensorrt-llm; got 'compressed-tensors' "
        "(it refuses the checkpoint). Export it for tensorrt-llm."
    )
    (problem,) = check_schema(MODELOPT_CONFIG, "transformers")
    assert problem.expected == "compressed-tensors or qerl-nvfp4, for transformers"
    (problem,) = check_schema(MODELOPT_CONFIG | {"quant_algo": "NVFP4_AWQ", "config_groups": {}}, "vllm")
    assert problem.got == "NVFP4_AWQ"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One calibrated model in four forms; tests change copies."""
    from tests.exporters.conftest import pack, tiny_model

    model = tiny_model("llama", tied=True)
    pack(model)
    for path, module in list(model.named_modules()):
        if "weight_packed" in module._parameters:
            module.register_buffer("input_global_scale", torch.tensor([100.0 + len(path.rpartition(".")[0])]))
        if path.endswith("self_attn"):
            module.register_buffer("k_scale", torch.tensor([0.01]))
            module.register_buffer("v_scale", torch.tensor([0.02]))
    root = tmp_path_factory.mktemp("exports")
    export(model, root / "ct", target="vllm")
    export(model, root / "ct4", target="vllm", activations="4", kv_cache="8")
    export(model, root / "modelopt", target="tensorrt-llm")
    export(model, root / "modelopt4", target="tensorrt-llm", activations="4", kv_cache="8")
    export(model, root / "ours", target="transformers")
    return root


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("ct", ("vllm", "sglang", "transformers", "transformers==5.17")),
        ("ct4", ("vllm", "sglang", "transformers")),
        ("modelopt", ("vllm", "sglang", "tensorrt-llm")),
        ("modelopt4", ("vllm", "sglang", "tensorrt-llm")),
        ("ours", ("transformers", "transformers==5.17")),
    ],
)
def test_our_exports_have_no_problem(name, targets, exports):
    for target in targets:
        assert check_schema(exports / name, target) == []


def drop(name):
    return lambda tensors: tensors.pop(name)


def cast(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def double(name):
    return lambda tensors: tensors.update({name: tensors[name] * 2})


TENSORS = [
    ("ct", drop(f"{Q}.weight_scale"), "vllm", f"{Q}.weight_scale", "none"),
    ("ct", cast(f"{Q}.weight_scale", torch.float32), "vllm", f"{Q}.weight_scale", "F32 [64, 4]"),
    ("ct", put(f"{Q}.weight_scale", torch.zeros(64, 4).byte()), "vllm", f"{Q}.weight_scale", "U8 [64, 4]"),
    ("ct", drop(f"{Q}.weight_packed"), "vllm", f"{Q}.weight_packed", "none"),
    ("ct", drop(f"{Q}.weight_global_scale"), "vllm", f"{Q}.weight_global_scale", "none"),
    ("ct", cast(f"{Q}.weight_global_scale", torch.bfloat16), "vllm", f"{Q}.weight_global_scale", "BF16 [1]"),
    ("ct", put(f"{Q}.input_global_scale", torch.ones(1)), "vllm", f"{Q}.input_global_scale", "F32 [1]"),
    ("ct", double(f"{Q}.weight_global_scale"), "sglang", "model.layers.0.self_attn", None),
    ("ct4", drop(f"{Q}.input_global_scale"), "vllm", f"{Q}.input_global_scale", "none"),
    ("ct4", double(f"{Q}.input_global_scale"), "vllm", "model.layers.0.self_attn", None),
    ("ct4", drop("model.layers.0.self_attn.k_scale"), "vllm", "KV cache", "1 k_scale, 2 v_scale and a scheme"),
    ("modelopt", cast(f"{Q}.weight_scale_2", torch.bfloat16), "tensorrt-llm", f"{Q}.weight_scale_2", "BF16 []"),
    ("modelopt", double(f"{Q}.weight_scale_2"), "tensorrt-llm", "model.layers.0.self_attn", None),
    ("modelopt", put(f"{Q}.input_scale", torch.ones(())), "tensorrt-llm", f"{Q}.input_scale", "F32 []"),
    ("modelopt4", drop(f"{Q}.input_scale"), "tensorrt-llm", f"{Q}.input_scale", "none"),
    ("modelopt4", put(f"{Q}.weight", torch.ones(64, 64)), "vllm", f"{Q}.weight", "F32 [64, 64]"),
]


@pytest.mark.parametrize(("name", "change", "target", "where", "got"), TENSORS, ids=range(len(TENSORS)))
def test_a_tensor_that_breaks_an_engine_is_named(name, change, target, where, got, exports, tmp_path):
    shutil.copytree(exports / name, tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    assert [p for p in check_schema(tmp_path / "copy", target) if where == p.where and got in (None, p.got)]


CONFIGS = [
    ("ct", lambda q: q.pop("quantization_status"), "transformers", "quantization_status", "uninitialised"),
    ("ct", lambda q: q.update(ignore=[]), "transformers", "ignore", "uninitialised"),
    ("ct", lambda q: q.update(ignore=["lm_head", Q]), "vllm", "ignore", "wrong weights"),
    ("ct", lambda q: q.update(ignore=["lm_head", r"re:.*layers\.0.*"]), "vllm", "ignore", "wrong weights"),
    ("ct", lambda q: q.update(format="pack-quantized"), "vllm", "format", "refuses"),
    ("ct", lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="group"), "vllm", "strategy", "refuses"),
    ("ct", lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32), "vllm", "group_size", "refuses"),
    ("ct", lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8), "vllm", "num_bits", "refuses"),
    ("ct", lambda q: q["config_groups"]["group_0"]["weights"].update(colour="red"), "vllm", "weights", "refuses"),
    ("ct4", lambda q: q["config_groups"]["group_0"].update(input_activations=None), "vllm", "input_global_scale", ""),
    ("ct4", lambda q: q.update(kv_cache_scheme=None), "vllm", "KV cache", "scale 1"),
    ("ct4", lambda q: q["kv_cache_scheme"].update(num_bits=4), "vllm", "kv_cache_scheme.num_bits", "refuses"),
    ("modelopt", lambda q: q.update(ignore=["lm_head", "model.embed_tokens", Q[:-4]]), "vllm", "ignore", "dense one"),
    ("modelopt", lambda q: q.update(quant_algo="NVFP4"), "vllm", "config_groups", "wrong weights"),
    ("modelopt", lambda q: q.pop("ignore"), "vllm", "ignore", "refuses"),
    ("modelopt4", lambda q: q.pop("kv_cache_scheme"), "tensorrt-llm", "kv_cache_quant_algo", "wrong weights"),
    ("ours", lambda q: q.update(format_version=2), "transformers", "format_version", "refuses"),
    ("ct", lambda q: q.update(config_groups={}), "vllm", "config_groups", "refuses"),
    ("ct", lambda q: q.update(config_groups={"NVFP4A16": ["Linear"]}), "vllm", "config_groups", "refuses"),
    ("ct", lambda q: q.update(ignore=["re:("]), "transformers", "ignore", "uninitialised"),
    ("ct", lambda q: q.update(ignore=["re:(.*a)*(.*b)*(.*c)*d"]), "transformers", "ignore", "uninitialised"),
    ("modelopt", lambda q: q.update(kv_cache_scheme="FP8"), "vllm", "kv_cache_scheme", "refuses"),
    ("modelopt", lambda q: q.update(ignore=["*.q_proj", "lm_head"]), "sglang", "ignore", "wrong weights"),
]


@pytest.mark.parametrize(("name", "change", "target", "where", "otherwise"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_that_breaks_an_engine_is_named_with_what_would_happen(
    name, change, target, where, otherwise, exports, tmp_path
):
    shutil.copytree(exports / name, tmp_path / "copy")
    file = tmp_path / "copy/config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    assert [p for p in check_schema(tmp_path / "copy", target) if where in p.where and otherwise in p.otherwise]


def test_modelopts_nested_config_must_be_there_and_agree(exports, tmp_path):
    shutil.copytree(exports / "modelopt", tmp_path / "copy")
    file = tmp_path / "copy/hf_quant_config.json"
    nested = json.loads(file.read_text())
    del nested["quantization"]["kv_cache_quant_algo"]
    file.write_text(json.dumps(nested))
    (problem,) = check_schema(tmp_path / "copy", "tensorrt-llm")
    assert problem.got == "no kv_cache_quant_algo"
    file.unlink()
    (problem,) = check_schema(tmp_path / "copy", "tensorrt-llm")
    assert problem.where == str(file)


def test_a_dense_partner_and_an_unlisted_dense_linear_are_found(exports, tmp_path):
    shutil.copytree(exports / "ct", tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    tensors = load_file(file)
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale"):
        del tensors[f"{Q}.{leaf}"]
    tensors[f"{Q}.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    first, second = check_schema(tmp_path / "copy", "vllm")
    assert first.got == f"no {Q}"
    assert second.where == "model.layers.0.self_attn"
    assert "only model.layers.0.self_attn.k_proj" in second.got


def test_a_dense_directory_is_no_quantized_checkpoint(state, tmp_path):
    state.tiny_model("llama").save_pretrained(tmp_path / "dense")
    (problem,) = check_schema(tmp_path / "dense", "vllm")
    assert problem.got == "None"


def test_an_export_that_its_engine_would_not_take_is_not_published(state, tmp_path, monkeypatch):
    """The check runs on the staged files themselves: here the table forgets that vLLM takes weight-only files."""
    rows = tuple(row for row in ACCEPTED if row.engine != "vllm" or row.method != "compressed-tensors")
    monkeypatch.setattr(schemas, "ACCEPTED", rows)
    model = state.tiny_model("llama")
    state.pack(model)
    with pytest.raises(ExportError, match=r"quant_method: expected modelopt, for vllm; got 'compressed-tensors'"):
        export(model, tmp_path / "out", target="vllm")
    assert list(tmp_path.iterdir()) == []
    assert serving.check_schema is schemas.check_schema
