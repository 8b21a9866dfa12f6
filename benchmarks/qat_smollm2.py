"""Does weight-only QAT pay? SmolLM2-135M, a few dozen steps on GSM8K text, against rounding after the same training.

    python benchmarks/qat_smollm2.py [--steps 24]      some 8 CPU minutes, 3 GB; GSM8K in QERL_GSM8K

Five models, one held-out text (GSM8K test, never trained on), perplexity per token in windows of 256:

    bf16                    the checkpoint
    RTN                     the checkpoint, packed: what QAT is there to mend
    tuned                   all projections of the layers trained on GSM8K train text, full precision
    tuned, then RTN         that model, packed
    QAT, exported           the same steps on the same batches, rounded in every forward; exported and read back

The comparison is between the last two. Against RTN alone, QAT would also be credited with having seen GSM8K. The gap
that rounding leaves is `tuned, then RTN` minus `tuned`, and what QAT recovers of it is the number to look at.

The optimizer is torch's Adafactor, whose state is a row and a column per matrix: AdamW's would be 0.85 GB more. Its
steps are relative to each matrix' root mean square. Weights are float32; batches, order and seed are equal.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from qerl_compile import load
from qerl_compile.exporters import export
from qerl_compile.loading import model_directory
from qerl_compile.perplexity import perplexity, read_texts
from qerl_compile.transforming import transform

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("QERL_GSM8K", "/work/shared/data/gsm8k"))
LINEARS = r".*layers\.\d+\..*_proj"
WINDOW, ROWS, HELD_OUT = 256, 1, 24


def dense() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_directory("smollm2"), dtype=torch.float32)


def batches(tokenizer: Any, steps: int) -> torch.Tensor:
    """[ROWS, WINDOW] of GSM8K train, one document after another, separated by the end token."""
    ids: list[int] = []
    for text in read_texts(DATA / "train.jsonl"):
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= steps * ROWS * WINDOW:
            break
    return torch.tensor(ids[: steps * ROWS * WINDOW]).view(steps, ROWS, WINDOW)


def train(model: Any, data: torch.Tensor, rate: float) -> list[float]:
    optimizer = torch.optim.Adafactor((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses, start = [], time.perf_counter()
    for step, ids in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / len(data))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"  step {step + 1}: loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return losses


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--steps", type=int, default=24)
    arguments.add_argument("--rate", type=float, default=5e-4, help="relative to each matrix' root mean square")
    given = arguments.parse_args()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory("smollm2"))
    data = batches(tokenizer, given.steps)
    held_out = read_texts(DATA / "test.jsonl")[:HELD_OUT]
    found: dict[str, float] = {}
    losses: dict[str, list[float]] = {}

    def note(name: str, model: Any) -> None:
        found[name] = perplexity(model.eval(), tokenizer, held_out, window=WINDOW)
        print(f"{name}: {found[name]:.4f}", flush=True)

    packing = {"quantize": [{"match": LINEARS}]}
    note("bf16", dense())
    note("RTN", transform(dense(), packing, inner="eager"))

    tuned = dense().requires_grad_(False)
    for name, module in tuned.named_modules():
        if ".layers." in name and name.endswith("_proj"):
            module.requires_grad_(True)
    losses["tuned"] = train(tuned, data, given.rate)
    note("tuned", tuned)
    tuned.requires_grad_(False)
    note("tuned, then RTN", transform(tuned, packing, inner="eager"))
    del tuned
    gc.collect()

    rules = {"quantize": [{"match": LINEARS, "weights": "trained"}]}
    qat = transform(dense(), rules, inner="aot_eager")
    losses["QAT"] = train(qat, data, given.rate)
    note("QAT, in training", qat)
    with tempfile.TemporaryDirectory() as directory:
        export(qat, Path(directory) / "out", target="vllm")
        del qat
        gc.collect()
        note("QAT, exported", load(Path(directory) / "out", inner="eager", dtype=torch.float32))

    gap = found["tuned, then RTN"] - found["tuned"]
    recovered = (found["tuned, then RTN"] - found["QAT, exported"]) / gap
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in found.items())
    trained = "\n".join(f"| {name} | {values[0]:.3f} | {values[-1]:.3f} |" for name, values in losses.items())
    text = f"""# Weight-only QAT on SmolLM2-135M

{given.steps} steps of {ROWS} × {WINDOW} tokens of GSM8K train text, Adafactor at a relative rate of {given.rate:g} that
falls to 0, float32, all 210 projections of the layers trained, embeddings and norms frozen. Perplexity on the first
{HELD_OUT} questions and answers of GSM8K test, windows of {WINDOW}. torch {torch.__version__}, CPU.
Made by `benchmarks/qat_smollm2.py`.

| model | perplexity |
|---|---|
{rows}

Rounding after training costs {gap:.3f} perplexity; QAT recovers {recovered:.0%} of it. "QAT, in training" is what the
training graph computes; the export rounds nothing more than the frozen rest to bf16, in which it came. One run of one
seed.

| run | loss at the first step | at the last |
|---|---|---|
{trained}
"""
    (RESULTS / "qat_smollm2.md").write_text(text, encoding="utf-8")
    raw = {"steps": given.steps, "rate": given.rate, "perplexity": found, "losses": losses}
    (RESULTS / "qat_smollm2.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
