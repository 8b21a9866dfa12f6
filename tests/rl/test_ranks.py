"""Two processes with gloo: equal to one to rounding, equal to each other to the bit, and no survivor of a failure."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qerl_compile.errors import RecipeError
from qerl_compile.rl.ranks import Ranks
from tests.rl.two_ranks import train


def run(out, *faults):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "tests.rl.two_ranks", str(out), *faults]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_shares_are_equal_and_contiguous_or_refused():
    assert [list(Ranks(rank, 2).share(6)) for rank in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(RecipeError, match=r"a multiple of the 4 ranks; got 6\. Set train\.prompts_per_step=8"):
        Ranks(0, 4).share(6)


def test_alone_nothing_is_exchanged():
    alone, values = Ranks(), torch.arange(3.0)
    assert alone.gather(values) is values
    assert alone.sum(values) is values
    assert alone.max(values) is values
    assert (alone.any(True), alone.any(False)) == (True, False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two ranks wrote, without a fault and then with NaN on one of them: starting processes costs the most."""
    out = tmp_path_factory.mktemp("two")
    done = run(out, "none", "nan")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_two_ranks_equal_one_to_rounding_and_each_other_to_the_bit(trained, tmp_path):
    train(Ranks(), tmp_path, "none")
    digests = [(trained / f"digest-none-{rank}").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]
    one, two = (torch.load(out / "adapters-none.pt") for out in (tmp_path, trained))
    for alone, shared in zip(one, two, strict=True):
        # in norm: AdamW makes a full step of a gradient that is nothing but rounding
        assert float((shared - alone).norm() / alone.norm()) < 1e-3
    rows = [json.loads((out / "rows-none.json").read_text()) for out in (tmp_path, trained)]
    for alone, shared in zip(*rows, strict=True):
        exact = ("step", "reward", "frac_reward_zero_std", "num_tokens", "update/rows", "eval/accuracy")
        assert [alone.get(name) for name in exact] == [shared.get(name) for name in exact]
        for name in ("grad_norm", "entropy", "loss"):
            assert shared.get(name, 0) == pytest.approx(alone.get(name, 0), rel=1e-3, abs=1e-5)


def test_a_rank_that_fails_ends_all_with_its_message_within_a_minute(tmp_path):
    begin = time.monotonic()
    done = run(tmp_path, "raise")
    assert done.returncode != 0
    assert "rank 1 has had enough" in done.stderr
    assert time.monotonic() - begin < 60 + 30  # start-up included
    assert not list(tmp_path.glob("digest-*"))


def test_numbers_that_are_not_finite_on_one_rank_are_a_bad_step_on_all(trained):
    rows = json.loads((trained / "rows-nan.json").read_text())
    bad = [row for row in rows if "update/fault" in row]
    assert [row["update/bad_steps"] for row in bad] == [1]
    assert len({(trained / f"digest-nan-{rank}").read_text() for rank in (0, 1)}) == 1
