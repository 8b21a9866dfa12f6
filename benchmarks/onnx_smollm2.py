"""SmolLM2-135M as ONNX in onnxruntime's CPU provider, beside our own model in torch.

    python benchmarks/onnx_smollm2.py [--new 32]      about 10 minutes, writes results/onnx_smollm2.md

The model is NVFP4 with rank-32 adapters that are not zero, computed in float32 on both sides. The prompt is like one of
GSM8K. Measured: the largest logit difference relative to the largest logit over a whole prompt, whether greedy tokens
agree, size on disk, CPU seconds to export and to open, and tokens per CPU second of one thread for greedy decoding of
one sequence. onnxruntime runs the same file twice: as it is (weights are decoded once, when the file is opened) and
with `disabled_optimizers=["ConstantFolding"]` (weights stay packed). Each runs in a process of its own, whose peak
memory is read.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
PROMPT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips?"
)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_onnx(file: str, ids: list[int], new: int, *, folding: bool) -> dict[str, Any]:
    """Open the file and decode greedily."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    began = time.process_time()
    disabled = [] if folding else ["ConstantFolding"]
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    opened_s = time.process_time() - began
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    past = {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in caches}
    feed, length, tokens, prompt_logits = np.array([ids]), len(ids), [], None
    for _ in range(new):
        if len(tokens) == 1:
            began = time.process_time()  # the prompt is not counted
        logits, *present = session.run(
            None, {"input_ids": feed, "attention_mask": np.ones((1, length), np.int64), **past}
        )
        prompt_logits = logits[0] if prompt_logits is None else prompt_logits
        feed, length = logits[:, -1:].argmax(-1), length + 1
        past = dict(zip(past, present, strict=True))
        tokens.append(int(feed[0, 0]))
    tokens_per_s = (new - 1) / (time.process_time() - began)
    np.save(Path(file).with_suffix(".npy"), prompt_logits)
    return {"opened_s": opened_s, "tokens_per_s": tokens_per_s, "peak_mb": peak_mb(), "tokens": tokens}


def in_a_process(file: Path, ids: list[int], new: int, *, folding: bool) -> dict[str, Any]:
    job = json.dumps({"file": str(file), "ids": ids, "new": new, "folding": folding})
    done = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--job", help="internal")
    chosen = parser.parse_args()
    if chosen.job:
        print(json.dumps(run_onnx(**json.loads(chosen.job))))
        return

    import onnx
    import onnxruntime
    from transformers import AutoTokenizer

    import qerl_compile
    from qerl_compile.adapter_files import adapters_of
    from qerl_compile.exporters.onnx import export_onnx
    from qerl_compile.smollm2 import smollm2_directory

    torch.set_num_threads(1)
    model = qerl_compile.load("smollm2", "nvfp4-lora", inner="eager", device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters_of(model).values():
        adapter.b_NR.data.normal_(std=0.01, generator=generator)
    ids = AutoTokenizer.from_pretrained(smollm2_directory())(PROMPT)["input_ids"]
    ours, rows = our_run(model, ids, chosen.new), []
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        export_onnx(model, Path(folder) / "out", runtime="onnxruntime")
        export_s = time.process_time() - began
        file = Path(folder) / "out/model.onnx"
        size = sum(part.stat().st_size for part in file.parent.iterdir())
        for folding in (True, False):
            run = in_a_process(file, ids, chosen.new, folding=folding)
            theirs = np.load(file.with_suffix(".npy"))
            run["difference"] = float(np.abs(theirs - ours["logits"]).max() / np.abs(ours["logits"]).max())
            run["equal"] = sum(a == b for a, b in zip(run["tokens"], ours["tokens"], strict=True))
            rows.append(("weights decoded once" if folding else "weights stay packed", run))
    lines = [
        "# SmolLM2-135M as ONNX, on one CPU thread",
        f"`python benchmarks/onnx_smollm2.py`; torch {torch.__version__}, onnx {onnx.__version__}, "
        f"onnxruntime {onnxruntime.__version__}. Prompt of {len(ids)} tokens, {chosen.new} new ones.",
        f"Export: {export_s:.0f} CPU seconds, {size / 1e6:.1f} MB on disk.",
        "| | logit difference, relative | equal greedy tokens | opened in, CPU s "
        "| tokens per CPU s | peak memory, MB |\n"
        "|---|---|---|---|---|---|\n"
        f"| ours in torch, float32, eager | | | | {ours['tokens_per_s']:.2f} | |\n"
        + "\n".join(
            f"| onnxruntime, {name} | {run['difference']:.1e} | {run['equal']} of {chosen.new} "
            f"| {run['opened_s']:.1f} | {run['tokens_per_s']:.2f} | {run['peak_mb']:.0f} |"
            for name, run in rows
        ),
    ]
    text = "\n\n".join(lines) + "\n"
    (RESULTS / "onnx_smollm2.md").write_text(text)
    print(text)


@torch.no_grad()
def our_run(model: Any, ids: list[int], new: int) -> dict[str, Any]:
    """Decode greedily with the model itself."""
    out = model(input_ids=torch.tensor([ids]), use_cache=True)
    logits, tokens, began = out.logits[0].numpy(), [int(out.logits[0, -1].argmax())], time.process_time()
    for _ in range(new - 1):
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return {"logits": logits, "tokens": tokens, "tokens_per_s": (new - 1) / (time.process_time() - began)}


if __name__ == "__main__":
    main()
