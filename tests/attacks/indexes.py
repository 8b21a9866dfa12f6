"""Attacks in the shard index, and in how it and the shards disagree."""

from pathlib import Path

from tests.attacks.making import attack, dumped, entry, healthy, healthy_sharded, packed, write_index


@attack("model.safetensors or model.safetensors.index.json", "neither")
def no_weights(root: Path) -> Path:
    (healthy(root) / "model.safetensors").unlink()
    return root


def _leads_to(root: Path, shard: object) -> Path:
    healthy(root / "outside")
    inside = healthy_sharded(root / "inside")
    return write_index(inside, {"a.weight": "model-1.safetensors", "b.weight": shard})


@attack("weight_map['b.weight']", "plain name", "'../outside/model.safetensors'")
def a_shard_in_the_folder_above(root: Path) -> Path:
    return _leads_to(root, "../outside/model.safetensors")


@attack("weight_map['b.weight']", "plain name")
def a_shard_by_absolute_path(root: Path) -> Path:
    return _leads_to(root, str(root / "outside" / "model.safetensors"))


@attack("weight_map['b.weight']", "plain name")
def a_shard_in_a_folder_below(root: Path) -> Path:
    return _leads_to(root, "sub/model.safetensors")


@attack("weight_map['b.weight']", "plain name")
def a_shard_behind_a_backslash(root: Path) -> Path:
    return _leads_to(root, "..\\outside\\model.safetensors")


@attack("weight_map['b.weight']", "plain name")
def a_shard_by_url(root: Path) -> Path:
    return _leads_to(root, "file:///etc/x.safetensors")


@attack("weight_map['b.weight']", "plain name")
def a_shard_with_a_nul(root: Path) -> Path:
    return _leads_to(root, "model-2.safetensors\0.safetensors")


@attack("weight_map['b.weight']", "plain name")
def a_shard_of_another_kind(root: Path) -> Path:
    return _leads_to(root, "config.json")


@attack("weight_map['b.weight']", "plain name")
def a_shard_that_is_hidden(root: Path) -> Path:
    return _leads_to(root, "..safetensors")


@attack("weight_map['b.weight']", "plain name", "['model-2.safetensors']")
def a_shard_that_is_a_list(root: Path) -> Path:
    return _leads_to(root, ["model-2.safetensors"])


@attack("tensor names", "'../a'")
def an_index_name_that_climbs(root: Path) -> Path:
    return write_index(healthy_sharded(root), {"../a": "model-1.safetensors"})


@attack("every shard it names", "'model-2.safetensors'")
def a_missing_shard(root: Path) -> Path:
    (healthy_sharded(root) / "model-2.safetensors").unlink()
    return root


@attack("tensor 'c.weight' in model-2.safetensors", "listed but in no shard")
def a_tensor_that_is_listed_but_absent(root: Path) -> Path:
    both = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    return write_index(healthy_sharded(root), both | {"c.weight": "model-2.safetensors"})


@attack("model-2.safetensors", "only tensors that the index lists", "'c.weight'")
def a_tensor_that_is_present_but_not_listed(root: Path) -> Path:
    header = {"b.weight": entry("BF16", [2, 16], 0, 64), "c.weight": entry("U8", [4], 64, 68)}
    (healthy_sharded(root) / "model-2.safetensors").write_bytes(packed(dumped(header), bytes(68)))
    return root


@attack("weight_map['a.weight']", "the shard that holds it, model-1.safetensors")
def a_tensor_that_is_in_another_shard(root: Path) -> Path:
    return write_index(healthy_sharded(root), {"a.weight": "model-2.safetensors", "b.weight": "model-1.safetensors"})


@attack("each tensor in one shard", "'a.weight'")
def a_tensor_in_two_shards(root: Path) -> Path:
    healthy_sharded(root)
    (root / "model-2.safetensors").write_bytes((root / "model-1.safetensors").read_bytes())
    return root


@attack("no weights but", "'model-3.safetensors'")
def a_shard_that_the_index_does_not_name(root: Path) -> Path:
    healthy_sharded(root)
    (root / "model-3.safetensors").write_bytes((root / "model-1.safetensors").read_bytes())
    return root


@attack("no weights but", "'model.safetensors'")
def one_file_beside_an_index(root: Path) -> Path:
    healthy_sharded(root)
    healthy(root)
    return root


@attack("index.json: weight_map", "None")
def an_index_without_a_map(root: Path) -> Path:
    (healthy_sharded(root) / "model.safetensors.index.json").write_bytes(b"{}")
    return root


@attack("index.json: weight_map", "[]")
def an_index_whose_map_is_a_list(root: Path) -> Path:
    return write_index(healthy_sharded(root), [])


@attack("index.json: weight_map", "None")
def an_index_that_is_a_list(root: Path) -> Path:
    (healthy_sharded(root) / "model.safetensors.index.json").write_bytes(b"[]")
    return root


@attack("index.json", "each key once", "'a.weight'")
def an_index_with_a_tensor_twice(root: Path) -> Path:
    raw = b'{"weight_map": {"a.weight": "model-1.safetensors", "a.weight": "model-2.safetensors"}}'
    (healthy_sharded(root) / "model.safetensors.index.json").write_bytes(raw)
    return root


@attack("index.json", "at most 12000000 bytes")
def an_index_of_17_mb(root: Path) -> Path:
    (healthy_sharded(root) / "model.safetensors.index.json").write_bytes(b" " * 17_000_000)
    return root


@attack("index.json", "at most 101000 JSON values", "up to 15000")
def an_index_of_150_000_tensors(root: Path) -> Path:
    return write_index(healthy_sharded(root), {f"{n:040}": "model-1.safetensors" for n in range(150_000)})


@attack("index.json", "JSON values")
def an_index_that_is_a_memory_bomb(root: Path) -> Path:
    raw = b'{"weight_map": [' + b"{}," * 3_900_000 + b"0]}"
    (healthy_sharded(root) / "model.safetensors.index.json").write_bytes(raw)
    return root


@attack("model.safetensors.index.json", "links that stay")
def an_index_that_is_a_link_to_outside(root: Path) -> Path:
    inside = healthy_sharded(root / "inside")
    (inside / "model.safetensors.index.json").rename(root / "index.json")
    (inside / "model.safetensors.index.json").symlink_to("../index.json")
    return inside


@attack("listed but in no shard", "and 99995 more")
def an_index_that_is_as_large_as_allowed(root: Path) -> Path:
    (healthy_sharded(root) / "model-2.safetensors").unlink()
    return write_index(root, {f"{n:076}": "model-1.safetensors" for n in range(100_000)})
