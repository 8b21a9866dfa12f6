"""Compile kernels in many processes before anything is timed; the compilers' disk caches carry the result over.

Threads would not do: much of Triton's compile time is Python and holds the interpreter lock (162 small kernels took
42 s on 16 threads). Each process takes every so-many-th job, makes the weight and runs the call once.
"""

import multiprocessing
import os
from typing import Any, NamedTuple

PROCESSES = 14


class Job(NamedTuple):
    """One call: a direction of candidates.py ("forward", "adapted", "dx"), or "humming" for its kernels of every M."""

    direction: str
    n: int
    k: int
    m: int = 1
    choice: dict[str, Any] | None = None  # None: as dispatched
    rank: int = 0
    residual: bool = False  # of "adapted"


def precompile(jobs: list[Job]) -> list[str]:
    """Run every job once somewhere; what failed, in words."""
    parts = [jobs[i::PROCESSES] for i in range(min(PROCESSES, len(jobs), os.cpu_count() or 1))]
    if not parts:
        return []
    with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
        return [failure for failures in pool.map(_run, parts, chunksize=1) for failure in failures]


def _run(jobs: list[Job]) -> list[str]:
    import torch

    failures = []
    with torch.no_grad():
        for job in jobs:
            try:
                _call(job)
            except Exception as error:
                failures.append(f"{job}: {error!r:.200}")
        torch.cuda.synchronize()
    return failures


def _call(job: Job) -> None:
    import torch

    from benchmarks import peers
    from qerl_compile.kernels import cuda, ops

    w_NK = torch.randn(job.n, job.k, device="cuda", dtype=torch.bfloat16) * 0.02
    if job.direction == "humming":
        for linear in peers.humming_copies(w_NK, 1):
            if linear.forward is not None:
                linear.forward(torch.randn(1, job.k, device="cuda", dtype=torch.bfloat16))
        return
    codes, block, global_scale = ops.quantize(w_NK)
    decode_scale = global_scale.reciprocal()
    if job.direction == "dx":
        dy = torch.randn(job.m, job.n, device="cuda", dtype=torch.bfloat16)
        cuda.linear_dx(dy, codes, block, decode_scale, choice=job.choice)
        return
    x = torch.randn(job.m, job.k, device="cuda", dtype=torch.bfloat16)
    if job.direction == "adapted":
        a, b, residual = (
            torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
            for shape in ((job.rank, job.k), (job.n, job.rank), (job.m, job.n))
        )
        added = residual if job.residual else None
        cuda.adapted_linear(x, codes, block, decode_scale, a, b, added, choice=job.choice)
        return
    lora = (torch.randn(rows, job.rank, device="cuda", dtype=torch.bfloat16) for rows in (job.m, job.n))
    h, lora_B = lora if job.rank else (None, None)
    cuda.linear(x, codes, block, decode_scale, h, lora_B, choice=job.choice)
