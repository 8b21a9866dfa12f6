"""A save that is stopped at any of its file operations leaves the old newest checkpoint or the new one, complete."""

import itertools
import os
import random
import resource
import shutil
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from qerl_compile.errors import ExportError
from qerl_compile.rl.checkpoints import latest, restore, save
from tests.models import LONG
from tests.rl.checkpoints.crashing import BROKEN, NOT_REACHED, REACHED, REFUSED, run_to_crash
from tests.rl.checkpoints.killing import ended, forked
from tests.rl.checkpoints.world import Toy, adamw, one_step, progress, same, seed_all, state_of, who

OLD, NEW = 1, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with the checkpoint of step OLD, the state at both steps, and the model and optimizer at step NEW."""
    root = tmp_path_factory.mktemp("run")
    model = Toy()
    optimizer = adamw(model)
    seed_all(3)
    states = {}
    for step in (OLD, NEW):
        one_step(model, optimizer)
        states[step] = state_of(model, optimizer)
        if step == OLD:
            save(root, who(model), progress(OLD), model, optimizer)
    return root, states, model, optimizer


@pytest.fixture
def scratch():
    """A folder in memory where there is one: a thousand saves wait for the disk otherwise, and no disk is tested."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def first(root):
    """There is no checkpoint yet."""
    shutil.rmtree(root / "checkpoints")


def next_one(root):
    """There is one, which goes when the new one is there, and the rest of a killed save."""
    shutil.copytree(root / "checkpoints/step-000001", root / "checkpoints/.step-000002.00000000.partial")


def in_place_of_a_damaged_one(root):
    """There is a newer one under the new one's name, damaged, and one of a later step."""
    for name in ("step-000002", "step-000003"):
        shutil.copytree(root / "checkpoints/step-000001", root / "checkpoints" / name)


def set_generators(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


@pytest.mark.timeout(900)  # some 400 processes on a shared machine
@pytest.mark.parametrize(
    "before, kill",
    list(itertools.product([first, next_one, in_place_of_a_damaged_one], [True, False]))
    if LONG
    else [(in_place_of_a_damaged_one, True)],
    ids=lambda value: {True: "killed", False: "failing"}.get(value) if isinstance(value, bool) else value.__name__,
)
def test_every_crash_point_leaves_a_whole_newest_checkpoint(world, scratch, before, kill):
    start, states, model, optimizer = world
    seen = {}
    for k in count(1):
        root = scratch / str(k)
        shutil.copytree(start, root)
        before(root)

        def work(root=root):
            set_generators(states[NEW])  # here, because Python seeds its own anew in a forked child
            save(root, who(model), progress(NEW), model, optimizer, kept=1)

        status = run_to_crash(root, k, work, kill=kill)
        assert status != BROKEN, k
        if status == NOT_REACHED:
            break
        found, _ = latest(root)
        seen[k] = None if found is None else found.progress.step
        assert seen[k] in ((None, NEW) if before is first else (OLD, NEW)), k
        if found is not None:
            again = Toy()
            restored = adamw(again)
            assert restore(found, who(again), again, restored) == progress(found.progress.step)
            assert same(state_of(again, restored), states[found.progress.step]), k
        work()  # whoever comes next finds no obstacle, and clears up
        assert [entry.name for entry in (root / "checkpoints").iterdir()] == ["step-000002"]
        assert status in ((REACHED,) if kill else (REACHED, REFUSED))
        shutil.rmtree(root)
    assert len(seen) > 40
    steps = list(seen.values())
    if kill:
        assert steps == sorted(steps, key=lambda step: step or 0)  # old up to the rename, new from there on
    assert set(steps) == ({None, NEW} if before is first else {OLD, NEW})


def test_a_full_disk_is_told_as_one_whether_python_or_safetensors_meets_it(tmp_path):
    model = Toy(rank=2000)
    optimizer = adamw(model)
    save(tmp_path, who(model), progress(OLD), model, optimizer)
    one_step(model, optimizer)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # less than the adapter's and the optimizer's file
        try:
            save(tmp_path, who(model), progress(NEW), model, optimizer)
        except ExportError as fault:
            ok = "expected room and permission for a checkpoint; got " in str(fault) and "Make room on that" in fault.do
            os._exit(REFUSED if ok else BROKEN)

    assert ended(forked(limited)) == REFUSED
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert latest(tmp_path)[0].progress.step == OLD
