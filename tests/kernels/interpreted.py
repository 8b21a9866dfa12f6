"""Run a script of checks under Triton's interpreter, in a process of its own: the switch is read on import."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def interpreted(script: str) -> dict[str, float]:
    """What `script`, a file beside this one, prints last: its results by name, as JSON."""
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, str(HERE / script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
