"""What calibration is worth: SmolLM2-135M packed in every way that a recipe knows, against bf16.

    python benchmarks/calibration.py [--samples 24] [--tokens 256] [--only rtn,gptq …] [--json FILE] [--markdown FILE]

Calibration text is the GSM8K training set, in file order. Measured are

    gsm8k      perplexity of GSM8K test questions and answers, one window each: text of the same kind
    prose      perplexity of the package's sample text and docs/training.md: text of another kind, where a method that
               has only learnt its calibration text would show
    sums       greedy accuracy, every token before being right, of the digits that GSM8K's answers compute in
               `<<48/2=24>>`: a task that a model of this size can partly do

"Recovered" is the share of the gap in nats per token between round-to-nearest (rtn) and bf16 that a method closes. The
interval is over windows: the standard error of the difference to rtn of the same window, in nats per token.
All runs see the same windows; each is one process's `load` or `calibrate`, with the eager inner compiler, on the CPU.
The JSON is written after every run, so a run that is cut off leaves what it had, and `--only` adds to what is there.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qerl_compile.calibrating import calibrate
from qerl_compile.loading import load, model_directory
from qerl_compile.perplexity import sample_texts, token_nats, token_windows, window_logits

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
LINEARS = r"(.*\.)?layers\.\d+\.(.*\.)?\w+_proj"
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "four_over_six": {"scales": "four_over_six"},
    "mse": {"scales": "mse"},
    "four_over_six, text": {"scales": "four_over_six", "text": True},
    "mse, text": {"scales": "mse", "text": True},
    "awq": {"channel_scaling": "awq", "text": True},
    "gptq": {"rounding": "gptq", "text": True},
    "mse + awq": {"scales": "mse", "channel_scaling": "awq", "text": True},
    "mse + gptq": {"scales": "mse", "rounding": "gptq", "text": True},
    "mse + awq + gptq": {"scales": "mse", "channel_scaling": "awq", "rounding": "gptq", "text": True},
}
TEST_ITEMS, PROSE_TOKENS = 32, 4000


def texts(split: str) -> list[str]:
    rows = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text().splitlines()]
    return [f"{row['question']}\n{row['answer']}" for row in rows]


class Evaluation:
    """The windows, and the tokens of them that are digits of a computed number."""

    def __init__(self, tokenizer: Any) -> None:
        self.gsm8k, self.computed = [], []
        for text in texts("test")[:TEST_ITEMS]:
            encoded = tokenizer(text, return_offsets_mapping=True)
            self.gsm8k.append(torch.tensor(encoded["input_ids"]))
            inside = [_computed(text, begin) and text[begin:end].isdigit() for begin, end in encoded["offset_mapping"]]
            self.computed.append(torch.tensor(inside))
        prose = "\n\n".join([*sample_texts(), (ROOT / "docs" / "training.md").read_text()])
        self.prose = token_windows(tokenizer, [prose], window=256, max_tokens=PROSE_TOKENS)

    def __call__(self, model: Any) -> dict[str, list[float]]:
        """Return sums over each window: nats of both texts, and right digits."""
        found: dict[str, list[float]] = {"gsm8k": [], "prose": [], "right": []}
        for ids_T, computed_T in zip(self.gsm8k, self.computed, strict=True):
            logits_TV = window_logits(model, ids_T)
            found["gsm8k"].append(token_nats(logits_TV, ids_T).double().sum().item())
            right_T = logits_TV[:-1].argmax(-1) == ids_T[1:]
            found["right"].append(int(right_T[computed_T[1:]].sum()))
        for ids_T in self.prose:
            found["prose"].append(token_nats(window_logits(model, ids_T), ids_T).double().sum().item())
        return found

    def tokens(self, name: str) -> list[int]:
        """Return how many tokens are predicted in each window."""
        return [len(ids_T) - 1 for ids_T in getattr(self, name)]


def _computed(text: str, position: int) -> bool:
    """Whether a character lies between the = and the >> of a computation."""
    opened = text.rfind("<<", 0, position)
    return opened >= 0 and "=" in text[opened:position] and ">>" not in text[opened:position]


def packed(method: dict[str, Any], samples: int, tokens: int, reports: list) -> Any:
    rule = {"match": LINEARS, **{key: method[key] for key in ("scales", "rounding") if key in method}}
    recipe: dict[str, Any] = {"version": 1, "name": "calibration", "quantize": [rule]}
    if not method.get("text"):
        return load("smollm2", recipe, inner="eager", device="cpu")
    measured = {"samples": samples, "tokens": tokens, "channel_scaling": method.get("channel_scaling", "none")}
    recipe["calibration"] = measured
    return calibrate("smollm2", recipe, texts("train"), inner="eager", device="cpu", listen=reports.append)


def row(name: str, found: dict[str, list[float]], report: dict, evaluation: Evaluation) -> dict[str, Any]:
    rows = report["rows"]
    out: dict[str, Any] = {"method": name, "windows": found}
    for text in ("gsm8k", "prose"):
        tokens = sum(evaluation.tokens(text))
        nats = sum(found[text]) / tokens
        out[f"{text}_perplexity"] = math.exp(nats)
        if "rtn" not in rows and name != "rtn":
            continue
        rtn = found[text] if name == "rtn" else rows["rtn"]["windows"][text]
        bf16 = sum(rows["bf16"]["windows"][text]) / tokens
        gap = sum(rtn) / tokens - bf16
        out[f"{text}_gap"] = nats - bf16
        out[f"{text}_recovered"] = 1 - (nats - bf16) / gap
        differences = [(a - b) / t for a, b, t in zip(found[text], rtn, evaluation.tokens(text), strict=True)]
        out[f"{text}_standard_error"] = statistics.stdev(differences) / len(differences) ** 0.5 / gap
    digits = sum(int(mask.sum()) for mask in evaluation.computed)
    out |= {"sums_right": sum(found["right"]), "sums_asked": digits}
    return out


def table(report: dict) -> str:
    lines = [
        f"# Calibration on SmolLM2-135M\n\nCommit {report['commit']} (and the working tree), {report['date']}, "
        f"{report['cpu']}, torch {report['torch']}. Calibration text: GSM8K train, {report['samples']} samples of "
        f"{report['tokens']} tokens. Test: {report['gsm8k_tokens']} tokens of GSM8K test, {report['prose_tokens']} of "
        "prose. Made by `benchmarks/calibration.py`, whose head says what the columns are.\n",
        "| method | gsm8k perplexity | recovered | prose perplexity | recovered | sums | CPU s to pack |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in report["rows"].items():
        shares = [
            f"{found[f'{text}_recovered']:.0%} ± {found[f'{text}_standard_error']:.0%}"
            if name not in ("bf16", "rtn")
            else ""
            for text in ("gsm8k", "prose")
        ]
        lines.append(
            f"| {name} | {found['gsm8k_perplexity']:.3f} | {shares[0]} | {found['prose_perplexity']:.2f} | {shares[1]} "
            f"| {found['sums_right']}/{found['sums_asked']} | {found['cpu_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(METHODS), help="methods, split by ;")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/calibration.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "benchmarks/results/calibration.md")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = AutoTokenizer.from_pretrained(model_directory("smollm2"))
    evaluation = Evaluation(tokenizer)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    facts = {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "samples": args.samples,
        "tokens": args.tokens,
        "gsm8k_tokens": sum(evaluation.tokens("gsm8k")),
        "prose_tokens": sum(evaluation.tokens("prose")),
    }
    kept = json.loads(args.json.read_text()) if args.json.exists() else {}
    alike = all(kept.get(key) == facts[key] for key in ("samples", "tokens", "gsm8k_tokens", "prose_tokens"))
    report = {**facts, "rows": kept.get("rows", {}) if alike else {}}
    for name in dict.fromkeys(["bf16", "rtn", *args.only]):
        if name in report["rows"] and name not in args.only:
            continue
        begin, reports = time.process_time(), []
        if name == "bf16":
            model = AutoModelForCausalLM.from_pretrained(model_directory("smollm2"), dtype=torch.bfloat16).eval()
        else:
            model = packed(METHODS[name], args.samples, args.tokens, reports)
        seconds = time.process_time() - begin
        report["rows"][name] = {**row(name, evaluation(model), report, evaluation), "cpu_s": seconds}
        report["rows"][name]["layer_errors"] = [found.output_error for found in reports]
        report["rows"][name]["folded"] = sum(len(found.folded) for found in reports)
        order = [known for known in ("bf16", *METHODS) if known in report["rows"]]
        report["rows"] = {known: report["rows"][known] for known in order}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        args.markdown.write_text(table(report))
        print(
            table(report).splitlines()[-len(order) :][order.index(name)],
            f"total CPU {time.process_time():.0f} s",
            flush=True,
        )
        del model


if __name__ == "__main__":
    main()
