"""What a layer of packed experts costs on a GPU, beside its dense form: one grouped product each way, per token count.

    python -m benchmarks.moe_layer COMMIT [OUT.json]        needs a GPU; Qwen3-30B-A3B's gate/up stack

`packed` is `qerl::grouped_quantized_linear`: decode all experts into a scratch, then torch's grouped GEMM. `dense` is
the same GEMM on a bfloat16 stack that is kept, which takes 3.6 times the memory. `floor` is the time to read what a
kernel that decodes as it multiplies would have to read: packed bytes of the experts that have rows, at the bandwidth
of a copy, measured before. Rows are drawn with equal chances for every expert. Times are medians over CUDA events.
"""

import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.gpu_timing import GpuClock, ceilings
from qerl_compile.kernels.grouped import grouped_quantized_linear, grouped_quantized_linear_dx

EXPERTS, TOP_K, ROWS, COLUMNS = 128, 8, 1536, 2048
TOKENS = (1, 8, 64, 512, 4096, 16384)
REPEATS = 20


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main(commit: str, out: Path | None) -> None:
    copy_tb_per_s = ceilings(GpuClock())["copy_tb_per_s"]
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    device = torch.device("cuda")
    codes = torch.randint(0, 256, (EXPERTS, ROWS, COLUMNS // 2), dtype=torch.uint8, device=device)
    # E4M3 bytes of positive normal numbers: 0x20 is 0.125, 0x7E is 448
    blocks = torch.randint(0x20, 0x60, (EXPERTS, ROWS, COLUMNS // 16), dtype=torch.uint8, device=device)
    packed = codes, blocks.view(torch.float8_e4m3fn), torch.full((EXPERTS, 1), 1e-4, device=device)
    dense_ENK = torch.randn(EXPERTS, ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    packed_bytes = (codes.numel() + blocks.numel()) / EXPERTS
    lines = []
    for tokens in TOKENS:
        chosen = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).flatten()
        counts = torch.bincount(chosen, minlength=EXPERTS)
        offsets = counts.cumsum(0).int().to(device)
        x_SK = torch.randn(len(chosen), COLUMNS, dtype=torch.bfloat16, device=device)
        dy_SN = torch.randn(len(chosen), ROWS, dtype=torch.bfloat16, device=device)
        used = int((counts > 0).sum())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward = milliseconds(lambda: grouped_quantized_linear(x_SK, offsets, *packed))  # noqa: B023  # called at once
        scratch = torch.cuda.max_memory_allocated() - before
        line = {
            "tokens": tokens,
            "experts_used": used,
            "packed_ms": forward,
            "packed_dx_ms": milliseconds(lambda: grouped_quantized_linear_dx(dy_SN, offsets, *packed)),  # noqa: B023
            "dense_ms": milliseconds(lambda: F.grouped_mm(x_SK, dense_ENK.transpose(-2, -1), offs=offsets)),  # noqa: B023
            "dense_dx_ms": milliseconds(lambda: F.grouped_mm(dy_SN, dense_ENK, offs=offsets)),  # noqa: B023
            "floor_ms": used * packed_bytes / copy_tb_per_s * 1e-9,
            "scratch_bytes": scratch,
        }
        lines.append(line)
        print({key: round(value, 4) for key, value in line.items()}, flush=True)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "copy_tb_per_s": copy_tb_per_s,
        "stack": [EXPERTS, ROWS, COLUMNS],
        "top_k": TOP_K,
        "packed_stack_bytes": codes.numel() + blocks.numel(),
        "lines": lines,
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
