"""The loop on a toy task: that it learns, what it reports, and what it must leave alone."""

import math
import resource
from contextlib import contextmanager

import pytest
import torch

from qerl_compile.errors import ModelError, NotFiniteError
from qerl_compile.passes.adapt import DERIVED as OF_ROLLOUTS
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.transforming import transform
from tests.models import tiny_model
from tests.rl.toy import Echo, toy_model, toy_recipe, toy_trainer

STEPS = 20
NORMS = [f"model.layers.{layer}.{name}_layernorm" for layer in (0, 1) for name in ("input", "post_attention")]
EVERY_STEP = {
    "step", "loss", "grad_norm", "learning_rate", "update/rows", "update/bad_steps", "num_tokens",
    "rewards/answer/timeouts", "rewards/answer/errors",
    "dynamic_sampling/rounds", "dynamic_sampling/groups_with_signal",
    "reward", "reward_std", "frac_reward_zero_std", "rewards/answer/mean", "rewards/answer/std",
    "completions/clipped_ratio",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length",
    "noise/sigma", "noise/rms", "noise/sites",
    "rollout/tokens_per_s", "update/tokens_per_s", "time/rollout", "time/update", "step_time", "memory/peak_rss_mib",
    "rollout/decode_steps", "rollout/occupancy", "rollout/prefill_tokens", "rollout/prefill_time", "rollout/time",
    "rollout/cache_bytes",
}  # fmt: skip
WITH_SIGNAL = EVERY_STEP | {
    "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "sampling/mismatch_kl/k1", "sampling/mismatch_kl/k3", "sampling/corrected_tokens",
    "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
}  # fmt: skip
EVALUATION = {
    "step", "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/items", "eval/mean_length", "eval/time",
}  # fmt: skip
PARITY = {"step", "parity/difference_mean", "parity/difference_max"}
MEASURED = {
    "rollout/tokens_per_s", "update/tokens_per_s", "rollout/prefill_time", "rollout/time", "time/rollout",
    "time/update", "step_time", "memory/peak_rss_mib", "eval/time",
}  # fmt: skip


def state_of(model):
    """Every tensor that a model owns, the packed weights as their bytes; not what rollouts derive from them."""
    tensors = {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name.rpartition(".")[2] not in OF_ROLLOUTS
    }
    return {name: t.contiguous().view(torch.uint8).clone() if t.dim() else t.clone() for name, t in tensors.items()}


def changed(before, model):
    """Names of the tensors whose bits differ; ghosts are NaN and compared by their bits too."""
    after = state_of(model)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@contextmanager
def watched(model):
    """Yield a list that gets (gradient on, tokens, largest noise) of every forward."""
    seen = []

    def note_of_backbone(_module, _, inputs):
        loudest = max(float(model.get_submodule(path).noise.abs().max()) for path in NORMS)
        seen.append((torch.is_grad_enabled(), inputs["input_ids"].numel(), loudest))

    hook = model.model.register_forward_pre_hook(note_of_backbone, with_kwargs=True)
    yield seen
    hook.remove()


def steps_of(rows):
    return [row for row in rows if "reward" in row]


def without_measurements(rows):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def trained():
    """One run of 20 steps with noise: rows, forwards, evaluations, names of trainable and of changed tensors."""
    recipe = toy_recipe(train__steps=STEPS, train__eval_every=8)
    trainer, rows = toy_trainer(recipe)
    before = state_of(trainer.model)
    with watched(trainer.model) as seen:
        recorded = []
        trainer.record = lambda step, evaluation: recorded.append(evaluation)
        trainer.train()
        evaluations = (recorded[0], recorded[-1])
    adapters = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    return rows, seen, evaluations, adapters, changed(before, trainer.model)


def test_reward_and_held_out_accuracy_rise(trained):
    rows, _, (before, after), *_ = trained
    rewards = [row["reward"] for row in steps_of(rows)]
    assert len(rewards) == STEPS
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-5:]) / 5 > 0.8
    assert (before.accuracy.correct, after.accuracy.correct) == (1, 4)


def test_rows_have_the_names_of_trl(trained):
    rows, *_ = trained
    for row in steps_of(rows):
        assert row.keys() == (WITH_SIGNAL if row["update/rows"] else EVERY_STEP)
    others = [row for row in rows if "reward" not in row]
    assert [row.keys() for row in others if "parity/difference_mean" in row] == [PARITY]
    assert all(row.keys() == EVALUATION for row in others if "eval/accuracy" in row)


def test_evaluations_come_before_the_first_step_every_so_many_and_after_the_last(trained):
    rows, *_ = trained
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 8, 16, 20]
    assert [row["step"] for row in steps_of(rows)] == list(range(1, STEPS + 1))


def test_numbers_of_a_step_agree_with_each_other(trained):
    rows, *_ = trained
    for step, row in enumerate(steps_of(rows), start=1):
        assert row["loss"] == pytest.approx(0.0, abs=1e-6)  # on policy, with advantages that sum to 0
        assert row["num_tokens"] == step * 64 * (3 + 1)  # prompts of three words, completions of one
        assert row["update/rows"] == round(64 * (1 - row["frac_reward_zero_std"]))
        assert row["learning_rate"] == 5e-3
        assert row["step_time"] == pytest.approx(row["time/rollout"] + row["time/update"])
        assert 100 < row["memory/peak_rss_mib"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first = steps_of(rows)[0]
    assert first["sampling/sampling_logp_difference/max"] < 1e-5  # no noise yet: trainer and sampler agree
    assert 0 < first["entropy"] < math.log(16)
    assert steps_of(rows)[2]["sampling/sampling_logp_difference/max"] > 1e-4  # noise of 1e-2 shows


def test_sigma_follows_the_schedule_and_every_noisy_norm_is_counted(trained):
    rows, *_ = trained
    sigmas = [0, 1e-2, 6.8766e-3, 4.7287e-3, 3.2517e-3, 2.2361e-3, 1.5376e-3, 1.0574e-3, 7.2711e-4, 5e-4]
    assert [row["noise/sigma"] for row in steps_of(rows)] == pytest.approx([s for s in sigmas for _ in "12"], rel=1e-4)
    for row in steps_of(rows):
        assert row["noise/sites"] == len(NORMS)
        assert row["noise/rms"] == pytest.approx(row["noise/sigma"], rel=0.2)


def test_noise_is_on_in_rollouts_and_off_in_updates_and_evaluations(trained):
    _, seen, *_ = trained
    assert {loudest for grad, _, loudest in seen if grad} == {0.0}
    silent = [count for grad, count, loudest in seen if not grad and loudest == 0.0]
    # Four evaluations, the parity gate's rollout and the two steps of the silent stage: four prompts of three words,
    # answered by one token. The gate's own forward has two samples of each prompt with their answers; before it, once
    # in the life of a model, two rows of them run with and without the head.
    assert sorted(count for count in silent if count != 8) == [12] * 7 + [32]
    assert silent.count(8) in (0, 2)
    noisy = [loudest for grad, _, loudest in seen if not grad and loudest > 0.0]
    assert len(noisy) == STEPS - 2
    assert noisy[0] > 1e-2 > noisy[-1] > 5e-4


def test_only_adapters_change(trained):
    *_, trainable, changed_names = trained
    assert len(changed_names) == 2 * 7 * 2
    assert all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in changed_names)
    assert changed_names == trainable


def test_noise_in_update_stays_on_for_the_update_but_not_for_evaluations():
    trainer, rows = toy_trainer(toy_recipe(train__steps=3, noise__in_update=True, noise__sigma_start=0.1))
    with watched(trainer.model) as seen:
        trainer.train()
    updates = [loudest for grad, _, loudest in seen if grad]
    assert [loudest > 0 for loudest in updates] == [False, True, True]
    assert seen[-1][0] is False
    assert seen[-1][2] == 0.0  # the last forward is the last evaluation's
    assert max(row["sampling/sampling_logp_difference/max"] for row in steps_of(rows)) < 1e-5


def test_a_run_repeats_itself_bit_for_bit_and_another_seed_does_not():
    runs = []
    for seed in (0, 0, 1):
        trainer, rows = toy_trainer(toy_recipe(train__steps=4, train__seed=seed))
        trainer.train()
        runs.append((without_measurements(rows), state_of(trainer.model)))
    (rows, state), (rows_again, state_again), (rows_other, state_other) = runs
    assert rows == rows_again
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    first, other = steps_of(rows)[0], steps_of(rows_other)[0]
    assert first["reward"] != other["reward"] or first["entropy"] != other["entropy"]
    assert any(not torch.equal(state[name], state_other[name]) for name in state)


def test_a_step_without_signal_leaves_adapters_and_optimizer_untouched():
    trainer, rows = toy_trainer(toy_recipe(train__weight_decay=0.5), rewards=[constant])
    trainer.step(1)
    assert not trainer.optimizer.state
    before = state_of(trainer.model)
    row = trainer.step(2)
    assert changed(before, trainer.model) == set()
    about = ("mean", "std", "timeouts", "errors")
    assert row.keys() == EVERY_STEP - {f"rewards/answer/{x}" for x in about} | {f"rewards/constant/{x}" for x in about}
    assert (row["loss"], row["grad_norm"], row["update/rows"], row["frac_reward_zero_std"]) == (0.0, 0.0, 0, 1.0)
    assert rows == []


def constant(completions, **_):
    return [0.5] * len(completions)


def test_a_gradient_that_is_not_finite_is_reported_and_not_applied():
    trainer, _ = toy_trainer(toy_recipe())
    before = state_of(trainer.model)
    hook = trainer.parameters[3].register_hook(lambda gradient: gradient * math.inf)
    row = trainer.step(1)
    hook.remove()
    assert row["update/rows"] > 0
    assert not math.isfinite(row["grad_norm"])
    assert changed(before, trainer.model) == set()
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_a_norm_that_lost_its_noise_is_an_error_and_not_a_quieter_run():
    trainer, _ = toy_trainer(toy_recipe())
    norm = trainer.model.get_submodule(NORMS[2])
    noise = norm._buffers.pop("noise")
    with pytest.raises(ModelError, match="step 1: noise: expected 4 noisy norms, as planned; got 3"):
        trainer.step(1)
    norm._buffers["noise"] = noise


def test_a_recipe_with_noise_on_a_model_without_noisy_norms_is_an_error():
    trainer, _ = toy_trainer(toy_recipe(), model=toy_model("nvfp4-lora"))
    with pytest.raises(ModelError, match="step 1: noise"):
        trainer.step(1)


def test_a_recipe_without_noise_reports_none():
    trainer, _ = toy_trainer(toy_recipe("nvfp4-lora"))
    assert trainer.step(1).keys() == {name for name in WITH_SIGNAL if not name.startswith("noise/")}


def test_a_recipe_whose_noise_starts_at_zero_is_one_without_noise():
    recipe = toy_recipe(noise__sigma_start=0.0, noise__sigma_end=0.0)
    trainer, _ = toy_trainer(recipe)
    assert "noise/sigma" not in trainer.step(1)


def test_noise_without_quantization_trains_too():
    recipe = toy_recipe("bf16-lora-aqn", train__steps=4)
    trainer, rows = toy_trainer(recipe)
    before = state_of(trainer.model)
    trainer.train()
    assert [row["noise/sites"] for row in steps_of(rows)] == [4] * 4
    assert [row["noise/sigma"] > 0 for row in steps_of(rows)] == [False, True, True, True]
    assert changed(before, trainer.model) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16


def test_a_recipe_without_adapters_is_refused():
    recipe = toy_recipe(lora="[]")
    model = transform(tiny_model("llama", layers=1), recipe, inner="eager")
    model.fresh_state = model.state_dict()
    with pytest.raises(ModelError, match=r"nothing requires gradients\. Use a recipe with lora rules"):
        toy_trainer(recipe, model=model)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    rows = []
    for tokens in (4096, 1, 12):
        trainer, _ = toy_trainer(toy_recipe(train__micro_batch_tokens=tokens, train__max_grad_norm=1e9))
        rows.append((trainer.step(1), trainer.optimizer.state[trainer.parameters[1]]["exp_avg"]))
    (whole, gradient), *cut = rows
    for row, cut_gradient in cut:
        assert row["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert row["update/rows"] == whole["update/rows"]
        torch.testing.assert_close(cut_gradient, gradient, rtol=1e-3, atol=1e-7)
    assert whole["grad_norm"] > 0.1


def test_whole_evaluations_are_recorded_with_their_step():
    recorded = []
    trainer, _ = toy_trainer(toy_recipe(train__steps=1), record=lambda *given: recorded.append(given))
    after = trainer.train()
    assert [step for step, _ in recorded] == [0, 1]
    assert recorded[1][1] is after


def test_every_step_takes_the_next_prompts_of_the_run():
    trainer, _ = toy_trainer(toy_recipe(train__prompts_per_step=3, train__seed=5))
    asked = []
    trainer.task.train_row = lambda seed, position: asked.append((seed, position)) or Echo.train_row(None, 0, position)
    for step in (1, 2, 3):
        trainer.step(step)
    assert [position for _, position in asked] == list(range(9))
    assert {seed for seed, _ in asked} == {derive_seed(5, "train")}


def test_a_rollout_that_fails_in_a_later_round_draws_none_of_its_prompts_again():
    drawn = []

    class Counted(Echo):
        def train_row(self, seed, position):
            drawn.extend([position] if seed else [])  # 0 is that of the held-out ones
            return super().train_row(seed, position)

    rules = toy_recipe("nvfp4-lora", train__dynamic_sampling_rounds=2, train__max_bad_steps=5)
    trainer, _ = toy_trainer(rules, task=Counted(), rewards=[lambda completions, **_: [1.0] * len(completions)])
    generate, calls = trainer.engine.generate, iter(range(100))

    def generate_or_fail(*args):
        if next(calls) == 2:
            raise NotFiniteError(where="logits", expected="finite", got="nan", do="nothing")
        return generate(*args)

    trainer.engine.generate = generate_or_fail
    assert "nan" in trainer.step(1)["update/fault"]
    trainer.step(2)
    assert len(drawn) == len(set(drawn)) == 6 * rules.train.prompts_per_step


def test_a_cache_that_is_freed_before_each_update_changes_nothing_but_the_memory_of_the_update(monkeypatch):
    ends = {}
    for kept in ("kept", "freed"):
        recipe = toy_recipe(train__rollout_cache=kept, train__steps=3, train__eval_every=1, train__max_new_tokens=3)
        trainer, rows = toy_trainer(recipe)
        held = []

        def noting(step, experience, update=trainer.updater.update, engine=trainer.engine, held=held):
            held.append(engine._cache is not None)
            return update(step, experience)

        monkeypatch.setattr(trainer.updater, "update", noting)
        trainer.train()
        freed = [row.pop("rollout/freed_bytes", None) for row in steps_of(rows)]
        assert freed == [row["rollout/cache_bytes"] if kept == "freed" else None for row in steps_of(rows)]
        assert held == [kept == "kept"] * 3
        assert trainer.engine._cache is not None  # the last evaluation's
        ends[kept] = ([p.detach().clone() for p in trainer.parameters], without_measurements(rows))
    (kept, kept_rows), (freed, freed_rows) = ends.values()
    assert all(torch.equal(one, other) for one, other in zip(kept, freed, strict=True))
    assert freed_rows == kept_rows
    assert any(row["update/rows"] for row in steps_of(kept_rows))


def test_an_engine_that_cannot_free_its_cache_is_refused_when_the_trainer_is_made():
    class Other:
        def generate(self, prompts, group_size, params):
            raise AssertionError

    with pytest.raises(ModelError, match=r"train\.rollout_cache=freed: expected our own rollout engine.*got Other"):
        toy_trainer(toy_recipe(train__rollout_cache="freed"), sampler=Other())
