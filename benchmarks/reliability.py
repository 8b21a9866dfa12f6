"""How much of a run is lost when something goes wrong: long versions of what tests/rl/checkpoints does briefly.

    python benchmarks/reliability.py --kills 200          SIGKILL while saving, in one run directory
    python benchmarks/reliability.py --crash-points       a save stopped at each of its file operations
    python benchmarks/reliability.py --syscalls           the same at each system call, by strace
    python benchmarks/reliability.py --damages 1000       random damage to the newest checkpoint
    python benchmarks/reliability.py --sigterms 50        SIGTERM while training; every run is brought to its end
    python benchmarks/reliability.py --resume             20 + 20 steps against 40, at ten stop points, four recipes
    python benchmarks/reliability.py --nans 1000          NaN and Inf put into rollouts, updates, gradients, rewards

Each prints one Markdown row, and nothing is timed but the wait after a SIGTERM. A figure of 0 in N only says that the
rate is below 3 / N (95 %, rule of three); crash points are exhaustive, and say more. All on the CPU.
"""

# ruff: noqa: E402  # a script: it finds its neighbours before it imports them
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from qerl_compile.rl.checkpoints import latest, restore, save
from tests.rl.checkpoints.crashing import BROKEN, NOT_REACHED, run_to_crash
from tests.rl.checkpoints.damage import damage
from tests.rl.checkpoints.killing import ended, forked, kill_often
from tests.rl.checkpoints.not_finite import inject_often
from tests.rl.checkpoints.training import recipe, seed_of_process, sigterm_often, stopped_after, train
from tests.rl.checkpoints.world import Toy, adamw, go_on, one_step, progress, seed_all, who

SYSCALLS = (
    *("openat", "write", "pwrite64", "ftruncate", "close", "fsync"),
    *("rename", "mkdir", "chmod", "unlinkat", "rmdir"),
)
"""What changes files, as strace calls it on Linux x86-64."""


def kills(number: int, folder: Path) -> str:
    result = kill_often(folder, number)
    return (
        f"{result.kills} SIGKILLs, {result.in_save} of them inside a save: {result.damaged} damaged checkpoints, after "
        f"{result.none} there was none yet; step {result.last} has the bits of a run that nobody killed: "
        f"{result.same_as_uninterrupted}"
    )


def crash_points(folder: Path) -> str:
    points: list[int] = []
    for kill in (True, False):
        for k in count(1):
            run = folder / f"{kill}{k}"
            model, optimizer = go_on(run, 1)
            one_step(model, optimizer)

            work = partial(save, run, who(model), progress(2), model, optimizer, kept=1)
            status = run_to_crash(run, k, work, kill=kill)
            if status == BROKEN or not _loads(run):
                return f"BROKEN at operation {k}, {'killed' if kill else 'failing'}"
            shutil.rmtree(run)
            if status == NOT_REACHED:
                points.append(k - 1)
                break
    return (
        f"killed at each of {points[0]} file operations of a save, failed at each of {points[1]}: newest loads always"
    )


def syscalls(folder: Path) -> str:
    """A child stops itself before the save, strace takes hold of it and kills it at the k-th call of a name."""
    points: dict[str, int] = {}
    model, optimizer = go_on(folder / "start", 1)
    one_step(model, optimizer)
    for name in SYSCALLS:
        for k in count(1):
            run = folder / f"{name}{k}"
            shutil.copytree(folder / "start", run)
            status = _killed_at(name, k, lambda run=run: save(run, who(model), progress(2), model, optimizer, kept=1))
            if status not in (0, -signal.SIGKILL) or not _loads(run):
                return f"BROKEN at {name} number {k}: the child ended with {status}"
            shutil.rmtree(run)
            if status == 0:
                points[name] = k - 1
                break
    reached = {name: number for name, number in points.items() if number}
    told = ", ".join(f"{name} {number}" for name, number in reached.items())
    return f"killed at each of {sum(reached.values())} system calls of a save ({told}): newest loads always"


def _killed_at(name: str, k: int, work: Callable[[], object]) -> int:
    def stop_and_work() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    child = forked(stop_and_work)
    os.waitpid(child, os.WUNTRACED)
    options = [f"trace={name}", "-e", f"inject={name}:signal=KILL:when={k}"]
    words = ["strace", "-p", str(child), "-o", os.devnull, "-e", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
        line = strace.stderr.readline() if strace.stderr else ""
        if "attached" not in line:
            raise SystemExit(f"strace cannot be used here: {line}")
        os.kill(child, signal.SIGCONT)
        status = ended(child)
    return status


def damages(number: int, folder: Path) -> str:
    run = folder / "run"
    go_on(run, 2)
    noticed = recovered = 0
    for seed in range(number):
        copy = shutil.copytree(run, folder / "copy")
        damage(copy / "checkpoints/step-000002", seed)
        found, rejected = latest(copy)
        noticed += len(rejected) == 1
        recovered += found is not None and found.progress.step == 1
        shutil.rmtree(copy)
    return f"{number} damages of the newest: {noticed} noticed and named, {recovered} runs fell back to the one before"


def sigterms(number: int, folder: Path) -> str:
    result = sigterm_often(folder, number, steps=40)
    waits = result.waits_s
    return (
        f"{number} SIGTERMs in {result.runs} runs of 40 steps: exit codes {result.codes}, after {result.at_steps} "
        f"different steps; waited {waits[len(waits) // 2]:.2f} s (median), {waits[-1]:.2f} s (longest); "
        f"{result.same_as_uninterrupted} of {result.runs} runs ended with the bits and metrics of an uninterrupted one"
    )


def resume(folder: Path) -> str:
    kinds = {
        "default": {},
        "GSPO, two updates": {"train__loss": "gspo", "train__updates_per_rollout": 2},
        "noise in the update": {"noise__in_update": True},
        "KL, dynamic sampling": {"train__kl_weight": 0.05, "train__dynamic_sampling_rounds": 2},
    }
    told = []
    for kind, changes in kinds.items():
        rules = recipe(40, **changes)
        seed_of_process()
        straight = train(folder / kind / "straight", rules)
        stops = [20, *sorted(random.Random(0).sample([s for s in range(40) if s != 20], 9))]  # noqa: S311
        same = 0
        for stop in stops:
            seed_of_process()
            differences = stopped_after(folder / kind / str(stop), rules, stop).differences(straight)
            same += not differences
            if differences:
                print(kind, stop, differences[:3], file=sys.stderr)
        told.append(f"{kind}: {same} of {len(stops)}")
    return f"40 steps against N + (40 - N), N = {', '.join(map(str, stops))}; bitwise equal: {'; '.join(told)}"


def nans(number: int, folder: Path) -> str:
    result = inject_often(number, folder)
    parts = [
        f"{name} {injected}: {result.finite.get(name, 0)} finite, {result.unchanged.get(name, 0)} unchanged, "
        f"{result.counted.get(name, 0)} counted, {result.refused.get(name, 0)} refused"
        for name, injected in sorted(result.injected.items())
    ]
    return f"{sum(result.injected.values())} injections among {result.trained} steps that trained. " + "; ".join(parts)


def _loads(run: Path) -> bool:
    found, _ = latest(run)
    if found is None:
        return False
    model = Toy()
    restore(found, who(model), model, adamw(model))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--damages", type=int)
    parser.add_argument("--sigterms", type=int)
    parser.add_argument("--nans", type=int)
    parser.add_argument("--crash-points", action="store_true")
    parser.add_argument("--syscalls", action="store_true")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    seed_all(0)
    checks: dict[str, Callable[[Path], str] | None] = {
        "kill -9": asked.kills and (lambda folder: kills(asked.kills, folder)),
        "crash points": crash_points if asked.crash_points else None,
        "system calls": syscalls if asked.syscalls else None,
        "damage": asked.damages and (lambda folder: damages(asked.damages, folder)),
        "SIGTERM": asked.sigterms and (lambda folder: sigterms(asked.sigterms, folder)),
        "resume": resume if asked.resume else None,
        "NaN and Inf": asked.nans and (lambda folder: nans(asked.nans, folder)),
    }
    for name, check in checks.items():
        if check:
            with tempfile.TemporaryDirectory() as folder:
                print(f"| {name} | {check(Path(folder))} |", flush=True)


if __name__ == "__main__":
    main()
