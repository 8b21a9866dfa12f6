"""Operators on packed weights (ops.py, adapted.py, grouped.py) and paged caches (paged_attention.py); their kernels.

Importing this package registers the `qerl::` operators with torch, so that graphs that name them can be loaded and run.
Nothing is compiled here: the CPU kernel is built, and Triton is imported, when an operator first runs.
"""

from qerl_compile.kernels import adapted, cpu, cuda, grouped, grouped_cuda, ops, paged_attention, paged_cpu, paged_cuda

__all__ = ["adapted", "cpu", "cuda", "grouped", "grouped_cuda", "ops", "paged_attention", "paged_cpu", "paged_cuda"]
