"""The loop: noise on, roll out, score, noise off, update; nothing else.

    for step in 1..M:
        z ~ N(0, σ_step²) on every noisy norm                     noise_schedule.py, transforming.resample_noise
        groups of completions, rewards, advantages                collecting.py, rewards/, advantages.py
        z = 0 (unless noise.in_update)                            QeRL, Algorithm 1: the update is of the clean policy
        policy loss → AdamW on LoRA                               updating.py, losses/, policy_batch.py

Rollout log-probabilities come from the noisy policy, so their difference from the trainer's is logged as
`sampling/…` in every step, and corrected only if the recipe asks for it.

*What is counted twice.* The number of noisy norms is asserted against the plan at every step, because noise that
silently matched nothing is how the method failed elsewhere (design/method.md, trap 2).

*What a step changes* (adapters, optimizer, position in the task, counters) it changes at its end. A step that is
abandoned, for want of finite numbers or because somebody wants the run to stop, has not happened: `progress` is that
of the last finished step, as are `generators`, and a checkpoint of both goes on bit by bit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qerl_compile.errors import ModelError, NotFiniteError
from qerl_compile.recipe import Recipe
from qerl_compile.rl.answers import Extractor
from qerl_compile.rl.checkpoints import Progress
from qerl_compile.rl.checkpoints.random_states import random_states
from qerl_compile.rl.collecting import Experience, Round, collect
from qerl_compile.rl.diagnosis import Diagnosis, Sample, Watch
from qerl_compile.rl.dump import dump_batch
from qerl_compile.rl.evaluate import Evaluation, evaluate
from qerl_compile.rl.first_step import rehearse_first_step
from qerl_compile.rl.noise_schedule import NoiseSchedule
from qerl_compile.rl.optimizer import make_optimizer
from qerl_compile.rl.parity import PROMPTS, check_parity
from qerl_compile.rl.prompts import PromptFormat, as_completion, end_token_ids, pad_token_id
from qerl_compile.rl.ranks import Ranks
from qerl_compile.rl.rewards import RewardFunction, score
from qerl_compile.rl.rewards.calling import reward_name
from qerl_compile.rl.rollout import PagedSampler, Sampler, Sampling
from qerl_compile.rl.rollout.memory import CACHE_SHARE
from qerl_compile.rl.rollout.positions import check_positions
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.rl.step_metrics import memory_metrics
from qerl_compile.rl.tasks import Row, Task, columns
from qerl_compile.rl.tasks.curriculum import Curriculum
from qerl_compile.rl.updating import Updater
from qerl_compile.transforming import resample_noise, state_of
from qerl_compile.warm_up import Rehearsal

TRAINING_SHARE = 0.5  # of the free memory for a key-value cache that is kept: the update needs the other half

Report = Callable[[dict[str, Any]], None]


class Stopped(Exception):
    """Training was asked to stop; `step` is the last finished one."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass
class Trainer:
    """Trains the adapters of a transformed model on a task.

    Args:
        model: a transformed model with LoRA.
        tokenizer: of the model.
        recipe: `train` and `noise` are read.
        task: rows and judge.
        rewards: reward functions with TRL's interface.
        prompt: how rows become prompts.
        extractor: how evaluations find the answer.
        report: receives one row of metrics per step and per evaluation.
        record: receives the step and the whole evaluation, completions included.
        sampler: the rollout engine; None for our own.
        teacher: for distillation, a causal LM with the model's tokens.
        ranks: this process among others.
        directory: where a batch without finite numbers is written to; None for nowhere.
        diagnosed: receives a diagnosis when learning seems impossible.
        save: writes a checkpoint of this trainer; called every `checkpoint_every` steps and when the run stops early.
        stop: whether the run should stop; asked between phases.
        reward_weights: a factor for each reward function; None for 1.
        rehearsal: kernels of the first step that are being compiled already; None to start that now (first_step.py).
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    task: Task
    rewards: Sequence[RewardFunction]
    prompt: PromptFormat
    extractor: Extractor
    report: Report
    record: Callable[[int, Evaluation], None] | None = None
    sampler: Sampler | None = None
    teacher: Any = None
    ranks: Ranks = field(default_factory=Ranks)
    directory: Path | None = None
    diagnosed: Callable[[Diagnosis], None] | None = None
    save: "Callable[[Trainer], None] | None" = None
    stop: Callable[[], bool] | None = None
    reward_weights: Sequence[float] | None = None
    rehearsal: Rehearsal | None = None

    def __post_init__(self) -> None:
        if full := state_of(self.model).plan.trained_weights:
            raise ModelError(
                where="trainer",
                expected="a model whose adapters are trained, since checkpoints of a run hold adapters",
                got=f"{len(full)} linears with `weights: trained`, such as {full[0]}",
                do="Use lora rules, or train transform(model, recipe) in a loop of your own and export it.",
            )
        self.config = self.recipe.train
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ModelError(
                where="trainer",
                expected="a model with adapters to train",
                got="a model in which nothing requires gradients",
                do="Use a recipe with lora rules.",
            )
        if self.config.distill_weight and self.teacher is None:
            raise ModelError(
                where="train.distill_weight",
                expected="a teacher, since the weight is above 0",
                got="none",
                do="Pass --teacher MODEL, or set train.distill_weight=0.",
            )
        if self.config.rollout_cache == "freed" and not isinstance(self.sampler, PagedSampler | None):
            raise ModelError(
                where="train.rollout_cache=freed",
                expected="our own rollout engine, whose cache can be given back",
                got=type(self.sampler).__name__,
                do="Set train.rollout_cache=kept.",
            )
        self.ranks.share(self.config.prompts_per_step)
        self.optimizer = make_optimizer(self.model, self.parameters, self.config)
        self.schedule = NoiseSchedule.of(self.recipe.noise, self.config.steps)
        self.noise_sites = len(state_of(self.model).plan.noise)
        self.held_out = self.task.held_out(self.config.eval_size)
        self._encoded(self.held_out, "held-out rows")
        self.end_ids = end_token_ids(self.tokenizer, self.model.generation_config)
        self.pad_id = pad_token_id(self.tokenizer, self.model.generation_config)
        self.progress = Progress(step=0, cursor=0, seen_tokens=0)
        self.generators = random_states()
        self.rounds = 0  # of dynamic sampling that the present step has begun
        extracts = any(reward_name(function) == "answer" for function in self.rewards)
        self.watch = Watch(self.extractor if extracts else None)
        gib = self.config.rollout_memory_gib
        budget_bytes = None if gib is None else int(gib * 2**30)
        share = TRAINING_SHARE if self.config.rollout_cache == "kept" else CACHE_SHARE
        self.engine = self.sampler or PagedSampler(
            self.model, rows=self.config.rollout_batch, budget_bytes=budget_bytes, share=share
        )
        self.updater = Updater(
            self.model, self.parameters, self.optimizer, self.config, self.pad_id, self.ranks, self.teacher,
            shares_gpu=isinstance(self.engine, PagedSampler),
        )  # fmt: skip
        state = state_of(self.model)
        if self.rehearsal is None and self.sampler is None and state.inner == "inductor":  # nothing is refused any more
            device = self.parameters[0].device
            self.rehearsal = rehearse_first_step(self.model, state.plan, self.config, device, ranks=self.ranks.size)

    def go_on(self, progress: Progress) -> None:
        """Take up a run where a checkpoint left it; model and optimizer are restored already."""
        self.progress, self.generators = progress, random_states()
        if isinstance(self.task, Curriculum):
            self.task.restore(progress.stage, progress.extra.get("rewards", []))  # none before the first step

    def train(self) -> Evaluation:
        """Run all steps that are left; return the last evaluation.

        Raises:
            Stopped: `stop` said so; a checkpoint was saved.
            ModelError: rollouts and trainer are not the same policy, or too many steps in a row had no finite numbers.
        """
        self.generators = random_states()
        latest = self.evaluate(self.progress.step) if self._evaluates_after(self.progress.step) else None
        parity = self.check_parity()  # at step 0 lora_B is 0: only a run that goes on shows its adapters here
        if self.progress.step == 0:
            self.report({"step": 0, **parity})
        while self.progress.step < self.config.steps:
            step = self.progress.step + 1
            self.report(self.step(step))
            if self.config.checkpoint_every and step % self.config.checkpoint_every == 0:
                self._save()
            self._check_stop()
            if self._evaluates_after(step):
                latest = self.evaluate(step)
        return latest or self.evaluate(self.progress.step)

    def _evaluates_after(self, step: int) -> bool:
        """A run that goes on evaluates after its checkpoint's step again: it may have been stopped before it did."""
        every = self.config.eval_every
        return step in (0, self.config.steps) or bool(every and step % every == 0)

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate on the held-out items with the noise off, and report it."""
        start = time.perf_counter()
        greedy = self._sampling(0.0)
        result = evaluate(
            self.model, self.engine, self.tokenizer, self.task, self.held_out, self.prompt, self.extractor, greedy,
            timeout=self.config.reward_timeout,
        )  # fmt: skip
        self.report({"step": step, **result.metrics(), "eval/time": time.perf_counter() - start})
        if self.record is not None:
            self.record(step, result)
        return result

    def check_parity(self) -> dict[str, float]:
        """Compare rollouts with the trainer's log-probabilities, without noise; see `parity.py`."""
        resample_noise(self.model, 0.0)
        prompts = self._encoded(self.held_out[:PROMPTS], "held-out rows")
        return check_parity(
            self.model,
            self.engine,
            prompts,
            self._sampling(self.config.temperature, (self.config.seed, "parity")),
            limit=self.config.parity_limit,
            max_tokens=self.config.micro_batch_tokens,
            device=self.parameters[0].device,
        )

    def step(self, step: int) -> dict[str, Any]:
        """Run one step (1-based) and return its metrics under TRL's names.

        Raises:
            Stopped: between its phases; nothing of the step remains.
            ModelError: it is one too many without finite numbers.
        """
        start = time.perf_counter()
        experience, finite = None, False
        row: dict[str, Any] = {"step": step, **self._add_noise(step)}
        try:
            experience = self._collect(step)
            rolled_out = time.perf_counter()
            self._check_stop()
            if self.recipe.noise is None or not self.recipe.noise.in_update:
                resample_noise(self.model, 0.0)
            row |= self._free_cache()
            update = self.updater.update(step, experience)
            finite = update.finite
            measured = {**experience.metrics, **update.metrics, **self._times(start, rolled_out, experience)}
            row |= {name: value for name, value in measured.items() if name not in row}
        except NotFiniteError as fault:
            row["update/fault"] = str(fault)
        self._finish(step, row, experience, finite)
        if experience is not None and not self.config.distill_weight:  # a teacher teaches without rewards
            self._diagnose(row, experience)
        return row

    def _collect(self, step: int) -> Experience:
        seed, stream = self.config.seed, derive_seed(self.config.seed, "train")

        def play(positions: range, first: int) -> Round:
            self.rounds = first // self.config.prompts_per_step + 1
            rows = [self.task.train_row(stream, position) for position in positions]
            prompts = self._encoded(rows, f"training rows {positions.start} to {positions.stop - 1}")
            params = self._sampling(self.config.temperature, (seed, "rollout", step), first)
            fault = None
            try:
                rollouts = self.engine.generate(prompts, self.config.group_size, params)
            except NotFiniteError as error:
                fault, rollouts = error, None
            if self.ranks.any(fault is not None) or rollouts is None:  # or the other ranks would wait for this one
                raise fault or NotFiniteError(
                    where=f"step {step}",
                    expected="finite numbers on every rank",
                    got="none on another",
                    do="See there.",
                )
            repeated = [row for row in rows for _ in range(self.config.group_size)]
            ids = [list(rollout.completion_ids) for rollout in rollouts]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            scores = score(
                self.rewards,
                prompts=[row["prompt"] for row in repeated],
                completions=[as_completion(row, text) for row, text in zip(repeated, texts, strict=True)],
                completion_ids=ids,
                columns=columns(repeated),
                weights=self.reward_weights,
            )
            return Round(rows, rollouts, texts, scores)

        return collect(play, self.config, self.ranks, self.progress.cursor)

    def _encoded(self, rows: Sequence[Row], what: str) -> list[tuple[int, ...]]:
        """Prompts as token ids; refused where the model's positions end before a completion may."""
        prompts = [self.prompt.encode(self.tokenizer, row).ids for row in rows]
        check_positions(self.model, prompts, self.config.max_new_tokens, what)
        return prompts

    def _free_cache(self) -> dict[str, int]:
        if self.config.rollout_cache == "kept" or not isinstance(self.engine, PagedSampler):
            return {}
        return {"rollout/freed_bytes": self.engine.release()}

    def _add_noise(self, step: int) -> dict[str, float | int]:
        if self.schedule is None:
            return {}
        sigma = self.schedule.sigma(step)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "noise", step))
        sites, rms = resample_noise(self.model, sigma, generator)
        if sites != self.noise_sites or sites == 0:
            raise ModelError(
                where=f"step {step}: noise",
                expected=f"{self.noise_sites} noisy norms, as planned",
                got=str(sites),
                do="Check the noise rule; this is a defect of qerl-compile if the recipe was not changed meanwhile.",
            )
        return {"noise/sigma": sigma, "noise/rms": rms, "noise/sites": sites}

    def _sampling(self, temperature: float, seed: tuple[int | str, ...] = (), first: int = 0) -> Sampling:
        return Sampling(
            self.config.max_new_tokens, self.end_ids, self.pad_id, temperature, seed=seed, first_prompt=first
        )

    def _times(self, start: float, rolled_out: float, experience: Experience) -> dict[str, float | int]:
        done = time.perf_counter()
        rollout, update = rolled_out - start, done - rolled_out
        trained_tokens = experience.sampled_tokens + experience.prompt_tokens
        return {
            "num_tokens": self.progress.seen_tokens + trained_tokens,
            "rollout/tokens_per_s": experience.sampled_tokens / rollout,
            "update/tokens_per_s": trained_tokens / update,
            "time/rollout": rollout,
            "time/update": update,
            "step_time": done - start,
            **memory_metrics(self.parameters[0].device),
        }

    def _finish(self, step: int, row: dict[str, Any], experience: Experience | None, finite: bool) -> None:
        """Move the run past the step; stop the run if steps without finite numbers do not end."""
        progress, prompts = self.progress, self.config.prompts_per_step
        cursor = progress.cursor + self.rounds * prompts if experience is None else experience.cursor
        bad = 0 if finite else progress.bad_steps + 1
        row["update/bad_steps"] = bad
        if bad >= self.config.max_bad_steps:
            dump = dump_batch(self.directory, step, self.ranks.rank, row, experience) if self.directory else None
            lost = "" if experience else f"; the rollout itself failed: {row.get('update/fault')}"
            raise ModelError(
                where=f"step {step}",
                expected="finite loss, log-probabilities and gradient",
                got=f"NaN or Inf in {bad} steps in a row, and no update with them was made{lost}",
                do=f"Look into the last batch, {dump}." if dump else "Lower train.learning_rate.",
            )
        seen = row.get("num_tokens", progress.seen_tokens)
        stage, extra = 0, {}
        if isinstance(self.task, Curriculum):
            row |= self.task.observe(row)
            stage, extra = self.task.stage, {"rewards": self.task.rewards}
        self.progress = Progress(step=step, cursor=cursor, seen_tokens=seen, bad_steps=bad, stage=stage, extra=extra)
        self.generators = random_states()

    def _diagnose(self, row: dict[str, Any], experience: Experience) -> None:
        samples = [
            Sample(str(each["prompt"]), text, None if reward != reward else reward, each.get("answer"))
            for each, text, reward in zip(experience.rows, experience.texts, experience.rewards_N.tolist(), strict=True)
        ]
        found = self.watch(row, samples)
        if found is not None and self.diagnosed is not None:
            self.diagnosed(found)

    def _check_stop(self) -> None:
        if self.stop is not None and self.ranks.any(self.stop()):
            resample_noise(self.model, 0.0)
            self._save()
            self.ranks.wait()  # torchrun ends the others as soon as one has left, and rank 0 may still be writing
            raise Stopped(self.progress.step)

    def _save(self) -> None:
        if self.save is not None:
            self.save(self)
