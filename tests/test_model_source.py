"""A path stays a path; a hub id is fetched, offline from the cache, and never with pickles or code."""

import fnmatch
from pathlib import Path

import pytest

from qerl_compile.errors import CheckpointError
from qerl_compile.model_source import ALLOWED_PATTERNS, IGNORED_PATTERNS, resolve_model
from tests.attacks.making import healthy, hub_cache


def refusal(path_or_id: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(path_or_id)
    return str(caught.value)


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_file_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    file = healthy(tmp_path) / "model.safetensors"
    assert "got a file. Pass the directory that holds config.json" in refusal(str(file))


@pytest.mark.parametrize(
    "text", ["./runs/out", "/nowhere/model", "a/b/c", "a/../b", "", "~", "https://x.y/z", "a b", "x" * 5000]
)
def test_what_cannot_be_a_hub_id_is_refused_without_asking_the_hub(text: str) -> None:
    assert "Check the path." in refusal(text)


def test_an_absent_path_object_is_never_taken_for_a_hub_id() -> None:
    assert "Check the path." in refusal(Path("org/name"))


def test_offline_and_not_in_the_cache_says_what_to_do() -> None:
    message = refusal("some-org/no-such-model-here")
    assert "the hub cannot be reached" in message and "hf download" in message


def test_a_cached_snapshot_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("org/name").resolve() == snapshot.resolve()


@pytest.mark.parametrize(
    ("file", "fetched"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("chat_template.jinja", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("pytorch_model.bin", False),
        ("modeling_x.py", False),
        ("original/params.json", False),
        ("consolidated.safetensors", False),
        ("training_args.bin", False),
    ],
)
def test_only_what_is_needed_leaves_the_hub(file: str, fetched: bool) -> None:
    allowed = any(fnmatch.fnmatch(file, pattern) for pattern in ALLOWED_PATTERNS)
    assert (allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in IGNORED_PATTERNS)) == fetched


def test_weights_stay_on_the_hub_where_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetch(_: str, *, allow_patterns: list[str], **__: object) -> str:
        asked.append(allow_patterns)
        return "here"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    resolve_model("org/name")
    resolve_model("org/name", weights=False)
    everything, less = asked
    assert set(everything) - set(less) == {"*.safetensors"}
