"""Open many randomly bent directories; stop at the first outcome that is neither a refusal nor a shared acceptance.

    python tests/attacks/fuzz.py --count 100000 --seed 1

Prints how many were accepted, the refusals by kind, and the slowest directory. 100,000 take a few minutes on one core.
"""

# ruff: noqa: T201, E402  # a script: it prints, and finds its neighbours before it imports them
import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
sys.path.insert(0, str(REPOSITORY))

from qerl_compile.errors import CheckpointError
from tests.attacks.judge import judged
from tests.attacks.making import healthy
from tests.attacks.mutate import mutated_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    judged(healthy(Path(tempfile.mkdtemp()) / "warm-up"))  # the safetensors library imports torch on first use
    kinds: Counter[str] = Counter()
    slowest_s, slowest_seed = 0.0, ""
    began_s = time.perf_counter()
    for number in range(arguments.count):
        seed = f"{arguments.seed}/{number}"
        root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108  # speed
        mutated_directory(random.Random(seed), root)  # noqa: S311  # not for secrets
        before_s = time.perf_counter()
        try:
            outcome = judged(root)
        except BaseException:
            print(f"seed {seed}: broken promise; the directory is kept at {root}")
            raise
        taken_s = time.perf_counter() - before_s
        if taken_s > slowest_s:
            slowest_s, slowest_seed = taken_s, seed
        kind = "accepted"
        if isinstance(outcome, CheckpointError):
            kind = "refused: " + re.sub(r"['`[].*|[0-9]+", "#", outcome.expected)[:60]
        kinds[kind] += 1
        shutil.rmtree(root)
    for kind, count in kinds.most_common():
        print(f"{count:8d}  {kind}")
    print(f"{arguments.count} directories in {time.perf_counter() - began_s:.0f} s, no exception but CheckpointError;")
    print(f"slowest {slowest_s * 1000:.0f} ms (seed {slowest_seed})")


if __name__ == "__main__":
    main()
