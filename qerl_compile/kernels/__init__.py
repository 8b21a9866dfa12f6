"""Operators on packed weights (ops.py) and the kernels that run under them on each device.

Importing this package registers the `qerl::` operators with torch, so that graphs that name them can be loaded and run.
Nothing is compiled here: the CPU kernel is built, and Triton is imported, when an operator first runs.
"""

from qerl_compile.kernels import cpu, cuda, ops

__all__ = ["cpu", "cuda", "ops"]
