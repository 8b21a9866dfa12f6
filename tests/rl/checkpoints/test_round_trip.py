"""Saved and loaded, a run goes on with the same bits: parameters, optimizer, draws."""

import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from qerl_compile.rl.checkpoints import latest, restore, save
from tests.rl.checkpoints.world import Toy, adamw, one_step, progress, same, seed_all, state_of, trained, who

OPTIMIZERS = {
    "AdamW": adamw,
    "AdamW amsgrad": lambda model: torch.optim.AdamW(trained(model), amsgrad=True),
    "SGD with momentum": lambda model: torch.optim.SGD(trained(model), lr=1e-3, momentum=0.9),
    "SGD, which has no state": lambda model: torch.optim.SGD(trained(model), lr=1e-3),
    "Adafactor": lambda model: torch.optim.Adafactor(trained(model)),
    "ASGD": lambda model: torch.optim.ASGD(trained(model)),
    "two groups": lambda model: torch.optim.AdamW(
        [{"params": trained(model)[:2], "lr": 1e-3}, {"params": trained(model)[2:], "weight_decay": 0.0}]
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_four_steps_and_four_after_a_restore_equal_eight(tmp_path, kind):
    make, straight = OPTIMIZERS[kind], Toy()
    optimizer = make(straight)
    seed_all(1)
    draws = [one_step(straight, optimizer) for _ in range(8)]
    end = state_of(straight, optimizer)

    first = Toy()
    optimizer = make(first)
    seed_all(1)
    assert [one_step(first, optimizer) for _ in range(4)] == draws[:4]
    save(tmp_path, who(first), progress(4), first, optimizer)

    second = Toy()
    with torch.no_grad():
        for parameter in trained(second):
            parameter.add_(1)  # whatever it is before, it must be gone
    optimizer = make(second)
    seed_all(99)
    found, rejected = latest(tmp_path)
    assert found is not None
    assert rejected == []
    assert restore(found, who(second), second, optimizer) == progress(4)
    assert [one_step(second, optimizer) for _ in range(4)] == draws[4:]
    assert same(state_of(second, optimizer), end)


def test_state_of_another_dtype_than_its_parameter_comes_back_unrounded(tmp_path):
    class Wide(torch.optim.SGD):
        """Keeps a float32 sum of the gradients of bf16 parameters."""

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                total = self.state[p].setdefault("total", torch.zeros(p.shape, dtype=torch.float32))
                total += p.grad.float() / 3
            return super().step(closure)

    model = Toy(dtype=torch.bfloat16)
    optimizer = Wide(trained(model), lr=0.1)
    one_step(model, optimizer)
    save(tmp_path, who(model), progress(1), model, optimizer)
    want = state_of(model, optimizer)
    again = Toy(dtype=torch.bfloat16)
    optimizer = Wide(trained(again), lr=0.1)
    restore(latest(tmp_path)[0], who(again), again, optimizer)
    assert same(state_of(again, optimizer), want)
    assert want["optimizer"][0]["total"].dtype == torch.float32


def test_progress_says_where_the_run_is_and_what_it_is(tmp_path):
    model = Toy()
    told = progress(7, bad_steps=1, stage=2, extra={"rewards": [0.1, 1.0], "note": None})
    directory = save(tmp_path, who(model, world_size=2), told, model, adamw(model))
    assert directory == tmp_path / "checkpoints" / "step-000007"
    data = json.loads((directory / "progress.json").read_text())
    assert data["recipe"]["train"]["steps"] == 600
    assert data["versions"]["torch"] == version("torch")
    found, _ = latest(tmp_path)
    assert found.progress == told
    assert found.identity == who(model, world_size=2)
    assert found.identity.base == "toy"


def test_the_adapter_in_a_checkpoint_is_a_peft_directory_that_loads_by_itself(tmp_path):
    from qerl_compile.adapter_reading import read_adapter

    model = Toy()
    one_step(model, adamw(model))
    save(tmp_path, who(model), progress(1), model, adamw(model))
    other = Toy()
    read_adapter(other, latest(tmp_path)[0].adapter)
    assert same(dict(other.named_parameters()), dict(model.named_parameters()))


def test_as_many_as_wished_are_kept_and_what_lies_after_the_present_is_taken_away(tmp_path):
    model = Toy()
    optimizer = adamw(model)

    def there():
        return sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir())

    for step in (1, 2, 3, 4):
        save(tmp_path, who(model), progress(step), model, optimizer, kept=3)
    assert there() == ["step-000002", "step-000003", "step-000004"]
    for name in ("step-000003", "step-000004"):
        (tmp_path / "checkpoints" / name / "progress.json").unlink()
    found, rejected = latest(tmp_path)
    assert found.progress.step == 2
    assert len(rejected) == 2
    save(tmp_path, who(model), progress(3), model, optimizer, kept=3)  # under the name of a damaged one
    assert there() == ["step-000002", "step-000003"]
    assert latest(tmp_path)[0].progress.step == 3


def test_a_whole_checkpoint_of_the_same_step_is_left_as_it_is_and_one_of_another_course_is_refused(tmp_path):
    from qerl_compile.errors import ExportError

    model = Toy()
    directory = save(tmp_path, who(model), progress(1), model, adamw(model))
    before = {file: file.stat().st_mtime_ns for file in directory.rglob("*")}
    save(tmp_path, who(model, base="moved/toy"), progress(1), model, adamw(model))
    assert {file: file.stat().st_mtime_ns for file in directory.rglob("*")} == before
    with pytest.raises(ExportError, match="a whole one of another run or course"):
        save(tmp_path, who(model), progress(1, seen_tokens=5), model, adamw(model))
    assert latest(tmp_path)[0].progress == progress(1)


def test_what_killed_saves_left_behind_is_removed_and_nothing_else(tmp_path):
    model = Toy()
    folder = tmp_path / "checkpoints"
    for name in (".step-000001.0123abcd.partial", ".step-000001.0123abcd.del", "notes", ".step-x.partial"):
        (folder / name / "adapter").mkdir(parents=True)
    (folder / ".step-000002.0123abcd.del").symlink_to(folder / "notes")
    save(tmp_path, who(model), progress(3), model, adamw(model))
    assert sorted(entry.name for entry in folder.iterdir()) == [".step-x.partial", "notes", "step-000003"]
    assert (folder / "notes/adapter").is_dir()


def test_every_file_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda d: (events.append(Path(f"/proc/self/fd/{d}").readlink()), real_fsync(d)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), real_rename(self, to))[1])
    model = Toy()
    directory = save(tmp_path, who(model), progress(1), model, adamw(model))
    at = events.index("rename")
    stage = events[at - 1]  # the directory itself, after what is in it
    assert stage.name.startswith(".step-000001.")
    files = {file.relative_to(directory) for file in directory.rglob("*")}
    assert {path.relative_to(stage) for path in events[: at - 1]} == files
    assert events[at + 1 :] == [directory.parent]
