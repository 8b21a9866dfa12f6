"""Attacks by what lies in the directory and what its configs say."""

import os
from pathlib import Path

from tests.attacks.making import CONFIG, attack, dumped, healthy, hub_cache

PICKLE = b"cos\nsystem\n(S'echo owned'\ntR."


@attack("expected a model directory", "a file")
def a_file_in_place_of_a_directory(root: Path) -> Path:
    (root / "model.safetensors").write_bytes(b"")
    return root / "model.safetensors"


@attack("expected a model directory", "nothing there")
def no_directory_at_all(root: Path) -> Path:
    return root / "absent"


@attack("expected a config.json", "none")
def no_config(root: Path) -> Path:
    (healthy(root) / "config.json").unlink()
    return root


@attack("adapter without its base model")
def an_adapter_alone(root: Path) -> Path:
    (healthy(root) / "config.json").rename(root / "adapter_config.json")
    return root


@attack("config.json", "JSON in UTF-8")
def config_is_no_json(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b"{'model_type': 'llama'}")
    return root


@attack("config.json", "JSON in UTF-8")
def config_is_no_utf8(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b'{"model_type": "\xff"}')
    return root


@attack("config.json", "a JSON object")
def config_is_a_list(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(dumped([CONFIG]))
    return root


@attack("config.json", "at most 4000000 bytes")
def config_is_huge(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b" " * 5_000_000)
    return root


@attack("config.json", "moderate depth")
def config_is_deep(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    return root


@attack("config.json", "JSON values")
def config_is_a_memory_bomb(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b'{"a":[' + b"[]," * 1_200_000 + b"0]}")
    return root


@attack("config.json", "each key once", "'model_type'")
def config_has_a_key_twice(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b'{"model_type": "llama", "model_type": "qwen2"}')
    return root


@attack("config.json", "JSON in UTF-8", "4300 digits")
def config_has_an_endless_integer(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b'{"model_type": ' + b"9" * 5000 + b"}")
    return root


@attack("config.json: model_type", "None")
def config_names_no_family(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(b"{}")
    return root


@attack("config.json", "a named pipe")
def config_is_a_pipe(root: Path) -> Path:
    (healthy(root) / "config.json").unlink()
    os.mkfifo(root / "config.json")
    return root


@attack("config.json", "links that stay")
def config_is_a_link_to_outside(root: Path) -> Path:
    (root / "secret.json").write_bytes(dumped(CONFIG))
    inside = healthy(root / "inside")
    (inside / "config.json").unlink()
    (inside / "config.json").symlink_to("../secret.json")
    return inside


@attack("tokenizer.json", "which does not exist")
def a_file_is_a_link_to_nothing(root: Path) -> Path:
    (healthy(root) / "tokenizer.json").symlink_to("nowhere")
    return root


@attack("model.safetensors", "links that stay")
def the_shard_is_a_link_to_outside(root: Path) -> Path:
    outside, inside = healthy(root / "outside"), healthy(root / "inside")
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    return inside


@attack("model.safetensors", "links that stay")
def a_link_to_a_sibling_whose_name_begins_alike(root: Path) -> Path:
    outside, inside = healthy(root / "inside-too"), healthy(root / "inside")
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    return inside


@attack("extra", "links that stay")
def a_folder_is_a_link_to_outside(root: Path) -> Path:
    inside = healthy(root / "inside")
    (inside / "extra").symlink_to("/etc")
    return inside


@attack("model.safetensors", "links that stay")
def a_link_in_two_hops_to_outside(root: Path) -> Path:
    outside, inside = healthy(root / "outside"), healthy(root / "inside")
    (inside / "hop").symlink_to(outside / "model.safetensors")
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to("hop")
    return inside


@attack("model.safetensors", "links that stay")
def a_hub_cache_that_links_to_another_repository(root: Path) -> Path:
    snapshot = hub_cache(root)
    other = root / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (root / "models--org--name/blobs/sha-model.safetensors").rename(other / "sha")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--org--other/blobs/sha")
    return snapshot


@attack("model.safetensors", "links that stay")
def a_hub_cache_whose_blob_is_a_link_to_outside(root: Path) -> Path:
    snapshot = hub_cache(root)
    blob = root / "models--org--name/blobs/sha-model.safetensors"
    blob.rename(root / "elsewhere.safetensors")
    blob.symlink_to(root / "elsewhere.safetensors")
    return snapshot


@attack("pytorch_model.bin", "a pickle")
def a_pickle_of_weights(root: Path) -> Path:
    (healthy(root) / "pytorch_model.bin").write_bytes(PICKLE)
    return root


@attack("training_args.BIN", "a pickle")
def a_pickle_in_capitals(root: Path) -> Path:
    (healthy(root) / "training_args.BIN").write_bytes(PICKLE)
    return root


@attack("\\x1b[2J.bin", "a pickle")
def a_pickle_whose_name_clears_the_terminal(root: Path) -> Path:
    (healthy(root) / "\x1b[2J.bin").write_bytes(PICKLE)
    return root


@attack("\\udcff.bin", "a pickle")
def a_pickle_whose_name_is_no_utf8(root: Path) -> Path:
    Path(os.fsdecode(os.fsencode(healthy(root)) + b"/\xff.bin")).write_bytes(PICKLE)
    return root


@attack("optimizer.pt", "a pickle")
def a_pickle_of_the_optimizer(root: Path) -> Path:
    (healthy(root) / "optimizer.pt").write_bytes(PICKLE)
    return root


@attack(".metadata", "a pickle")
def a_distributed_checkpoint(root: Path) -> Path:
    (healthy(root) / ".metadata").write_bytes(PICKLE)
    return root


@attack("begins with `{`", "model.safetensors")
def a_pickle_called_safetensors(root: Path) -> Path:
    (healthy(root) / "model.safetensors").write_bytes((30).to_bytes(8, "little") + PICKLE + bytes(8))
    return root


@attack("modeling_x.py", "no code in a model directory")
def a_python_file(root: Path) -> Path:
    (healthy(root) / "modeling_x.py").write_text("raise SystemExit('owned')")
    return root


@attack("custom_generate", "generation code")
def generation_code(root: Path) -> Path:
    folder = healthy(root) / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text("raise SystemExit('owned')")
    return root


@attack("config.json: auto_map", "names no code")
def config_maps_classes_to_code(root: Path) -> Path:
    value = CONFIG | {"auto_map": {"AutoModelForCausalLM": "other/repo--modeling.X"}}
    (healthy(root) / "config.json").write_bytes(dumped(value))
    return root


@attack("config.json: text_config.auto_map", "names no code")
def config_maps_classes_to_code_further_down(root: Path) -> Path:
    value = CONFIG | {"text_config": {"auto_map": {"AutoConfig": "c.C"}}}
    (healthy(root) / "config.json").write_bytes(dumped(value))
    return root


@attack("tokenizer_config.json: auto_map", "names no code")
def tokenizer_config_maps_classes_to_code(root: Path) -> Path:
    (healthy(root) / "tokenizer_config.json").write_bytes(dumped({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    return root


@attack("config.json: attn_implementation", "evil/kernel")
def config_names_a_kernel_on_the_hub(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(dumped(CONFIG | {"attn_implementation": "evil/kernel"}))
    return root


@attack("config.json: parts[0]._attn_implementation_internal", "evil/kernel")
def a_nested_config_names_a_kernel_on_the_hub(root: Path) -> Path:
    value = CONFIG | {"parts": [{"_attn_implementation_internal": {"": "evil/kernel"}}]}
    (healthy(root) / "config.json").write_bytes(dumped(value))
    return root


@attack("config.json: detector.trust_remote_code", "True")
def a_nested_config_trusts_in_our_name(root: Path) -> Path:
    (healthy(root) / "config.json").write_bytes(dumped(CONFIG | {"detector": {"trust_remote_code": True}}))
    return root


@attack("at most 10000 entries")
def ten_thousand_files(root: Path) -> Path:
    healthy(root)
    for number in range(10_000):
        (root / f"{number}.txt").touch()
    return root
