"""Merging an adapter into weights: only when asked for by name, and measured.

modes.py        the three modes, what each costs, what is refused
master.py       the bf16 weights a model came from, and whether they are those
dense.py        bf16-master, dequantized: a dense directory, one shard in memory at a time
requantized.py  nvfp4: the model holds merged codes for as long as an exporter reads it
"""

from qerl_compile.exporters.merging.dense import DenseMerge, write_dense
from qerl_compile.exporters.merging.master import Master
from qerl_compile.exporters.merging.modes import MODES, check_merge, check_mode, master_directory
from qerl_compile.exporters.merging.requantized import requantized

__all__ = [
    "MODES",
    "DenseMerge",
    "Master",
    "check_merge",
    "check_mode",
    "master_directory",
    "requantized",
    "write_dense",
]
