"""Operators on packed weights (ops.py, adapted.py) and paged caches (paged_attention.py), and the kernels under them.

Importing this package registers the `qerl::` operators with torch, so that graphs that name them can be loaded and run.
Nothing is compiled here: the CPU kernel is built, and Triton is imported, when an operator first runs.
"""

from qerl_compile.kernels import adapted, cpu, cuda, ops, paged_attention, paged_cpu, paged_cuda

__all__ = ["adapted", "cpu", "cuda", "ops", "paged_attention", "paged_cpu", "paged_cuda"]
