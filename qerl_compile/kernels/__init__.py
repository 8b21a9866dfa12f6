"""Operators on packed weights (ops.py) and the kernels that run under them on each device.

Importing this package registers the `qerl::` operators with torch, so that graphs that name them can be loaded and run.
"""

from qerl_compile.kernels import ops

__all__ = ["ops"]
