"""What bounds our kernels: hardware counters by ncu and instructions per weight from the machine code, one short table.

    python benchmarks/kernel_profile.py [--cells "27648x5120:1,16,64;5120x5120:64"] [--dx] [--choice JSON] [--out DIR]

Runs itself a second time under `ncu` (--clock-control none: the card's clocks are left alone), each cell once, with
everything compiled before and L2 flushed by ncu. Without ncu, or where it may not read counters (gVisor, missing
permission), that is said and the machine-code half is printed alone.

Counters, per kernel launched, all but the first in per cent of what the device can do
    µs         duration at whatever clock the profiler met; not a benchmark
    dram       bytes to and from memory
    issue      cycles in which a scheduler issued an instruction
    tensor     cycles in which the tensor pipe was busy
    warps      resident warps
    stalls     the three commonest reasons for which a resident warp did not issue, cycles per instruction

Machine code. The main loop is the shortest loop with tensor instructions (HGMMA or HMMA): longer ones go around it, or
come from waits whose retry is out of line. How many weights of a thread an instruction stands for follows from the
choice (`weights_per_tensor`). `spills` counts LDL and STL in the whole kernel.

Legend: M tokens, N output features, K input features.
"""

import argparse
import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of this folder

CELLS = "27648x5120:1,8,16,64,256;5120x5120:16,64"
METRICS = {
    "µs": "gpu__time_duration.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "regs": "launch__registers_per_thread",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
MARK = "elementwise"  # a kernel of torch's between two cells, by which launches are told apart
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9_.]+)([^;]*);")


def loops(sass: str) -> list[tuple[int, int, list[str]]]:
    """(begin, end, opcodes) of every backward branch in a disassembly."""
    code = [(int(at, 16), opcode, rest) for at, opcode, rest in INSTRUCTION.findall(sass)]
    found = []
    for at, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            begin = int(target[1], 16)
            found.append((begin, at, [op for where, op, _ in code if begin <= where <= at]))
    return found


def weights_per_tensor(choice: dict[str, Any]) -> float | None:
    """Weights that a thread decodes per tensor instruction; None where it does not follow from the choice.

    As operand A, 16 x 16 weights in 32 lanes (64 x 16 in 128) are 8 a lane; as B, 16 x 8 are 4. Operands are used again
    for every further tile of tokens: 8 tokens where W is A, 16 where it is B. A wgmma takes all tokens at once.
    """
    kernel = choice["kernel"]
    if kernel.startswith("hopper"):
        return 8.0
    if kernel == "stream":
        return 8.0 / max(1, choice["T"] // 8)
    if kernel == "decode":
        return 8.0 / max(1, choice["BM"] // 8) if choice["SWAP"] else 4.0 / max(1, choice["BM"] // 16)
    return None


def main_loop(sass: str) -> dict[str, int]:
    """Instructions, tensor instructions and spills; without the first two if no loop has tensor instructions."""

    def tensor(opcodes: list[str]) -> int:
        return sum(opcode.startswith(("HGMMA", "HMMA")) for opcode in opcodes)

    spills = {"spills": len(re.findall(r"\b(?:LDL|STL)\b", sass))}
    found = [opcodes for *_, opcodes in loops(sass) if tensor(opcodes)]
    if not found:
        return spills
    opcodes = min(found, key=len)
    return {"instructions": len(opcodes), "tensor": tensor(opcodes), **spills}


def code_facts(sass: str, choice: dict[str, Any]) -> str:
    """What `main_loop` counted, and instructions per weight."""
    counts = main_loop(sass)
    each = weights_per_tensor(choice)
    text = ", ".join(f"{key} {value}" for key, value in counts.items())
    if "tensor" in counts and each is not None:
        text += f", {counts['instructions'] / (counts['tensor'] * each):.2f} per weight"
    return text


def disassembler() -> str | None:
    """Triton brings one; else the toolkit's."""
    import triton

    own = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(own) if own.exists() else shutil.which("cuobjdump")


def counters(text: str) -> list[dict[str, str]]:
    """The launches in ncu's log: raw page, comma-separated, a row of units after the head."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    return [row for row in rows if row.get("ID")]


def number(row: dict[str, str], metric: str) -> float | None:
    """Of a metric, None if it was not collected."""
    try:
        return float(row[metric].replace(",", ""))
    except (KeyError, ValueError):
        return None


def stalls(row: dict[str, str], most: int = 3) -> str:
    """The commonest reasons; `selected` is a warp that does issue."""
    reasons = {}
    for metric in row:
        match = STALL.search(metric)
        value = number(row, metric)
        if match and value and match[1] != "selected" and not match[1].endswith("not_issued"):
            reasons[match[1]] = value
    worst = sorted(reasons.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{reason} {value:.1f}" for reason, value in worst)


def cells_of(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Launches by cell: what lies between two marks."""
    groups: list[list[dict[str, str]]] = []
    for row in rows:
        if MARK in row["Kernel Name"]:
            groups.append([])
        elif groups:
            groups[-1].append(row)
    return groups


def report(cells: list[dict[str, Any]], rows: list[dict[str, str]]) -> list[str]:
    """The table of counters, a line per launch."""
    lines = [f"{'cell':22}{'kernel':28}" + "".join(f"{column:>8}" for column in METRICS) + "  stalls"]
    for cell, launches in zip(cells, cells_of(rows), strict=False):
        for row in launches:
            values = {column: number(row, metric) for column, metric in METRICS.items()}
            if values["µs"] is not None:
                values["µs"] /= 1e3  # base units are nanoseconds
            texts = ["-" if value is None else f"{value:.1f}" for value in values.values()]
            kernel = re.sub(r"^void |<.*|\(.*", "", row["Kernel Name"])[:26]
            lines.append(f"{cell['name']:22}{kernel:28}" + "".join(f"{text:>8}" for text in texts) + f"  {stalls(row)}")
    return lines


def code_lines(cells: list[dict[str, Any]]) -> list[str]:
    """The table of machine code, a line per compiled kernel, under the cell that compiled it first."""
    tool = disassembler()
    if tool is None:
        return ["no cuobjdump here: instructions per weight are not counted"]
    lines = [f"{'first used by':22}{'kernel':28}main loop"]
    for cell in cells:
        for cubin in cell["cubins"]:
            sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=False).stdout
            lines.append(f"{cell['name']:22}{pathlib.Path(cubin).stem[:26]:28}{code_facts(sass, cell['choice'])}")
    return lines


def run_cells(options: argparse.Namespace) -> None:
    """The second run, under ncu: make every call twice to compile, then once between profiler start and stop."""
    import torch

    from qerl_compile.kernels import cuda, dispatch, ops
    from qerl_compile.kernels.cuda_device import capability_and_multiprocessors

    cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
    torch.manual_seed(0)
    choice = json.loads(options.choice) if options.choice else None
    mark, calls, cells = torch.zeros(1 << 10, device="cuda"), [], []
    for shape, tokens in (part.split(":") for part in options.cells.split(";")):
        n, k = map(int, shape.split("x"))
        codes, block, global_scale = ops.quantize(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02)
        decode_scale = global_scale.reciprocal()
        launch = cuda.linear_dx if options.dx else cuda.linear
        for m in map(int, tokens.split(",")):
            x = torch.randn(m, n if options.dx else k, device="cuda", dtype=torch.bfloat16)
            arguments = (x, codes, block, decode_scale)
            before = set(cache.rglob("*.cubin"))
            for _ in range(3):  # the third call of a kind is launched as all later ones are
                launch(*arguments, choice=choice)
            calls.append((launch, arguments))
            new = sorted(map(str, set(cache.rglob("*.cubin")) - before))
            device = capability_and_multiprocessors(0)
            used = choice or dispatch.choose("dx" if options.dx else "forward", n, k, m, *device)
            cells.append({"name": f"{shape} {'dx ' if options.dx else ''}M={m}", "cubins": new, "choice": used})
    pathlib.Path(options.child).write_text(json.dumps(cells), encoding="utf-8")
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for launch, arguments in calls:
        mark.add_(1)
        launch(*arguments, choice=choice)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def forget(folder: pathlib.Path) -> None:
    """What a run before left: a kernel found in Triton's cache is not compiled and would not be listed."""
    shutil.rmtree(folder / "cubins", ignore_errors=True)
    (folder / "cells.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=CELLS, help="NxK:M,M,...;NxK:M,...")
    parser.add_argument("--dx", action="store_true", help="the backward instead of the forward")
    parser.add_argument(
        "--choice", default="", help="a choice as in dispatch.py, for all cells, instead of the table's"
    )
    parser.add_argument("--out", default="", help="folder that keeps ncu's log and the cubins")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_cells(options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(options.out or name)
        folder.mkdir(parents=True, exist_ok=True)
        forget(folder)
        script = [sys.executable, __file__, *sys.argv[1:], "--child", str(folder / "cells.json")]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cubins")}
        log = folder / "ncu.csv"
        ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
        command = [
            *(ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"),
            *("--section", "WarpStateStats", "--metrics", ",".join(METRICS.values())),
            *("--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)),
        ]
        rows = []
        if pathlib.Path(ncu).exists():
            ran = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, check=False)
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            rows = counters(text)
            if not rows:
                said = [line for line in (text + ran.stdout + ran.stderr).splitlines() if line.strip()]
                print("ncu read no counters here. It said:", *said[-6:], sep="\n  ")
        else:
            print("ncu is not installed here: no counters")
        if not (folder / "cells.json").exists():  # ncu kept the program from running: the machine code needs it
            forget(folder)
            subprocess.run(script, env=environment, check=True)
        cells = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
        if rows:
            print(*report(cells, rows), "", sep="\n")
        print(*code_lines(cells), sep="\n")


if __name__ == "__main__":
    main()
