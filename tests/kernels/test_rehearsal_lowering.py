"""Kernels compiled by processes that see no GPU: which ones a step launches, and that the next process finds them."""

import json
import subprocess
import sys

from qerl_compile.kernels import nvfp4_arithmetic
from qerl_compile.kernels.rehearsal_script import Attention, Linear, Script
from qerl_compile.warm_up import Rehearsal

SMALL = Script((9, 0), 132, (Linear(256, 512, 16),), decode_rows=(2,))

FORMS = """
import sys
from collections import Counter
from qerl_compile.kernels.rehearsal import forms
from qerl_compile.kernels.rehearsal_script import Script
found = forms(Script.from_json(sys.argv[1]))
names = Counter(kernel.__module__.rpartition(".")[2] for kernel, _, _ in found)
print(dict(names))
"""


if nvfp4_arithmetic.GLUON:

    def test_a_32b_step_on_hopper_launches_these_kernels():
        """Counted on meta tensors, without a compiler; a wgmma or stream form takes about four seconds to compile."""
        linears = (
            Linear(7168, 5120, 128),
            Linear(5120, 5120, 32),
            Linear(55296, 5120, 64),
            Linear(5120, 27648, 32, True),
        )
        attention = Attention(40, 8, 128, 64, 12, bias=True)
        step = Script((9, 0), 132, linears, attention, (2, 64), (4096,), (4096,))
        found = subprocess.run(
            [sys.executable, "-c", FORMS, step.to_json()], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout.replace("'", '"')) == {
            "nvfp4_dequantize": 1,
            "nvfp4_wgmma": 5,  # four at 64 rows, and gate/up at 2
            "nvfp4_stream": 3,  # q/k/v, o, and down with its residual, at 2 rows
            "nvfp4_permute": 3,
            "lead_in": 4,
            "lora_down": 2,
            "flash_decode": 3,
        }


def test_what_one_process_compiles_the_next_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first = Rehearsal(SMALL).wait()
    kept = sorted(file.name for file in tmp_path.iterdir())
    second = Rehearsal(SMALL).wait()
    assert first.failures == second.failures == ()
    assert first.forms == second.forms == 2  # the product and the adapter's first half
    assert len(kept) >= 2
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
