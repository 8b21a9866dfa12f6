"""A directory appears whole or not at all, with its bytes on disk before its name."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qerl_compile.errors import ExportError
from qerl_compile.staged_write import refuse_existing, staged_directory


def test_the_directory_appears_only_when_the_block_ends(tmp_path):
    out = tmp_path / "deep/er/out"
    with staged_directory(out) as stage:
        (stage / "a").write_text("1")
        (stage / "sub").mkdir()
        (stage / "sub/b").write_text("2")
        assert not out.exists()
        assert stage.parent == out.parent
    assert (out / "a").read_text() == "1"
    assert (out / "sub/b").read_text() == "2"
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_nothing(tmp_path, fault):
    with pytest.raises(fault), staged_directory(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
        raise fault
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["the system's", "safetensors'"],
)
def test_a_full_disk_is_said_in_words_and_leaves_nothing(tmp_path, fault):
    with (
        pytest.raises(ExportError, match=r"out: expected room.*No space left.*Make room"),
        staged_directory(tmp_path / "out") as stage,
    ):
        (stage / "a").write_text("1")
        raise fault
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_name_is_refused_before_the_work(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ExportError, match=r"out: expected an output directory that does not exist yet; got an existing"
    ):
        refuse_existing(out)
    with pytest.raises(ExportError, match="an existing one"), staged_directory(out):
        pytest.fail("the block must not run")


def test_a_directory_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="an existing one"), staged_directory(out) as stage:
        (stage / "a").write_text("ours")
        out.mkdir()
    assert list(out.iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_place_where_nothing_can_be_made_is_refused_with_the_systems_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"a place where a directory can be made; got (Not a directory|File exists)"):
        staged_directory(tmp_path / "file/out").__enter__()


def test_files_are_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor):
        events.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def rename(self, target):
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with staged_directory(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
        (stage / "sub").mkdir()
        (stage / "sub/b").write_text("2")
    assert sorted(events[:3]) == ["sync a", "sync b", "sync sub"]
    assert events.index("sync b") < events.index("sync sub")
    assert events[3:] == [f"sync {stage.name}", "rename", f"sync {tmp_path.name}"]
