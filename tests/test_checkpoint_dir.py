"""Healthy model directories open; every hostile one is refused in words that name what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import CheckpointError
from tests.attacks import directories, headers, indexes  # noqa: F401  # importing registers their attacks
from tests.attacks.making import ATTACKS, CONFIG, dumped, entry, healthy, healthy_sharded, hub_cache, with_header

REPOSITORY = Path(__file__).parent.parent


def test_a_healthy_directory_opens_with_absolute_byte_ranges(tmp_path: Path) -> None:
    save_file(
        {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt", "author": "Zoë 😀"},
    )
    (tmp_path / "config.json").write_bytes(dumped(CONFIG))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == CONFIG
    assert checkpoint.shards == (tmp_path / "model.safetensors",)
    b = checkpoint.tensors["b"]
    assert (b.dtype, b.shape, b.size_bytes) == ("F32", (2, 3), 24)
    raw = b.file.read_bytes()[b.begin : b.end]
    assert torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    header = {"late": entry("U8", [2], 2, 4), "early": entry("U8", [2], 0, 2)}
    assert list(open_checkpoint(with_header(tmp_path, header, data_bytes=4)).tensors) == ["early", "late"]


def test_a_sharded_directory_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(healthy_sharded(tmp_path))
    assert [shard.name for shard in checkpoint.shards] == ["model-1.safetensors", "model-2.safetensors"]
    assert {name: e.file.name for name, e in checkpoint.tensors.items()} == {
        "a.weight": "model-1.safetensors",
        "b.weight": "model-2.safetensors",
    }


def test_a_hub_cache_opens_although_its_files_are_links_to_blobs(tmp_path: Path) -> None:
    assert set(open_checkpoint(hub_cache(tmp_path)).tensors) == {"a.weight", "b.weight"}


def test_a_link_within_the_directory_is_followed(tmp_path: Path) -> None:
    (healthy(tmp_path) / "model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "model.safetensors").symlink_to("weights")
    assert len(open_checkpoint(tmp_path).tensors) == 2


def test_the_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    healthy(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    assert len(open_checkpoint(tmp_path / "link").tensors) == 2


def test_empty_tensors_and_padding_spaces_are_part_of_the_format(tmp_path: Path) -> None:
    header = {"none": entry("F32", [0, 5], 0, 0), "scalar": entry("F32", [], 0, 4)}
    checkpoint = open_checkpoint(with_header(tmp_path, dumped(header) + b"     ", data_bytes=4))
    assert checkpoint.tensors["scalar"].shape == ()


def test_other_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    healthy(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not ours to read")
    (tmp_path / "README.md").write_text("# A model")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "weights.pth").write_bytes(b"nobody reads a folder")
    assert len(open_checkpoint(tmp_path).tensors) == 2


@pytest.mark.parametrize("name", ["a_python_file", "config_maps_classes_to_code", "generation_code"])
def test_trust_remote_code_lifts_the_refusal_of_code(name: str, tmp_path: Path) -> None:
    path = ATTACKS[name].build(tmp_path)
    assert len(open_checkpoint(path, trust_remote_code=True).tensors) == 2


@pytest.mark.parametrize("name", ["a_pickle_of_weights", "the_shard_is_a_link_to_outside", "a_gap"])
def test_trust_remote_code_lifts_nothing_else(name: str, tmp_path: Path) -> None:
    path = ATTACKS[name].build(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path, trust_remote_code=True)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_a_path_that_no_system_takes_is_refused(path: str) -> None:
    with pytest.raises(CheckpointError, match="expected a model directory; got nothing there"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_each_attack_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = ATTACKS[name].build(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    message = str(refusal.value)
    for words in ATTACKS[name].words:
        assert words in message
    assert len(message) < 1000 + len(str(path)) * 2
    assert message.isprintable()


def test_each_attack_differs_from_a_healthy_directory_by_one_thing() -> None:
    assert len(ATTACKS) >= 30


def watched(*paths: Path) -> dict[str, dict[str, Any]]:
    """What a process of its own saw while it opened the directories; the first one is healthy and only warms it up."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "attacks" / "watch.py")],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    return json.loads(done.stdout)


def test_no_file_outside_is_opened_and_nothing_is_run(tmp_path: Path) -> None:
    cache = hub_cache(tmp_path / "cache")
    paths = []
    for name, attack in ATTACKS.items():
        (tmp_path / name).mkdir()
        paths.append(attack.build(tmp_path / name))
    reports = watched(healthy(tmp_path / "healthy"), cache, *paths)
    assert reports[str(cache)]["outcome"] == "accepted"
    assert len(reports[str(cache)]["inside"]) == 2, "the watcher sees config and shard being opened"
    for path in paths:
        assert reports[str(path)]["outcome"].startswith("refused: ")
    assert [path for path, report in reports.items() if "outside" in report or "forbidden" in report] == []


@pytest.mark.parametrize(
    "name",
    [
        "a_header_that_is_as_large_as_allowed",
        "an_index_that_is_as_large_as_allowed",
        "an_index_that_is_a_memory_bomb",
        "config_is_a_memory_bomb",
        "more_tensors_with_an_emoji_among_them",
        "metadata_of_ten_megabytes",
    ],
)
def test_64_mb_suffice_to_refuse(name: str, tmp_path: Path) -> None:
    path = ATTACKS[name].build(tmp_path)
    report = watched(healthy(tmp_path / "healthy"), path)[str(path)]
    assert report["outcome"].startswith("refused: ")
    assert report["grown_mb"] < 64
