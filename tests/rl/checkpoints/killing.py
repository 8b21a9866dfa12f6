"""Kill a process that does nothing but step and save, at random moments, and let the next one go on."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qerl_compile.rl.checkpoints import latest, restore
from tests.rl.checkpoints.world import Toy, adamw, go_on, same, seed_all, state_of, who

LONG = 10**6


@dataclass(frozen=True)
class Kills:
    """What many kills left behind.

    Args:
        kills: processes killed by SIGKILL.
        in_save: of these, how many left an unfinished directory: the kill came in the middle of a save.
        none: after how many there was no checkpoint yet.
        damaged: visible checkpoints that were not whole, over all kills.
        last: step of the newest checkpoint in the end.
        same_as_uninterrupted: whether its state is, bit by bit, that of a run that nobody killed.
    """

    kills: int
    in_save: int
    none: int
    damaged: int
    last: int
    same_as_uninterrupted: bool


def forked(work: Callable[[], object]) -> int:
    """Start `work` in a child and return its id; the child ends with 0, or with 8 and a traceback."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(8)
    return child


def ended(child: int) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_often(run_dir: Path, kills: int, seed: int = 0) -> Kills:
    """Kill `kills` processes in one run directory, each at a moment drawn at random, soon after it began.

    Raises:
        AssertionError: a child ended by itself, or a newest checkpoint does not load.
    """
    draw = random.Random(seed)  # noqa: S311
    import peft  # noqa: F401  # 8 s that each child would spend before its first save

    in_save = none = damaged = 0
    seen: set[str] = set()
    for _ in range(kills):
        child = forked(lambda: go_on(run_dir, LONG))
        time.sleep(draw.uniform(0.01, 0.25))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        folder = run_dir / "checkpoints"
        partial = {entry.name for entry in folder.glob(".*.partial")}
        in_save += bool(partial - seen)
        seen |= partial
        found, rejected = latest(run_dir)
        damaged += len(rejected)
        if found is None:
            none += 1
            continue
        model = Toy()
        restore(found, who(model), model, adamw(model))
    found, _ = latest(run_dir)
    assert found is not None
    last = found.progress.step
    model = Toy()
    optimizer = adamw(model)
    restore(found, who(model), model, optimizer)
    state = state_of(model, optimizer)
    return Kills(kills, in_save, none, damaged, last, same(state, _uninterrupted(last)))


def _uninterrupted(last: int) -> dict:
    from tests.rl.checkpoints.world import one_step

    model = Toy()
    optimizer = adamw(model)
    seed_all(0)
    for _ in range(last):
        one_step(model, optimizer)
    return state_of(model, optimizer)
