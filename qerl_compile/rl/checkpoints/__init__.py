"""Checkpoints: a run that is stopped anywhere goes on as if it had not been.

writing.py          how a checkpoint appears            finding.py, reading.py   how it is found and loaded
manifest.py         how damage is told                  progress.py              what it says of the run
optimizer_state.py, random_states.py, plain_values.py   how state becomes files
interrupt.py        how a run is asked to stop
"""

from qerl_compile.rl.checkpoints.interrupt import Interrupt
from qerl_compile.rl.checkpoints.progress import Identity, Progress, identity, version_changes
from qerl_compile.rl.checkpoints.reading import Checkpoint, Rejected, latest, restore
from qerl_compile.rl.checkpoints.writing import save

__all__ = [
    "Checkpoint",
    "Identity",
    "Interrupt",
    "Progress",
    "Rejected",
    "identity",
    "latest",
    "restore",
    "save",
    "version_changes",
]
