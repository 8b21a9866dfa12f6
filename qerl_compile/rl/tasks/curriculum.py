"""A curriculum: tasks in order of difficulty, each trained on until the policy is good at it.

    stage s → s + 1   when the mean reward of the last WINDOW steps in stage s is at least `advance_at`

The decision hangs on rewards only, which every rank has alike, and its state is one stage and a short list of numbers,
which a checkpoint holds. Evaluations are of all stages' held-out items together, so the curve of a run has one meaning
from its first step to its last. No stage trains on a question that another holds out: such a row is drawn again, from a
seed that follows from the first, so a row is still a function of seed and position.

    rg:chain_sum:max_digits=1 -> rg:chain_sum:max_digits=2 @0.9        two stages; the second from a reward of 0.9 on

A curriculum is a `Task`: rows come from the current stage, and each row carries the number of its stage so that the
right task judges it. The trainer calls `observe` after each step and keeps `stage` and `rewards` in its checkpoints; a
curriculum of one's own is a subclass with another `observe`.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from qerl_compile.errors import TaskError
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.rl.tasks.held_out import question_of
from qerl_compile.rl.tasks.task import ARROW, Row, Task, parse_task

WINDOW = 5
ADVANCE_AT = 0.8
STAGE = "curriculum_stage"
TRIES = 1000


class Curriculum(Task):
    """Tasks one after the other.

    Args:
        stages: the tasks, the easiest first; at least two.
        advance_at: mean reward at which the next one begins, in units of the reward.
    """

    def __init__(self, stages: Sequence[Task], advance_at: float = ADVANCE_AT) -> None:
        if len(stages) < 2:
            do = "Give --task twice or more."
            raise TaskError(where="curriculum", expected="two tasks or more", got=str(len(stages)), do=do)
        self.stages, self.advance_at = tuple(stages), advance_at
        self.spec = f" {ARROW} ".join(task.spec for task in stages) + f" @{advance_at:g}"
        self.stage = 0
        self._rewards: deque[float] = deque(maxlen=WINDOW)

    @classmethod
    def from_spec(cls, spec: str) -> "Curriculum":
        """The curriculum that `A -> B -> C [@REWARD]` describes.

        Raises:
            TaskError: a stage is unusable, or what follows the last `@` is no number.
        """
        stages, at, reward = spec.rpartition("@")
        if not at:
            stages, reward = spec, str(ADVANCE_AT)
        try:
            advance_at = float(reward)
        except ValueError:
            do = "Write the mean reward from which the next stage begins, such as @0.9."
            raise TaskError(where=spec, expected="a number after @", got=repr(reward.strip()), do=do) from None
        return cls([parse_task(stage.strip()) for stage in stages.split(ARROW)], advance_at)

    def train_row(self, seed: int, position: int) -> Row:
        """A row of the current stage that no stage holds out; positions go on counting across stages.

        Raises:
            TaskError: the other stages hold out nearly all that this one trains on.
        """
        task = self.stages[self.stage]
        others = [stage for stage in self.stages if stage is not task]
        for attempt in range(TRIES):
            row = task.train_row(derive_seed(seed, "again", attempt) if attempt else seed, position)
            if not any(other.holds_out(row) for other in others):
                return {**row, STAGE: self.stage}
        raise TaskError(
            where=task.spec,
            expected=f"a question that no other stage holds out, within {TRIES} draws",
            got="none",
            do="Give the stages the same held_out share, or files that do not share questions.",
        )

    def held_out(self, count: int | None = None) -> list[Row]:
        """Rows of every stage, `count` in all, as equally as that divides; the first stages get what is left over."""
        rows: dict[str, Row] = {}
        for stage, task in enumerate(self.stages):
            some = None if count is None else count // len(self.stages) + (stage < count % len(self.stages))
            if some != 0:
                rows |= {question: {**row, STAGE: stage} for question, row in _others(task, some, rows).items()}
        return list(rows.values())

    def is_correct(self, answer: str | None, row: Row) -> bool:
        """As the task that the row came from judges it."""
        return self.stages[int(row.get(STAGE, 0))].is_correct(answer, row)

    def observe(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Take a step's metrics, move on if it is time, and return the metrics of the curriculum."""
        reward = metrics.get("reward")
        if reward is not None and reward == reward:  # NaN: no reward applied
            self._rewards.append(float(reward))
        full = len(self._rewards) == WINDOW
        if full and sum(self._rewards) / WINDOW >= self.advance_at and self.stage + 1 < len(self.stages):
            self.stage += 1
            self._rewards.clear()
        return {"curriculum/stage": self.stage}

    @property
    def rewards(self) -> list[float]:
        """Mean rewards of the last steps of this stage; with `stage`, what a checkpoint holds."""
        return list(self._rewards)

    def restore(self, stage: int, rewards: Sequence[float]) -> None:
        """Go on from a checkpoint."""
        self.stage, self._rewards = stage, deque(rewards, maxlen=WINDOW)


def _others(task: Task, some: int | None, known: Mapping[str, Row]) -> dict[str, Row]:
    """Return the first `some` held-out rows of a task, or all, whose questions are not known yet, by question."""
    asked = some
    while True:
        found = {question_of(row): row for row in task.held_out(asked)}
        fresh = {question: row for question, row in found.items() if question not in known}
        if some is None or asked is None or len(fresh) >= some:
            return dict(list(fresh.items())[:some])
        asked += some - len(fresh)


def join_tasks(specs: Sequence[str], advance_at: float | None = None) -> str:
    """Return one spec for one task or for a curriculum of several.

    Raises:
        TaskError: `advance_at` is given for a single task.
    """
    spec = f" {ARROW} ".join(specs)
    if advance_at is None:
        return spec
    if ARROW not in spec:
        do = "Give --task twice or more, or drop --advance-at."
        raise TaskError(where="--advance-at", expected="several tasks", got="one", do=do)
    return f"{spec} @{advance_at:g}"
