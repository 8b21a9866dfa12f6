"""What a step is trained on: prompts, completions, rewards and advantages, with groups that teach nothing replaced.

    repeat   P prompts → P * G completions → rewards → which groups have signal
    until    P groups have signal, or the rounds are used up                              (dynamic sampling, DAPO)
    keep     the first P groups with signal, in order; if there are fewer, groups without fill up to P

So a step always has P groups and its loss one divisor. Rounds are bounded: where everything is solved, nothing would
ever fill a batch. Without dynamic sampling there is one round and all of it is kept. A group is drawn once: its prompts
advance the run's position in the task (`cursor`), whether the group was kept or not.

Groups count by rewards after shaping (shaping.py), with the threshold of the recipe; both are in `advantages.py`.

On several ranks each rolls out its share of every round. Rewards are gathered, so all decide alike, and each keeps its
own groups: the number may differ from rank to rank, the P in all does not.

Noise is the trainer's: it is on while this runs.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.advantages import Advantages, group_advantages
from qerl_compile.rl.ranks import Ranks
from qerl_compile.rl.rewards import Scores
from qerl_compile.rl.rollout import Rollout, Rollouts
from qerl_compile.rl.shaping import overlong_penalty
from qerl_compile.rl.step_metrics import length_metrics, reward_metrics
from qerl_compile.rl.tasks import Row


@dataclass(frozen=True)
class Round:
    """This rank's share of one round.

    Args:
        rows: p rows.
        rollouts: p * G completions, group after group.
        texts: the completions as text.
        scores: their rewards.
    """

    rows: Sequence[Row]
    rollouts: Rollouts
    texts: Sequence[str]
    scores: Scores


@dataclass(frozen=True)
class Experience:
    """What a step is trained on; lists hold this rank's completions, group after group, metrics those of all ranks.

    Args:
        rows: one per completion.
        rollouts: the completions.
        texts: the completions as text.
        rewards_N: float64 [N], shaped totals; NaN where there is none.
        advantages_N: float32 [N].
        sequences: completions of the step on all ranks.
        cursor: position in the task after this step.
        sampled_tokens: completion tokens drawn on all ranks, those of dropped groups included.
        prompt_tokens: likewise, counted once per completion.
        metrics: under the names that metrics.jsonl has.
    """

    rows: Sequence[Row]
    rollouts: Sequence[Rollout]
    texts: Sequence[str]
    rewards_N: Tensor
    advantages_N: Tensor
    sequences: int
    cursor: int
    sampled_tokens: int
    prompt_tokens: int
    metrics: dict[str, float | int]


def collect(play: Callable[[range, int], Round], config: TrainConfig, ranks: Ranks, cursor: int) -> Experience:
    """Play rounds until the step is full.

    Args:
        play: rolls out and scores the prompts at these positions of the task; its second argument is the position of
            the first of them in the step, which their random numbers hang on.
        config: group size, dynamic sampling, shaping.
        ranks: this process among others.
        cursor: position in the task before this step.
    """
    prompts, size = config.prompts_per_step, config.group_size
    share = ranks.share(prompts)
    rounds: list[Round] = []
    tables: list[Tensor] = []
    while True:
        first = len(rounds) * prompts + share.start
        rounds.append(play(range(cursor + first, cursor + first + len(share)), first))
        tables.append(ranks.gather(_table(rounds[-1], config)))
        table_NX = torch.cat(tables)
        advantages = group_advantages(table_NX[:, 0], size, config.advantage_scale, config.signal_threshold)
        informative = int((~advantages.zero_std_P).sum())
        if informative >= prompts or len(rounds) > config.dynamic_sampling_rounds:
            break
    kept = _kept(advantages, prompts)
    rows_of_kept = (kept[:, None] * size + torch.arange(size)).flatten()
    chosen = group_advantages(table_NX[rows_of_kept, 0], size, config.advantage_scale, config.signal_threshold)
    mine = [(place, *_where(int(group), share, prompts)) for place, group in enumerate(kept)]
    mine = [(place, rounds[number], at) for place, number, at in mine if at is not None]
    local = torch.tensor([place * size + sample for place, _, _ in mine for sample in range(size)], dtype=torch.long)
    groups = [(each, slice(at * size, (at + 1) * size)) for _, each, at in mine]
    prompt_tokens = sum(len(r.prompt_ids) for each in rounds for r in each.rollouts)
    return Experience(
        rows=[each.rows[at] for _, each, at in mine for _ in range(size)],
        rollouts=[rollout for each, where in groups for rollout in each.rollouts[where]],
        texts=[text for each, where in groups for text in each.texts[where]],
        rewards_N=table_NX[rows_of_kept, 0][local],
        advantages_N=chosen.advantages_N[local],
        sequences=prompts * size,
        cursor=cursor + len(rounds) * prompts,
        sampled_tokens=int(table_NX[:, 1].sum()),
        prompt_tokens=int(ranks.sum(torch.tensor(float(prompt_tokens), dtype=torch.float64))),
        metrics={
            **_metrics(rounds, table_NX, advantages, config, ranks),
            "dynamic_sampling/rounds": len(rounds),
            "dynamic_sampling/groups_with_signal": min(informative, prompts),
        },
    )


def _table(played: Round, config: TrainConfig) -> Tensor:
    """Return what ranks exchange: float64 [N, 3 + F], shaped total, length, ended, and each function's reward."""
    lengths_N = torch.tensor([len(rollout.completion_ids) for rollout in played.rollouts])
    ended_N = torch.tensor([rollout.ended for rollout in played.rollouts])
    penalty_N = overlong_penalty(lengths_N, config.max_new_tokens, config.overlong_buffer, config.overlong_penalty)
    columns = (played.scores.total_N + penalty_N, lengths_N.double(), ended_N.double())
    return torch.cat([torch.stack(columns, 1), played.scores.per_function_NF.double()], 1)


def _kept(advantages: Advantages, prompts: int) -> Tensor:
    """Return the groups to train on: the first with signal, then the first without; in order of drawing."""
    order = torch.argsort(advantages.zero_std_P.int(), stable=True)[:prompts]
    return order.sort().values


def _where(group: int, share: range, prompts: int) -> tuple[int, int | None]:
    """Return the round of a group, and its place in this rank's share, or None if it is another rank's."""
    number, place = divmod(group, prompts)
    return number, place - share.start if place in share else None


def _metrics(
    rounds: Sequence[Round], table_NX: Tensor, advantages: Advantages, config: TrainConfig, ranks: Ranks
) -> dict[str, float | int]:
    """Rewards and lengths of everything drawn, on all ranks; what the engine measured, of this rank."""
    everything = Scores(rounds[0].scores.names, table_NX[:, 3:], table_NX[:, 0])
    metrics: dict[str, float | int] = {
        **reward_metrics(everything, advantages),
        **length_metrics(table_NX[:, 1], table_NX[:, 2].bool()),
    }
    for key in rounds[-1].rollouts.metrics:
        values = [each.rollouts.metrics[key] for each in rounds]
        adds_up = key.endswith(("time", "tokens", "steps"))
        metrics[key] = sum(values) if adds_up else max(values)
    for name in rounds[0].scores.names:
        failed = [sum(each.scores.count(name, kind) for each in rounds) for kind in ("timeout", "error")]
        timeouts, errors = ranks.sum(torch.tensor(failed, dtype=torch.float64)).tolist()
        metrics |= {f"rewards/{name}/timeouts": int(timeouts), f"rewards/{name}/errors": int(errors)}
    if config.overlong_buffer:
        penalty_N = overlong_penalty(table_NX[:, 1], config.max_new_tokens, config.overlong_buffer, 1.0)
        metrics["overlong/share"] = float((penalty_N < 0).double().mean())
    said = [each.scores.metrics for each in rounds]
    spoken = {name: statistics.fmean(each[name] for each in said if name in each) for each in said for name in each}
    return {**spoken, **metrics}  # what a reward function logs never takes the place of ours
