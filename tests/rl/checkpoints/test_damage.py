"""Whatever happens to the newest checkpoint's files, it is noticed, named, and the one before it is used."""

import shutil

import pytest

from qerl_compile.errors import CheckpointError
from qerl_compile.rl.checkpoints import latest, save
from qerl_compile.rl.checkpoints.manifest import FILES, MANIFEST
from tests.rl.checkpoints.damage import WAYS, damage
from tests.rl.checkpoints.world import Toy, adamw, one_step, progress, who


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("run")
    model = Toy()
    optimizer = adamw(model)
    for step in (1, 2):
        one_step(model, optimizer)
        save(root, who(model), progress(step), model, optimizer)
    return root


@pytest.mark.parametrize("seed", range(100))
def test_random_damage_is_noticed_and_the_one_before_is_used(run, tmp_path, seed):
    root = shutil.copytree(run, tmp_path / "run")
    newest = root / "checkpoints/step-000002"
    what = damage(newest, seed)
    found, rejected = latest(root)
    assert found is not None
    assert found.progress.step == 1, what
    assert [each.directory for each in rejected] == [newest]
    assert str(newest) in rejected[0].reason


def test_a_hundred_seeds_take_every_way():
    assert {WAYS[seed % len(WAYS)] for seed in range(100)} == set(WAYS)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_bit_of_a_byte_counts_in_every_file(run, tmp_path, name):
    root = shutil.copytree(run, tmp_path / "run")
    file = root / "checkpoints/step-000002" / name
    whole = file.read_bytes()
    for at in {0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            file.write_bytes(data)
            found, rejected = latest(root)
            assert found is not None
            assert (found.progress.step, len(rejected)) == (1, 1), (at, bit)
    file.write_bytes(whole)
    assert latest(root)[0].progress.step == 2


def test_the_reason_names_file_and_what_was_expected_and_got(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "run")
    newest = root / "checkpoints/step-000002"
    file = newest / "optimizer.safetensors"
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    [rejected] = latest(root)[1]
    assert rejected.reason.startswith(f"{file}: expected sha256 ")
    file.write_bytes(bytes(size - 1))
    [rejected] = latest(root)[1]
    assert rejected.reason.startswith(f"{file}: expected {size} bytes; got {size - 1}.")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "run")
    for name in ("step-000001", "step-000002"):
        (root / "checkpoints" / name / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"a checkpoint that is whole; got 2 damaged; the newest: .*a manifest"):
        latest(root)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert latest(tmp_path) == (None, [])
    (tmp_path / "checkpoints/.step-000001.0123abcd.partial").mkdir(parents=True)
    (tmp_path / "checkpoints/step-1").mkdir()
    assert latest(tmp_path) == (None, [])


def test_a_directory_that_was_renamed_is_not_taken_for_another_step(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "run")
    (root / "checkpoints/step-000002").rename(root / "checkpoints/step-000009")
    found, rejected = latest(root)
    assert found.progress.step == 1
    assert "expected the name step-000002" in rejected[0].reason
