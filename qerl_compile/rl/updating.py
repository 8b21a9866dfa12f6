"""The update: from a step's completions to optimizer steps on the adapters, or to none if a number is not finite.

    for u in 1..updates_per_rollout:
        for each micro-batch:   log-probs, entropy (chunked head) → policy loss + KL + distillation → backward
        sum gradients over ranks, clip, AdamW

The first update is on policy: its log-probs, without gradient, are the old ones of those that follow, the trainer's
side of the mismatch, and the numerator of importance weights. Nothing is computed in a pass of its own but the
reference of a KL term, which is the model with its adapters off.

    loss = reward_weight * policy_loss + distill_weight / M * sum_t KL(policy || teacher)_t

*Not finite.* A NaN or Inf in loss, log-probs, or gradient, on any rank, and no optimizer step is taken: adapters and
optimizer keep every bit, also if an earlier update on the same rollout was finite. The trainer counts such steps.

*Out of memory.* A micro-batch that does not fit is cut into two and the update begins again with gradients at zero, so
the gradient is that of the whole; halves stay halves for the rest of the step. Losses are sums over rows divided by
totals of the step (`losses/inputs.py`), which is what makes the cut free of consequences.

Metrics are those of the first update (entropy, mismatch, which mean something on policy) and of all (loss, clipping).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.adapters_off import adapters_off
from qerl_compile.errors import ModelError
from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.collecting import Experience
from qerl_compile.rl.learning_rate import learning_rate
from qerl_compile.rl.losses import (
    LOSSES,
    Correction,
    LossInputs,
    LossOptions,
    Mismatch,
    StepTotals,
    TokenCounts,
    correct,
)
from qerl_compile.rl.policy_batch import MicroBatch, micro_batches, split
from qerl_compile.rl.ranks import Ranks
from qerl_compile.rl.token_logps import token_logps, token_logps_and_kl


@dataclass(frozen=True)
class Update:
    """What an update did.

    Args:
        metrics: under the names that metrics.jsonl has.
        finite: whether every number was; if not, nothing was changed.
    """

    metrics: dict[str, float | int]
    finite: bool


@dataclass(frozen=True)
class _Part:
    """What is kept of a micro-batch's backward; tensors are scalars on the device, so nothing waits for it."""

    loss: Tensor
    entropy: Tensor
    divergence: Tensor
    finite: Tensor
    rows: int
    counts: TokenCounts

    def vector(self) -> Tensor:
        """Loss, entropy, divergence, 1 if it is not finite, rows: float64 [5], to be added up."""
        rows = torch.full((), self.rows, device=self.loss.device)
        values = (self.loss, self.entropy, self.divergence, ~self.finite, rows)
        return torch.stack([value.double() for value in values])


class Updater:
    """Takes the optimizer steps of a run.

    Args:
        model: a transformed model.
        parameters: those that are trained.
        optimizer: over them.
        config: the recipe's training settings.
        pad_id: fills token ids.
        ranks: this process among others.
        teacher: for distillation, a causal LM with the same tokens; None for none.
        shares_gpu: whether the rollout's pages are in the memory of this GPU, and can be freed.
    """

    def __init__(
        self,
        model: Any,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        pad_id: int,
        ranks: Ranks,
        teacher: Any = None,
        *,
        shares_gpu: bool = True,
    ) -> None:
        self.shares_gpu = shares_gpu
        self.model, self.parameters, self.optimizer, self.config = model, parameters, optimizer, config
        self.pad_id, self.ranks, self.teacher = pad_id, ranks, teacher
        self.device = parameters[0].device
        self.loss = LOSSES[config.loss]
        self.options = LossOptions(
            config.clip_low, config.clip_high, config.clip_delta, config.kl_weight, config.kl_unbiased
        )

    def update(self, step: int, experience: Experience) -> Update:
        """Take the updates of the 1-based `step`."""
        rate = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._batches(experience)
        totals = self._totals(experience, batches)
        metrics: dict[str, float | int] = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": rate, "update/rows": 0}
        if totals is None:
            return Update(metrics, True)
        losses, norms, counts = 0.0, 0.0, []
        before = self._state() if self.config.updates_per_rollout > 1 else None
        for number in range(self.config.updates_per_rollout):
            batches, parts, mismatch = self._gradients(batches, totals, first=number == 0)
            self.ranks.sum_gradients(self.parameters)
            sums = self._sums(parts)
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            finite = bool(norm.isfinite()) and sums.bad == 0
            if finite:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses += sums.loss / self.config.updates_per_rollout
            norms = max(norms, float(norm)) if finite else float(norm)
            counts.append(sums.counts)
            metrics |= {"loss": losses, "grad_norm": norms, "update/rows": int(sums.rows)}
            if number == 0:
                metrics |= self._first_metrics(sums, mismatch)
            if not finite:
                if before is not None:
                    self._put_back(before)
                return Update(metrics, False)
        return Update(metrics | TokenCounts.total(counts).metrics(), True)

    def _state(self) -> tuple[list[Tensor], dict[str, Any]]:
        return [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def _put_back(self, before: tuple[list[Tensor], dict[str, Any]]) -> None:
        for parameter, old in zip(self.parameters, before[0], strict=True):
            parameter.copy_(old)
        self.optimizer.load_state_dict(before[1])

    def _batches(self, experience: Experience) -> list[MicroBatch]:
        """Return the micro-batches of this rank; rows without weight in any term are left out."""
        # bnpo's divisor counts the tokens of a micro-batch, those of groups without signal too
        everything = bool(self.config.kl_weight or self.config.distill_weight) or self.config.loss == "bnpo"
        kept = [i for i, r in enumerate(experience.rollouts) if r.ended or not self.config.mask_truncated]
        return list(
            micro_batches(
                [experience.rollouts[i] for i in kept],
                experience.advantages_N[kept],
                max_tokens=self.config.micro_batch_tokens,
                pad_id=self.pad_id,
                device=self.device,
                every_row=everything,
            )
        )

    def _totals(self, experience: Experience, batches: Sequence[MicroBatch]) -> StepTotals | None:
        """Return what the losses divide by, over all ranks; None if no rank has anything to train on."""
        masked = self.config.mask_truncated
        tokens = sum(len(r.completion_ids) for r in experience.rollouts if r.ended or not masked)
        both = self.ranks.sum(torch.tensor([tokens, len(batches)], dtype=torch.float64)).tolist()
        if not both[1]:
            return None
        return StepTotals(int(both[0]), experience.sequences, int(both[1]), self.config.max_new_tokens)

    def _with_reference(self, batch: MicroBatch) -> MicroBatch:
        with torch.no_grad(), adapters_off(self.model):
            logp_BC, _ = token_logps(self.model, batch, self.config.temperature)
        return replace(batch, reference_logp_BC=logp_BC)

    def _gradients(
        self, batches: list[MicroBatch], totals: StepTotals, *, first: bool
    ) -> tuple[list[MicroBatch], list[_Part], list[Mismatch]]:
        """Accumulate the gradient of all micro-batches; return them with what the first update learnt about them."""
        while True:
            done: list[MicroBatch] = []
            parts: list[_Part] = []
            mismatch: list[Mismatch] = []
            for number, batch in enumerate(batches):
                try:
                    if self.config.kl_weight and batch.reference_logp_BC is None:
                        batch = self._with_reference(batch)
                    part, old_logp_BC = self._backward(batch, totals)
                except torch.OutOfMemoryError as fault:
                    failed, reason = number, str(fault)
                    break
                if first:
                    batch, measured = self._as_old(batch, old_logp_BC)
                    mismatch.append(measured)
                done.append(batch)
                parts.append(part)
            else:
                return done, parts, mismatch
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            batches = [*batches[:failed], *self._halves(batches[failed], reason), *batches[failed + 1 :]]

    def _halves(self, batch: MicroBatch, reason: str) -> tuple[MicroBatch, MicroBatch]:
        if self.config.loss == "bnpo":  # the only loss that depends on how a step is cut
            raise ModelError(
                where="update, train.loss=bnpo",
                expected=f"memory for a micro-batch of {self.config.micro_batch_tokens} tokens",
                got=reason.splitlines()[0],
                do="Lower train.micro_batch_tokens, or choose train.loss=dapo.",
            )
        if len(batch.rows) > 1:
            return split(batch)
        raise ModelError(
            where="update",
            expected=f"memory for one sequence of {batch.ids_BS.shape[1]} tokens",
            got=reason.splitlines()[0],
            do=self._what_frees_memory(),
        )

    def _what_frees_memory(self) -> str:
        if not self.config.recompute:
            return "Set train.recompute=true."
        can_free = self.shares_gpu and self.config.rollout_cache == "kept"
        return "Set train.rollout_cache=freed." if can_free else "Lower train.max_new_tokens."

    def _backward(self, batch: MicroBatch, totals: StepTotals) -> tuple[_Part, Tensor]:
        config, kl_BC = self.config, None
        if self.teacher is not None and config.distill_weight:
            logp_BC, entropy_BC, kl_BC = token_logps_and_kl(self.model, self.teacher, batch, config.temperature)
        else:
            logp_BC, entropy_BC = token_logps(self.model, batch, config.temperature)
        weight_BC = batch.weight_BC
        if weight_BC is None and config.correction != "none":
            weight_BC = self._correction(batch, logp_BC.detach()).weight_BT
        result = self.loss(
            LossInputs(
                logp_BC,
                batch.old_logp_BC,
                batch.advantages_B,
                batch.mask_BC,
                weight_BC,
                batch.reference_logp_BC,
            ),
            totals,
            self.options,
        )
        loss = config.reward_weight * result.loss
        divergence = torch.zeros((), device=self.device)
        if kl_BC is not None:
            divergence = kl_BC.sum()
            loss = loss + config.distill_weight * divergence / max(totals.tokens, 1)
        loss.backward()
        logp_BC = logp_BC.detach()
        finite = loss.detach().isfinite() & logp_BC.isfinite().all()  # 0 outside the mask
        entropy = entropy_BC.sum()
        part = _Part(loss.detach(), entropy, divergence.detach(), finite, len(batch.rows), result.counts)
        return part, logp_BC

    def _correction(self, batch: MicroBatch, logp_BC: Tensor) -> Correction:
        how, level, cap = self.config.correction, self.config.correction_level, self.config.correction_cap
        return correct(logp_BC, batch.sampling_logp_BC, batch.mask_BC, how=how, level=level, cap=cap)

    def _as_old(self, batch: MicroBatch, logp_BC: Tensor) -> tuple[MicroBatch, Mismatch]:
        """Return the batch with what later updates compare with, and how far the sampler was from the trainer."""
        corrected = self._correction(batch, logp_BC)
        return replace(batch, old_logp_BC=logp_BC, weight_BC=corrected.weight_BT), corrected.mismatch

    def _sums(self, parts: Sequence[_Part]) -> "_Sums":
        """Return an update's numbers over all micro-batches and ranks."""
        counted = 5 if self.config.kl_weight else 4
        totals = torch.zeros(5 + counted, dtype=torch.float64)
        if parts:
            lines = [torch.cat([part.vector(), part.counts.vector()]) for part in parts]
            totals = torch.stack(lines).sum(0).cpu()
        totals = self.ranks.sum(totals)
        return _Sums(*totals[:5].tolist(), counts=TokenCounts.from_vector(totals[5:]))

    def _first_metrics(self, sums: "_Sums", mismatch: Sequence[Mismatch]) -> dict[str, float]:
        tokens = max(float(sums.counts.tokens), 1.0)
        metrics = {"entropy": sums.entropy / tokens}
        if self.config.distill_weight:
            metrics["distill/kl"] = sums.divergence / tokens
        mine = Mismatch.total(mismatch)
        return metrics | Mismatch(self.ranks.sum(mine.sums.cpu()), self.ranks.max(mine.peaks.cpu())).metrics()


@dataclass(frozen=True)
class _Sums:
    """Numbers of one update, summed over micro-batches and ranks."""

    loss: float
    entropy: float
    divergence: float
    bad: float
    rows: float
    counts: TokenCounts
