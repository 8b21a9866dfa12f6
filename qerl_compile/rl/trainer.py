"""The loop: noise on, roll out, score, noise off, one update; nothing else.

    for step in 1..M:
        z ~ N(0, σ_step²) on every noisy norm                     noise_schedule.py, transform.resample_noise
        G completions for each of P prompts                       rollout/
        rewards → group-normalised advantages                     rewards/, advantages.py
        z = 0 (unless noise.in_update)                            QeRL, Algorithm 1: the update is of the clean policy
        DAPO loss over the groups with signal → AdamW on LoRA     policy_batch.py, losses/dapo.py

One update per rollout, so the old policy is the current one and every ratio is 1 when its gradient is taken; the
printed loss is about 0 by construction. Rollout log-probabilities come from the noisy policy, so their difference from
the trainer's is logged as `sampling/sampling_logp_difference` and not corrected here.

What is counted twice: the number of noisy norms is asserted against the plan at every step, because noise that
silently matched nothing is how the method failed elsewhere (design/method.md, trap 2).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qerl_compile.errors import ModelError
from qerl_compile.recipe import Recipe
from qerl_compile.rl.advantages import Advantages, group_advantages
from qerl_compile.rl.answers import Extractor
from qerl_compile.rl.evaluate import Evaluation, evaluate
from qerl_compile.rl.learning_rate import learning_rate
from qerl_compile.rl.losses import TokenCounts, dapo_loss
from qerl_compile.rl.noise_schedule import NoiseSchedule
from qerl_compile.rl.policy_batch import MicroBatch, micro_batches, token_logps
from qerl_compile.rl.prompts import PromptFormat, as_completion, end_token_ids, pad_token_id
from qerl_compile.rl.rewards import RewardFunction, Scores, score
from qerl_compile.rl.rollout import PagedSampler, Rollout, Rollouts, Sampler, Sampling
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.rl.step_metrics import length_metrics, memory_metrics, mismatch_metrics, reward_metrics
from qerl_compile.rl.tasks import Row, Task, columns
from qerl_compile.transforming import resample_noise, state_of

TRAINING_SHARE = 0.5  # of the free memory for the key-value cache: the update needs the other half

Report = Callable[[dict[str, float | int]], None]


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

    def __post_init__(self) -> None:
        self.config = self.recipe.train
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError(
                where="trainer",
                expected="a model with adapters to train",
                got="a model in which nothing requires gradients",
                do="Use a recipe with lora rules.",
            )
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
        )
        noise = self.recipe.noise
        silent = noise is None or noise.sigma_start == 0
        self.schedule = (
            None
            if noise is None or silent
            else NoiseSchedule(self.config.steps, noise.stages, noise.sigma_start, noise.sigma_end)
        )
        self.noise_sites = len(state_of(self.model).plan.noise)
        self.held_out = self.task.held_out(self.config.eval_size)
        self.end_ids = end_token_ids(self.tokenizer, self.model.generation_config)
        self.pad_id = pad_token_id(self.tokenizer, self.model.generation_config)
        self.seen_tokens = 0
        gib = self.config.rollout_memory_gib
        budget_bytes = None if gib is None else int(gib * 2**30)
        self.engine = self.sampler or PagedSampler(
            self.model, rows=self.config.rollout_batch, budget_bytes=budget_bytes, share=TRAINING_SHARE
        )

    def train(self) -> tuple[Evaluation, Evaluation]:
        """Run all steps; return the evaluations before and after."""
        before = latest = self.evaluate(0)
        for step in range(1, self.config.steps + 1):
            self.report(self.step(step))
            every = self.config.eval_every
            if step == self.config.steps or (every and step % every == 0):
                latest = self.evaluate(step)
        return before, latest

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate on the held-out items with the noise off, and report it."""
        start = time.perf_counter()
        greedy = self._sampling(0.0)
        result = evaluate(
            self.model, self.engine, self.tokenizer, self.task, self.held_out, self.prompt, self.extractor, greedy
        )
        self.report({"step": step, **result.metrics(), "eval/time": time.perf_counter() - start})
        if self.record is not None:
            self.record(step, result)
        return result

    def step(self, step: int) -> dict[str, float | int]:
        """Run one step (1-based) and return its metrics under TRL's names."""
        start = time.perf_counter()
        rows = self._rows(step)
        noise = self._add_noise(step)
        rollouts = self._roll_out(step, rows)
        rolled_out = time.perf_counter()
        scores = self._score(rows, rollouts)
        advantages = group_advantages(scores.total_N, self.config.group_size)
        if self.recipe.noise is None or not self.recipe.noise.in_update:
            resample_noise(self.model, 0.0)
        update = self._update(step, rollouts, advantages)
        done = time.perf_counter()
        lengths_N = torch.tensor([len(r.completion_ids) for r in rollouts])
        sampled = int(lengths_N.sum())
        self.seen_tokens += sampled + sum(len(r.prompt_ids) for r in rollouts)
        return {
            "step": step,
            **update,
            **reward_metrics(scores, advantages),
            **length_metrics(lengths_N, torch.tensor([r.ended for r in rollouts])),
            **noise,
            **rollouts.metrics,
            "num_tokens": self.seen_tokens,
            "rollout/tokens_per_s": sampled / (rolled_out - start),
            "time/rollout": rolled_out - start,
            "time/update": done - rolled_out,
            "step_time": done - start,
            **memory_metrics(self.parameters[0].device),
        }

    def _rows(self, step: int) -> list[Row]:
        count = self.config.prompts_per_step
        return self.task.train_rows(derive_seed(self.config.seed, "train"), (step - 1) * count, count)

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

    def _roll_out(self, step: int, rows: Sequence[Row]) -> Rollouts:
        prompts = [self.prompt.encode(self.tokenizer, row).ids for row in rows]
        params = self._sampling(self.config.temperature, (self.config.seed, "rollout", step))
        return self.engine.generate(prompts, self.config.group_size, params)

    def _sampling(self, temperature: float, seed: tuple[int | str, ...] = ()) -> Sampling:
        return Sampling(self.config.max_new_tokens, self.end_ids, self.pad_id, temperature, seed=seed)

    def _score(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> Scores:
        repeated = [row for row in rows for _ in range(self.config.group_size)]
        ids = [list(rollout.completion_ids) for rollout in rollouts]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return score(
            self.rewards,
            prompts=[row["prompt"] for row in repeated],
            completions=[as_completion(row, text) for row, text in zip(repeated, texts, strict=True)],
            completion_ids=ids,
            columns=columns(repeated),
        )

    def _update(self, step: int, rollouts: Sequence[Rollout], advantages: Advantages) -> dict[str, float | int]:
        """Take one optimizer step over the groups with signal.

        Without any, or with a gradient that is not finite, adapters and optimizer stay as they are.
        """
        config = self.config
        step_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = micro_batches(
            rollouts,
            advantages.advantages_N,
            max_tokens=config.micro_batch_tokens,
            pad_id=self.pad_id,
            device=self.parameters[0].device,
        )
        parts = [self._backward(batch, step_tokens) for batch in batches]
        if not parts:
            return {"loss": 0.0, "grad_norm": 0.0, "learning_rate": rate, "update/rows": 0}
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        if bool(grad_norm.isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        flat = [torch.cat([part.flat[name] for part in parts])[None] for name in ("logp", "sampling_logp", "entropy")]
        return {
            "loss": sum(part.loss for part in parts),
            "grad_norm": float(grad_norm),
            "learning_rate": rate,
            "entropy": float(flat[2].mean()),
            **TokenCounts.total(part.counts for part in parts).metrics(),
            **mismatch_metrics(flat[0], flat[1], torch.ones_like(flat[0], dtype=torch.bool)),
            "update/rows": sum(part.rows for part in parts),
        }

    def _backward(self, batch: MicroBatch, step_tokens: int) -> "_Part":
        logp_BC, entropy_BC = token_logps(self.model, batch, self.config.temperature)
        result = dapo_loss(
            logp_BC,
            None,
            batch.advantages_B,
            batch.mask_BC,
            step_tokens,
            epsilon_low=self.config.clip_low,
            epsilon_high=self.config.clip_high,
        )
        result.loss.backward()
        kept = {"logp": logp_BC.detach(), "sampling_logp": batch.sampling_logp_BC, "entropy": entropy_BC}
        flat = {name: values_BC[batch.mask_BC] for name, values_BC in kept.items()}
        return _Part(result.loss.item(), result.counts, flat, len(batch.ids_BS))


@dataclass(frozen=True)
class _Part:
    """What is kept of a micro-batch: its loss, clip counts, per-token values of its completions, number of rows."""

    loss: float
    counts: TokenCounts
    flat: dict[str, torch.Tensor]
    rows: int
