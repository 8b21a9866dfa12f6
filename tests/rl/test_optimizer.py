"""AdamW with moments in float32 and in 8 bits: what it keeps, how far apart the two are, and what is refused before."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qerl_compile.errors import ModelError, RecipeError
from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.checkpoints import latest, restore, save
from qerl_compile.rl.optimizer import check_optimizer, make_optimizer, moment_bytes
from tests.rl.checkpoints.world import Toy, one_step, progress, same, seed_all, state_of, trained, who
from tests.rl.toy import toy_recipe, toy_trainer

EIGHT = TrainConfig(optimizer="adamw_8bit", learning_rate=1e-2)
RANK = 1400  # up.lora_A [1400, 4] and down.lora_B [4, 1400] have 8-bit moments, the others and the norm float32 ones


def made(config, model=None):
    model = model or Toy(rank=RANK)
    return model, make_optimizer(model, trained(model), config)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_norms_have_no_weight_decay_and_factors_have_the_recipes(kind):
    model, optimizer = made(TrainConfig(optimizer=kind, weight_decay=0.25, betas=(0.5, 0.75), learning_rate=1e-3))
    factors, norms = optimizer.param_groups
    assert [id(p) for p in norms["params"]] == [id(model.norm.trained_weight)]
    assert len(factors["params"]) == 4
    assert (factors["weight_decay"], norms["weight_decay"]) == (0.25, 0.0)
    assert all((g["lr"], g["betas"], g["eps"]) == (1e-3, (0.5, 0.75), 1e-8) for g in optimizer.param_groups)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_moments_take_the_bytes_that_are_promised(kind):
    model, optimizer = made(TrainConfig(optimizer=kind))
    one_step(model, optimizer)
    tables = {"step", "qmap1", "qmap2"}  # one table for all parameters
    kept = [v.nbytes for each in optimizer.state.values() for name, v in each.items() if name not in tables]
    sizes = [p.numel() for p in trained(model)]
    assert sum(kept) == moment_bytes(sizes, kind)
    if kind == "adamw_8bit":
        dtypes = {p.numel(): optimizer.state[p]["state1"].dtype for p in trained(model)}
        assert dtypes == {5600: torch.uint8, 4200: torch.uint8, 3: torch.float32}
        assert sum(kept) < 0.26 * moment_bytes(sizes, "adamw")


def test_qwen_32b_at_rank_32_saves_what_the_documentation_says():
    layer = 2 * [(5120, 5120)] + 2 * [(5120, 1024)] + 2 * [(5120, 27648)] + [(27648, 5120)]
    sizes = [32 * width for sides in layer for width in sides] * 64
    assert sum(sizes) == 268_435_456
    assert moment_bytes(sizes, "adamw") - moment_bytes(sizes, "adamw_8bit") == pytest.approx(1.602e9, rel=1e-3)


def test_steps_in_8_bits_stay_near_those_in_float32():
    """30 steps of a drifting, noisy gradient; one entry of 256 in a block costs at most a few percent of a step."""
    moved = {}
    for kind in ("adamw", "adamw_8bit"):
        model, optimizer = made(TrainConfig(optimizer=kind, learning_rate=1e-3, weight_decay=0.1))
        before = [p.detach().clone() for p in trained(model)]
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            for p in trained(model):
                p.grad = (torch.randn(p.shape, generator=generator) + math.sin(step / 5)) * 1e-3
            optimizer.step()
        moved[kind] = [(p.detach() - old).flatten() for p, old in zip(trained(model), before, strict=True)]
    for p, one, other in zip(trained(Toy(rank=RANK)), *moved.values(), strict=True):
        off = float((one - other).norm() / one.norm())
        assert off < (0.05 if p.numel() > 4096 else 1e-4)
        assert float(one.abs().mean()) > 1e-3


def test_four_steps_and_four_after_a_restore_equal_eight_in_8_bits(tmp_path):
    straight, optimizer = made(EIGHT)
    seed_all(1)
    for _ in range(8):
        one_step(straight, optimizer)
    end = state_of(straight, optimizer)
    first, optimizer = made(EIGHT)
    seed_all(1)
    for _ in range(4):
        one_step(first, optimizer)
    save(tmp_path, who(first), progress(4), first, optimizer)
    second, optimizer = made(EIGHT)
    one_step(second, optimizer)
    restore(latest(tmp_path)[0], who(second), second, optimizer)
    for _ in range(4):
        one_step(second, optimizer)
    assert {"state1", "absmax1", "qmap1", "state2", "absmax2", "qmap2", "step"} == end["optimizer"][0].keys()
    assert same(state_of(second, optimizer), end)


def shorter(moments):
    moments["state1"] = moments["state1"][:3]


def too_few_blocks(moments):
    moments["absmax2"] = moments["absmax2"][:-1]


def short_table(moments):
    moments["qmap1"] = moments["qmap1"][:16]


def wide(moments):
    moments["state2"] = moments["state2"].float()


def negative(moments):
    moments["absmax1"] = -moments["absmax1"] - 1


def missing(moments):
    del moments["absmax1"]


@pytest.mark.parametrize("change", [shorter, too_few_blocks, short_table, wide, negative, missing])
def test_moments_of_another_shape_are_refused_before_a_kernel_reads_behind_them(change):
    from qerl_compile.errors import CheckpointError
    from qerl_compile.rl.checkpoints import optimizer_state
    from qerl_compile.rl.checkpoints.eight_bit_state import MOMENTS

    model, optimizer = made(EIGHT)
    one_step(model, optimizer)
    saved = optimizer_state.optimizer_state(model, optimizer)
    assert optimizer_state.judged(saved, model, optimizer, "here") is saved["state_dict"]
    change(saved["state_dict"]["state"][0][MOMENTS])
    with pytest.raises(CheckpointError, match="here: state of parameter 0"):
        optimizer_state.judged(saved, model, optimizer, "here")


def test_a_checkpoint_of_the_other_optimizer_is_refused(tmp_path):
    from qerl_compile.errors import CheckpointError

    model, optimizer = made(EIGHT)
    one_step(model, optimizer)
    save(tmp_path, who(model), progress(1), model, optimizer)
    other, plain = made(TrainConfig())
    with pytest.raises(CheckpointError, match=r"param_groups\[0\]: expected the settings"):
        restore(latest(tmp_path)[0], who(other), other, plain)


def test_a_missing_or_old_library_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer(TrainConfig())  # it is not asked for
    for call in (lambda: check_optimizer(EIGHT), lambda: made(EIGHT)):
        with pytest.raises(RecipeError, match=r"adamw_8bit: .*bitsandbytes, 0\.50 or newer.*pip install"):
            call()
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__version__="0.49.9"))
    with pytest.raises(RecipeError, match=r"got 0\.49\.9"):
        check_optimizer(EIGHT)


@pytest.mark.parametrize("fault", ["raises", "does nothing"])
def test_a_library_without_this_device_is_refused_when_the_trainer_is_made(monkeypatch, fault):
    class Broken(torch.optim.Optimizer):
        def __init__(self, params, **settings):
            super().__init__(params, settings)

        def step(self, closure=None):
            if fault == "raises":
                raise RuntimeError("CUDA Setup failed\nand much more")

    fake = SimpleNamespace(__version__="0.50.0", optim=SimpleNamespace(AdamW8bit=Broken))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    with pytest.raises(ModelError, match=r"adamw_8bit on cpu.*got (CUDA Setup failed|no change)") as refused:
        toy_trainer(toy_recipe(train__optimizer="adamw_8bit"))
    assert "much more" not in str(refused.value)


def test_a_later_update_that_is_not_finite_takes_the_earlier_ones_back_in_8_bits_too():
    trainer, _ = toy_trainer(toy_recipe(train__optimizer="adamw_8bit", train__updates_per_rollout=2))
    for step in (1, 2, 3):
        trainer.step(step)
    assert {each["state1"].dtype for each in trainer.optimizer.state.values()} == {torch.uint8, torch.float32}
    experience = trainer._collect(4)
    before = ([p.detach().clone() for p in trainer.parameters], moments(trainer))
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * (math.nan if len(calls) == 2 else 1)

    hook = trainer.parameters[3].register_hook(spoil)
    update = trainer.updater.update(4, experience)
    hook.remove()
    assert not update.finite
    assert len(calls) == 2
    assert same(before, ([p.detach().clone() for p in trainer.parameters], moments(trainer)))


def moments(trainer):
    found = (trainer.optimizer.state[p] for p in trainer.parameters)
    return [{k: v.clone() if hasattr(v, "clone") else v for k, v in sorted(each.items())} for each in found]


def test_parameters_stay_the_trainers_own_objects():
    """bitsandbytes assigns to `.data`; rollouts and graphs hold on to the parameter and to its storage."""
    model, optimizer = made(EIGHT)
    before = [(id(p), p.data_ptr()) for p in trained(model)]
    one_step(model, optimizer)
    assert [(id(p), p.data_ptr()) for p in trained(model)] == before
    assert isinstance(trained(model)[0], nn.Parameter)
