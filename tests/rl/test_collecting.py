"""Dynamic sampling, shaping and the shares of ranks, with rounds that need no model."""

import math

import pytest
import torch

from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.collecting import Round, collect
from qerl_compile.rl.ranks import Ranks
from qerl_compile.rl.rewards import Scores
from qerl_compile.rl.rollout import Rollout, Rollouts

GROUP = 2


class Script:
    """Rewards of each group by its position in the task; remembers what was asked."""

    def __init__(self, groups: dict[int, tuple[float, float]], length: int = 3, ended: bool = True) -> None:
        self.groups, self.length, self.ended, self.asked = groups, length, ended, []

    def __call__(self, positions: range, first: int) -> Round:
        self.asked.append((list(positions), first))
        rows = [{"prompt": f"p{position}"} for position in positions]
        rollouts, texts, totals = [], [], []
        for position in positions:
            for sample, reward in enumerate(self.groups.get(position, (0.0, 0.0))):
                tokens = (position,) * self.length
                rollouts.append(Rollout((1, 2), tokens, (-0.5,) * self.length, self.ended))
                texts.append(f"{position}.{sample}")
                totals.append(reward)
        total_N = torch.tensor(totals, dtype=torch.float64)
        metrics = {"rollout/time": 1.0, "rollout/cache_bytes": 8.0}
        return Round(rows, Rollouts(tuple(rollouts), metrics), texts, Scores(("f",), total_N[:, None], total_N))


def config(**changes):
    return TrainConfig(prompts_per_step=2, group_size=GROUP, max_new_tokens=4, **changes)


def test_without_dynamic_sampling_everything_is_kept_and_the_cursor_moves_by_one_step():
    play = Script({7: (0.0, 1.0)})
    got = collect(play, config(), Ranks(), 6)
    assert play.asked == [([6, 7], 0)]
    assert (got.cursor, got.sequences, got.sampled_tokens, got.prompt_tokens) == (8, 4, 12, 8)
    assert got.texts == ["6.0", "6.1", "7.0", "7.1"]
    assert got.advantages_N.tolist() == pytest.approx([0, 0, -0.70701, 0.70701], abs=1e-4)
    assert got.metrics["frac_reward_zero_std"] == 0.5
    assert got.metrics["rewards/f/timeouts"] == 0


def test_rounds_are_played_until_enough_groups_have_signal_and_the_first_of_them_are_kept_in_order():
    play = Script({1: (0.0, 1.0), 4: (1.0, 0.0), 5: (0.0, 1.0)})
    got = collect(play, config(dynamic_sampling_rounds=5), Ranks(), 0)
    assert play.asked == [([0, 1], 0), ([2, 3], 2), ([4, 5], 4)]
    assert got.texts == ["1.0", "1.1", "4.0", "4.1"]
    assert [row["prompt"] for row in got.rows] == ["p1", "p1", "p4", "p4"]
    assert [rollout.completion_ids[0] for rollout in got.rollouts] == [1, 1, 4, 4]
    assert got.rewards_N.tolist() == [0, 1, 1, 0]
    assert got.cursor == 6
    assert got.metrics["dynamic_sampling/rounds"] == 3
    assert got.metrics["dynamic_sampling/groups_with_signal"] == 2
    assert got.metrics["frac_reward_zero_std"] == 0.5  # of the six groups drawn
    assert (got.metrics["rollout/time"], got.metrics["rollout/cache_bytes"]) == (3.0, 8.0)


def test_rounds_are_bounded_and_groups_without_signal_fill_up():
    play = Script({3: (0.0, 1.0)})
    got = collect(play, config(dynamic_sampling_rounds=1), Ranks(), 0)
    assert len(play.asked) == 2
    assert got.texts == ["0.0", "0.1", "3.0", "3.1"]
    assert got.metrics["dynamic_sampling/groups_with_signal"] == 1
    assert got.sequences == 4


def test_a_threshold_decides_what_signal_is():
    play = Script({0: (0.50, 0.51), 1: (0.0, 1.0)})
    got = collect(play, config(signal_threshold=0.05), Ranks(), 0)
    assert got.advantages_N[:2].tolist() == [0, 0]
    assert got.metrics["frac_reward_zero_std"] == 0.5


def test_overlong_completions_lose_reward_linearly_in_the_buffer():
    short, long = (Script({}, length) for length in (2, 3))
    shaped = config(overlong_buffer=2, overlong_penalty=0.5)
    assert collect(short, shaped, Ranks(), 0).rewards_N.tolist() == [0, 0, 0, 0]
    got = collect(long, shaped, Ranks(), 0)
    assert got.rewards_N.tolist() == [-0.25] * 4
    assert got.metrics["overlong/share"] == 1.0


def test_a_completion_without_a_score_has_no_advantage():
    got = collect(Script({0: (math.nan, 1.0), 1: (0.0, 1.0)}), config(), Ranks(), 0)
    assert got.advantages_N[:2].tolist() == [0, 0]
    assert got.advantages_N[3] > 0


class TwoRanks(Ranks):
    """One of two ranks, with what the other one would send."""

    def __init__(self, rank, others):
        super().__init__(rank, 2)
        object.__setattr__(self, "others", iter(others))

    def gather(self, values):
        other = next(self.others)
        return torch.cat([values, other] if self.rank == 0 else [other, values])

    def sum(self, values):
        return values * 2

    def any(self, flag):
        return flag


def test_ranks_take_their_share_decide_alike_and_keep_their_own_groups():
    groups = {1: (0.0, 1.0), 3: (0.0, 1.0)}
    tables = {}
    for rank in (0, 1):  # what a rank sends is what it would gather alone
        sent = []
        seen = Script(groups)
        for first in (0, 2):
            alone = seen(range(first + rank, first + rank + 1), first + rank)
            lengths = torch.tensor([[3.0, 1.0]] * GROUP, dtype=torch.float64)
            total_N1 = alone.scores.total_N[:, None]
            sent.append(torch.cat([total_N1, lengths, total_N1], 1))
        tables[rank] = sent
    dynamic = config(dynamic_sampling_rounds=3)
    first, second = (collect(Script(groups), dynamic, TwoRanks(rank, tables[1 - rank]), 0) for rank in (0, 1))
    assert (first.texts, second.texts) == ([], ["1.0", "1.1", "3.0", "3.1"])
    assert first.cursor == second.cursor == 4
    assert first.sequences == second.sequences == 4
    assert second.advantages_N.tolist() == pytest.approx([-0.70701, 0.70701] * 2, abs=1e-4)
    same = ("reward", "frac_reward_zero_std", "dynamic_sampling/rounds", "completions/mean_length")
    assert [first.metrics[name] for name in same] == [second.metrics[name] for name in same]
