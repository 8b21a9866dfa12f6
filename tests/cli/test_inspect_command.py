"""`qerl-compile inspect`: a screen, or JSON, and an exit code."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from qerl_compile.cli.inspect import inspect
from tests.checkup.making import DOWN, damaged, dense, valid


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(inspect)

    def invoke(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})

    return invoke


def halve(tensors):
    tensors[f"{DOWN.replace('down', 'up')}.weight_global_scale"] /= 2


def test_a_healthy_checkpoint_is_one_screen_and_exit_code_0(run):
    result = run(valid("compressed"), "--against", dense())
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) < 24
    assert "compressed-tensors NVFP4A16, written by compressed-tensors" in lines[1]
    assert "14 linears packed at 4.51 bits a weight, 1 dense" in lines[1]
    assert any(line.startswith("*.mlp.down_proj") and "64×128" in line for line in lines)
    assert "no fault found; nothing was written" in lines
    assert lines[-1].startswith("next  qerl-compile train ")


def test_a_fatal_fault_is_told_with_its_effect_and_remedy_and_exit_code_1(run, tmp_path):
    result = run(damaged("compressed", tmp_path / "bad", halve))
    assert result.exit_code == 1
    assert "fatal  fused-scales-differ" in result.output
    assert "model.layers.1.mlp: gate_proj" in result.output
    assert "breaks  vLLM warns and SGLang does not" in result.output
    assert "do      Quantize these linears with one amax." in result.output
    assert "1 fatal faults, 0 warnings" in result.output


def test_a_warning_alone_is_exit_code_0(run, tmp_path):
    bad = damaged("modelopt", tmp_path / "bad")
    (bad / "hf_quant_config.json").unlink()
    result = run(bad)
    assert result.exit_code == 0
    assert "warning  second-config-missing" in result.output


def test_many_of_a_kind_are_counted(run, tmp_path):
    def reciprocal(tensors):
        for name in tensors:
            if name.endswith("global_scale"):
                tensors[name] = tensors[name].reciprocal()

    result = run(damaged("compressed", tmp_path / "bad", reciprocal))
    assert result.output.count("fatal  scale-reciprocal") == 1
    assert "and 11 more; --json lists them" in result.output


def test_json_is_all_of_the_report_and_nothing_else(run, tmp_path):
    def zero(tensors):
        tensors[f"{DOWN}.weight_global_scale"] = torch.zeros(1)

    result = run(damaged("compressed", tmp_path / "bad", zero), "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert report["fatal"] is True
    assert [fault["code"] for fault in report["faults"]] == ["scalar-not-positive"]
    assert report["faults"][0]["where"] == f"{DOWN}.weight_global_scale"
    assert {"severity", "effect", "do", "found"} <= set(report["faults"][0])
    assert len(report["layers"]) == 15


def test_a_dense_model_is_shown_and_the_next_command_packs_it(run):
    result = run(dense())
    assert result.exit_code == 0
    assert "dense, written by not stated" not in result.output
    assert result.output.splitlines()[-1].startswith("next  qerl-compile transform ")
