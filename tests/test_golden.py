"""What each pass does to one decoder layer, as files. `QERL_ACCEPT=1 pytest tests/test_golden.py` rewrites them.

A file is the unified diff of one pass with no context. It is pinned to one torch and one transformers, since node names
and the wording of the graph around the change are theirs; tests/test_invariants.py holds on all versions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import qerl_compile.passes
from tests.models import FAMILIES
from tests.stages import MIXTURE, pass_diff, stages

GOLDEN = Path(__file__).parent / "golden"
PASSES = (
    *("trainednorms", "noise", "lora", "fuse", "quantize", "fakequantize", "sparsify", "recompute"),
    *("adapt", "residual", "rotary"),
)
CASES = [*((family, name) for family in FAMILIES for name in PASSES), (MIXTURE, "experts")]
HELPERS = {"init", "quantizesite", "widen"}
"""Modules of the folder that are no pass in themselves."""
PINNED = torch.__version__.startswith("2.13.") and transformers.__version__.startswith("5.23.")
HINT = "The graph changed. If that was meant, run QERL_ACCEPT=1 pytest tests/test_golden.py and review the files."

if PINNED:

    @pytest.mark.parametrize(("family", "name"), CASES)
    def test_the_diff_of_a_pass_is_the_golden_one(family, name):
        file = GOLDEN / f"{family}-{name}.txt"
        got = pass_diff(family, name)
        if os.environ.get("QERL_ACCEPT") == "1":
            file.write_text(got, encoding="utf-8")
        want = file.read_text(encoding="utf-8") if file.exists() else ""
        assert got == want, HINT


def test_there_is_one_golden_file_per_family_and_pass():
    assert {file.name for file in GOLDEN.iterdir()} == {f"{family}-{name}.txt" for family, name in CASES}


def test_every_pass_has_golden_files():
    passes = {path.stem.replace("_", "") for path in Path(qerl_compile.passes.__path__[0]).glob("*.py")}
    assert passes - HELPERS == {name for _, name in CASES}


def test_no_golden_file_names_a_device_an_address_or_a_path():
    for file in GOLDEN.iterdir():
        text = file.read_text(encoding="utf-8")
        assert text
        for word in ("cuda", "cpu", "meta", "device", "0x", "/", "object at"):
            assert word not in text, (file.name, word)


def test_the_text_is_the_same_in_a_process_with_another_hash_seed():
    code = "import json; from tests.stages import stages; print(json.dumps(stages('qwen3')))"
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout.splitlines()[-1]) == stages("qwen3")
