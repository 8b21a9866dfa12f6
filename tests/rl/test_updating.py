"""The update: terms of the loss, several updates, what happens without finite numbers and without memory."""

import math
from dataclasses import replace

import pytest
import torch

from qerl_compile.errors import ModelError
from qerl_compile.rl import updating
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.token_logps import token_logps
from tests.models import tiny_model
from tests.rl.toy import WORDS, toy_recipe, toy_trainer


def experience_of(trainer, step=1):
    """One step's completions; learning rate and noise do not matter here."""
    return trainer._collect(step)


def trainer_with(**settings):
    fields = {name: settings.pop(name) for name in ("teacher",) if name in settings}
    trainer, _ = toy_trainer(toy_recipe("nvfp4-lora", **{f"train__{k}": v for k, v in settings.items()}), **fields)
    return trainer


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.parameters]


def gradients(trainer, experience):
    """The summed gradient of the first update, caught where ranks would add it up."""
    caught = []

    class Catching(type(trainer.ranks)):
        def sum_gradients(self, parameters):
            caught.append([p.grad.clone() for p in parameters])

    trainer.updater.ranks = Catching()
    update = trainer.updater.update(1, experience)
    return caught[0], update


def test_several_updates_move_the_policy_away_from_the_old_one():
    trainer = trainer_with(updates_per_rollout=4, learning_rate=0.02)
    experience = experience_of(trainer)
    before = weights(trainer)
    update = trainer.updater.update(1, experience)
    assert update.finite
    steps = {int(trainer.optimizer.state[p]["step"]) for p in trainer.parameters}
    assert steps == {4}
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert update.metrics["clip_ratio/region_mean"] > 0  # the ratio left [0.8, 1.28] somewhere in four big steps
    assert update.metrics["loss"] < 0


def test_one_update_never_clips_because_every_ratio_is_one():
    trainer = trainer_with()
    update = trainer.updater.update(1, experience_of(trainer))
    assert update.metrics["clip_ratio/region_mean"] == 0
    assert update.metrics["loss"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"])
def test_every_loss_of_the_recipe_trains(loss):
    trainer = trainer_with(loss=loss)
    before = weights(trainer)
    update = trainer.updater.update(1, experience_of(trainer))
    assert update.finite
    assert update.metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_the_kl_term_is_of_the_model_without_its_adapter_and_needs_every_row():
    trainer = trainer_with(kl_weight=0.5)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    before = weights(trainer)
    experience = experience_of(trainer)
    zeroed = replace(experience, advantages_N=torch.zeros_like(experience.advantages_N))
    grads, update = gradients(trainer, zeroed)
    assert update.metrics["kl"] > 1e-4
    assert update.metrics["update/rows"] == len(experience.rollouts)
    assert any(float(grad.abs().max()) > 0 for grad in grads)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(before, weights(trainer), strict=True)) is False
    fresh = trainer_with(kl_weight=0.5)  # B = 0: policy and reference are the same
    _, update = gradients(fresh, experience_of(fresh))
    assert update.metrics["kl"] == pytest.approx(0, abs=1e-7)


def test_distillation_alone_moves_the_policy_towards_its_teacher():
    teacher = tiny_model("llama", vocab_size=len(WORDS), eos_token_id=1, seed=7)
    trainer = trainer_with(teacher=teacher, distill_weight=1.0, reward_weight=0.0, learning_rate=0.02)
    divergences = []
    for step in range(1, 9):
        update = trainer.updater.update(1, experience_of(trainer, step))
        divergences.append(update.metrics["distill/kl"])
    assert divergences[-1] < 0.7 * divergences[0]


def test_a_weight_for_distillation_without_a_teacher_is_refused():
    with pytest.raises(ModelError, match=r"distill_weight: expected a teacher.*Pass --teacher"):
        trainer_with(distill_weight=1.0)


def test_a_sampler_that_is_off_is_corrected_and_measured():
    trainer = trainer_with(correction="truncate", correction_cap=2.0)
    experience = experience_of(trainer)
    plain, update = gradients(trainer, experience)
    assert update.metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    off = [replace(r, logps=tuple(x - math.log(4) for x in r.logps)) for r in experience.rollouts]
    trainer = trainer_with(correction="truncate", correction_cap=2.0)
    doubled, update = gradients(trainer, replace(experience, rollouts=off))
    assert update.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(4), abs=1e-4)
    assert update.metrics["sampling/corrected_tokens"] == 1
    for one, two in zip(plain, doubled, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-3, atol=1e-6)
    trainer = trainer_with(correction="mask", correction_cap=2.0)
    nothing, _ = gradients(trainer, replace(experience, rollouts=off))
    assert all(float(grad.abs().max()) == 0 for grad in nothing)


def test_truncated_completions_can_be_left_out():
    trainer = trainer_with(mask_truncated=True)
    experience = experience_of(trainer)
    cut = [replace(r, ended=False) for r in experience.rollouts]
    update = trainer.updater.update(1, replace(experience, rollouts=cut))
    assert update.metrics["update/rows"] == 0
    assert not trainer.optimizer.state


@pytest.mark.parametrize("fault", ["logp", "advantage", "gradient", "weight"])
def test_a_number_that_is_not_finite_leaves_every_parameter_as_it_was(fault):
    trainer = trainer_with()
    experience = experience_of(trainer)
    before = weights(trainer)
    hook = None
    if fault == "logp":
        head = trainer.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, logits: logits * math.nan)
    elif fault == "advantage":
        experience = replace(experience, advantages_N=experience.advantages_N * math.inf)
    elif fault == "gradient":
        hook = trainer.parameters[3].register_hook(lambda gradient: gradient * math.nan)
    else:
        trainer.model.model.norm.weight.data[0] = math.nan
    update = trainer.updater.update(1, experience)
    if hook is not None:
        hook.remove()
    assert not update.finite
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert not trainer.optimizer.state
    assert all(parameter.grad is None for parameter in trainer.parameters)


def out_of_memory_above(monkeypatch, rows):
    """Let log-probabilities of more than so many rows run out of memory in the middle of the update."""
    asked = []

    def limited(model, batch, temperature):
        asked.append(len(batch.rows))
        result = token_logps(model, batch, temperature)
        if len(batch.rows) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    monkeypatch.setattr(updating, "token_logps", limited)
    return asked


def test_without_memory_a_micro_batch_is_halved_until_it_fits_and_the_gradient_is_the_same(monkeypatch):
    trainer = trainer_with()
    experience = experience_of(trainer)
    whole, update = gradients(trainer, experience)
    asked = out_of_memory_above(monkeypatch, rows=5)
    trainer = trainer_with()
    halved, again = gradients(trainer, experience)
    assert max(asked) > 5
    assert sum(asked[-5:]) >= update.metrics["update/rows"] - 5
    assert again.metrics["update/rows"] == update.metrics["update/rows"]
    assert again.metrics["grad_norm"] == pytest.approx(update.metrics["grad_norm"], rel=1e-4)
    for one, other in zip(whole, halved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "shares_gpu", "do"),
    [
        ({}, True, r"Set train\.recompute=true"),
        ({"recompute": True}, True, r"Set train\.rollout_cache=freed"),
        ({"recompute": True, "rollout_cache": "freed"}, True, r"Lower train\.max_new_tokens"),
        ({"recompute": True}, False, r"Lower train\.max_new_tokens"),
    ],
    ids=["nothing", "recompute", "recompute, freed", "another engine"],
)
def test_one_sequence_that_does_not_fit_ends_the_run_with_numbers_and_one_suggestion(
    monkeypatch, settings, shares_gpu, do
):
    trainer = trainer_with(**settings)
    experience = experience_of(trainer)
    out_of_memory_above(monkeypatch, rows=0)
    before = weights(trainer)
    assert trainer.updater.shares_gpu  # our own engine
    trainer.updater.shares_gpu = shares_gpu
    with pytest.raises(ModelError, match=rf"one sequence of 4 tokens; got CUDA out of memory.*{do}"):
        trainer.updater.update(1, experience)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_what_is_logged_agrees_with_the_log_probabilities():
    trainer = trainer_with()
    experience = experience_of(trainer)
    batches = micro_batches(
        experience.rollouts, experience.advantages_N, max_tokens=4096, pad_id=0, device=torch.device("cpu")
    )
    with torch.no_grad():
        entropies = torch.cat([token_logps(trainer.model, b, 1.0)[1][b.mask_BC] for b in batches])
    update = trainer.updater.update(1, experience)
    assert update.metrics["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)


def test_a_later_update_that_is_not_finite_takes_the_earlier_ones_back():
    trainer = trainer_with(updates_per_rollout=3)
    experience = experience_of(trainer)
    trainer.updater.update(1, experience)  # the optimizer has moments by now
    before, moments = weights(trainer), [trainer.optimizer.state[p]["exp_avg"].clone() for p in trainer.parameters]
    calls = []

    class Spoiling(type(trainer.ranks)):
        def sum_gradients(self, parameters):
            calls.append(1)
            if len(calls) == 2:
                parameters[0].grad.fill_(math.nan)

    trainer.updater.ranks = Spoiling()
    assert not trainer.updater.update(2, experience).finite
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    after = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.parameters]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert {int(trainer.optimizer.state[p]["step"]) for p in trainer.parameters} == {3}
