"""What qwen32b.py counts and writes: floors by hand, stamps on a real step, rows and the page made of them."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.qwen32b_grpo import Shape
from benchmarks.qwen32b_phases import PHASES, Load, PhaseHooks, Stopwatch, floors, phases_of, products_per_token
from benchmarks.qwen32b_report import page
from benchmarks.qwen32b_rows import append, read
from benchmarks.random_models import random_model
from tests.rl.toy import toy_recipe, toy_trainer

ABOUT = {"device": "card", "torch": "2.13", "commit": "abc", "date": "2026-11-27T18:00:00+00:00"}


def test_a_shape_is_read_from_prompts_group_and_new_tokens() -> None:
    shape = Shape.read("8x4:512")
    assert (shape.prompts, shape.group, shape.new, shape.rows) == (8, 4, 512, 32)


def tiny(recipe: str = "nvfp4") -> tuple[Any, torch.optim.Optimizer]:
    model = random_model("tiny", recipe, inner="eager", device="cpu")
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def test_products_are_those_of_seven_linears_and_their_adapters_in_two_layers() -> None:
    # hidden 128, key and value 64 wide, intermediate 256
    weights = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    widths = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256)
    for recipe in ("nvfp4", "bf16"):
        assert products_per_token(tiny(recipe)[0]) == (2 * 2 * weights, 2 * 2 * 32 * widths)


def test_floors_of_a_step_are_the_ones_worked_out_by_hand() -> None:
    model, optimizer = tiny()
    ceiling = {"bf16_tflop_per_s": 1e-6, "copy_tb_per_s": 1e-6}  # a million of each a second
    load = Load(prompts=1, rows=2, prompt_tokens=4, new_tokens=3)
    found = floors(model, optimizer, load, ceiling, weight_bytes=1000)
    dense, adapters, attention = 589_824, 262_144, 2 * 7**2 * 128 * 2
    forward = 14 * (dense + adapters) + 2 * attention
    assert found["forward"] == pytest.approx(forward / 1e6)
    assert found["backward"] == pytest.approx((14 * (dense + 2 * adapters) + 5 * attention) / 1e6)
    assert found["head"] == pytest.approx(6 * 128 * 512 * 6 / 1e6)
    # two steps; they see 4 prompt positions once, and 1 and 2 of each row; a position is 2 layers x 2 x 64 x 2 bytes
    assert found["decode"] == pytest.approx((2 * 1000 + 512 * (2 * 4 + 2 * (1 + 2))) / 1e6)
    assert found["prefill"] == pytest.approx((4 * (dense + adapters) + 2 * 4**2 * 128 * 2) / 1e6)
    model.qerl.recompute = True
    again = floors(model, optimizer, load, ceiling, weight_bytes=1000)
    assert again["backward"] - found["backward"] == pytest.approx(forward / 1e6)


def test_an_optimizer_reads_and_writes_everything_but_gradients() -> None:
    model, optimizer = tiny()
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    count = sum(parameter.numel() for parameter in parameters)
    load = Load(prompts=1, rows=2, prompt_tokens=4, new_tokens=3)
    ceiling = {"bf16_tflop_per_s": 1.0, "copy_tb_per_s": 1.0}
    assert floors(model, optimizer, load, ceiling, weight_bytes=0)["optimizer"] == pytest.approx(28 * count / 1e12)


def test_watching_a_step_changes_nothing_and_its_phases_add_up() -> None:
    def step(watched: bool) -> tuple[dict[str, Any], PhaseHooks, list[torch.Tensor]]:
        trainer, _ = toy_trainer(toy_recipe(train__micro_batch_tokens=32, train__max_new_tokens=3))
        hooks = PhaseHooks(trainer.model, trainer.optimizer, Stopwatch("cpu"))
        if watched:
            with hooks:
                metrics = trainer.step(1)
        else:
            metrics = trainer.step(1)
        return metrics, hooks, [parameter.detach().clone() for parameter in trainer.parameters]

    plain, silent, expected = step(False)
    metrics, hooks, parameters = step(True)
    assert not silent.stamps
    assert all(map(torch.equal, parameters, expected))
    assert metrics["grad_norm"] == plain["grad_norm"] > 0
    found = phases_of(hooks, metrics["rollout/time"], metrics["step_time"])
    assert tuple(found) == PHASES
    assert sum(found.values()) == pytest.approx(metrics["step_time"])
    assert all(seconds > 0 for seconds in found.values()), found
    names = [name for name, _ in hooks.stamps if name not in ("prefill", "decode")]
    assert len(names) > 5  # several micro-batches, each with its three phases, then the optimizer once
    assert names == ["forward", "head", "backward"] * (len(names) // 3) + ["optimizer", "rest"]
    before = len(hooks.stamps)
    step(False)
    assert len(hooks.stamps) == before


def test_rows_are_in_the_file_one_by_one(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "rows.json")
    for size in ("7B", "32B"):
        append(path, {"part": "grpo", "size": size})
    assert [row["size"] for row in read([path])] == ["7B", "32B"]
    assert [row["size"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["7B", "32B"]
    assert not (tmp_path / "rows.json.partial").exists()
    assert "32B" in capsys.readouterr().err


def grpo_row(recipe: str, total_s: float, peak: float) -> dict[str, Any]:
    return {
        **ABOUT, "part": "grpo", "size": "32B", "recipe": recipe, "prompts": 1, "rows": 8, "prompt_tokens": 256,
        "new": 2048, "micro_batch_tokens": 4608, "recompute": True, "settings": {}, "total_s": total_s,
        "rollout_s": 20.0, "update_s": 4.0, "tokens_per_s": 700.0,
        "peak_bytes": {"after_load": 21e9, "rollout": 30e9, "update": peak},
        "predicted_bytes": {"after_load": 21e9, "rollout": 33e9, "update": 0.95 * peak},
        "phases_s": dict.fromkeys(PHASES, total_s / 7), "floors_s": {**dict.fromkeys(PHASES, 1.0), "host, rest": 0.0},
    }  # fmt: skip


def test_the_page_says_ratio_peak_prediction_and_distance() -> None:
    rows = [grpo_row("nvfp4", 99.0, 41e9), grpo_row("nvfp4", 28.0, 40e9), grpo_row("bf16", 56.0, 80e9)]
    text = "\n".join(page(rows))
    assert "**28.00** | 2.00 |" in text  # bf16 takes twice as long
    assert "99.00" not in text  # a later row of the same kind takes its place
    assert "| 40.0 | yes |" in text
    assert "| 80.0 | **no** |" in text
    assert "33.00 / 30.00 (1.10)" in text
    assert "Ratios from 0.95 to 1.10." in text
    assert "**28.00** (4.7x)" in text  # six floors of a second
    assert "4.000, 14% (4.0x)" in text


def test_the_page_keeps_and_names_a_run_with_other_settings() -> None:
    other = grpo_row("nvfp4", 31.0, 38e9) | {"settings": {"optimizer": "adamw_8bit", "rollout_cache": "freed"}}
    text = "\n".join(page([grpo_row("nvfp4", 28.0, 40e9), other]))
    assert "| nvfp4 | 1 x 8" in text
    assert "| nvfp4, adamw_8bit, freed | 1 x 8" in text
    assert "| nvfp4, adamw_8bit, freed | 8 x 2048 | 21.00" in text


def test_the_page_names_what_ran_out_of_memory_and_how_much_slower_the_rest_is() -> None:
    about = {**ABOUT, "part": "qlora", "size": "7B", "rows": 8, "tokens": 512, "rows_at_a_time": 8, "recompute": False}
    measured = {"tokens_per_s": 4096.0, "after_load": 6e9, "peak": 30e9}
    rows = [
        {**about, "model": "nvfp4", "step_s": 0.5, **measured},
        {**about, "model": "nf4", "step_s": 1.25, **measured},
        {**about, "model": "bf16", "out_of_memory": "CUDA out of memory."},
    ]
    text = "\n".join(page(rows))
    assert "| nf4 | 8 x 512 | 8 | off | 1250 | 4096 | 2.50 |" in text
    assert "| bf16 | 8 x 512 | 8 | off | out of memory |" in text


def test_the_page_has_cold_and_warm_processes() -> None:
    step = SimpleNamespace(first={"rollout_s": 20.0, "update_s": 30.0, "total_s": 50.0},
                           second={"rollout_s": 2.0, "update_s": 3.0, "total_s": 5.0})  # fmt: skip
    each = {**vars(step), "built_s": 2.0, "compiling_s": 45.0, "process_s": 70.0, "graphs": 3, "dynamo_graphs": 4,
            "caches": {"hit": 1, "miss": 2}}  # fmt: skip
    row = {**ABOUT, "part": "compile", "size": "32B", "recipe": "nvfp4", "layers": 64, "cold": each, "warm": each}
    text = "\n".join(page([row]))
    for name in ("cold", "warm"):
        assert (
            f"| 32B | nvfp4 | 64 | {name} | 2.0 | 20.0 | 30.0 | **50.0** | 5.0 | 45.0 | 70.0 | 3 (4) | 1 / 2 |" in text
        )
