"""What each of two processes runs: `python -m tests.rl.two_ranks OUT FAULT...` under torchrun; one alone calls `train`.

Trains the toy for a few steps, once for every FAULT, and rank 0 writes metrics and adapters; every rank writes a digest
of its adapters. FAULT "raise" makes rank 1 fail in its second step; "nan" gives rank 1 NaN log-probs in step 2; "none".
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from qerl_compile.errors import NotFiniteError  # noqa: E402
from qerl_compile.rl.ranks import Ranks  # noqa: E402
from tests.rl.toy import toy_recipe, toy_trainer  # noqa: E402

STEPS = 4


def train(ranks: Ranks, out: Path, fault: str) -> None:
    recipe = toy_recipe(train__steps=STEPS, train__dynamic_sampling_rounds=1, train__updates_per_rollout=2)
    trainer, rows = toy_trainer(recipe, ranks=ranks)
    generate, calls = trainer.engine.generate, []

    def faulty(*args):
        calls.append(1)
        if ranks.rank == 1 and len(calls) == 5:  # evaluation, parity, step 1 with its extra round, step 2
            if fault == "raise":
                raise RuntimeError("rank 1 has had enough")
            if fault == "nan":
                raise NotFiniteError(where="here", expected="numbers", got="NaN", do="Nothing.")
        return generate(*args)

    trainer.engine.generate = faulty
    trainer.train()
    adapters = [p.detach() for p in trainer.parameters]
    digest = hashlib.sha256(b"".join(p.numpy().tobytes() for p in adapters)).hexdigest()
    (out / f"digest-{fault}-{ranks.rank}").write_text(digest)
    if ranks.is_first:
        torch.save(adapters, out / f"adapters-{fault}.pt")
        (out / f"rows-{fault}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    here = Ranks.join()
    for each in sys.argv[2:]:
        train(here, Path(sys.argv[1]), each)
