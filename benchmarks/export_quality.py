"""What each merge mode does to a trained adapter, and what NVFP4 itself costs: SmolLM2-135M, measured by `--verify`.

    python benchmarks/export_quality.py [--adapter DIR] [--steps 60] [--data /work/shared/data/gsm8k]

An adapter (rank 32 on every linear, as the recipe nvfp4-lora has it) is trained on the 4-bit model: `--steps` steps
of AdamW at 2e-4 on four GSM8K solutions each, which is far more than RL at 1e-5 moves a model in as many steps. So the
same adapter is measured at a tenth of its strength too. Every row is one `export_verified` into a directory, read back.

Predictions are over the package's sample text and twelve GSM8K test problems that training has not seen. "kept" is the
share of the adapter's effect (exporters/verify/logits.py, `effect_kept`); "without adapter" is the 4-bit base itself.
"""

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import qerl_compile
from qerl_compile.adapter_files import adapters_of, write_adapter
from qerl_compile.adapters_off import adapters_off
from qerl_compile.exporters.verify import Budgets, Verification, export_verified
from qerl_compile.exporters.verify.logits import MAX_TOKENS, compare, record_logits
from qerl_compile.perplexity import read_texts, sample_texts, token_windows
from qerl_compile.smollm2 import smollm2_directory

RESULTS = Path(__file__).parent / "results"
RECIPE = "nvfp4-lora"
NO_LIMITS = Budgets(round_trip_kl=1e9, merge_kl=1e9, effect_kept=0, sqnr_db=0, perplexity_increase=1e9)


def train(directory: Path, tokenizer: Any, texts: list[str], steps: int) -> list[float]:
    """Train an adapter on texts, write it, and return the losses."""
    model = qerl_compile.load("smollm2", RECIPE, device="cpu", inner="eager")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    losses = []
    for _ in range(steps):
        chosen = [[*tokenizer(texts[order.pop()])["input_ids"][:192], tokenizer.eos_token_id] for _ in range(4)]
        length = max(map(len, chosen))
        ids_BT = torch.full((4, length), tokenizer.eos_token_id)
        labels_BT, mask_BT = torch.full((4, length), -100), torch.zeros(4, length, dtype=torch.long)
        for row, ids in enumerate(chosen):
            ids_BT[row, : len(ids)] = labels_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {len(losses)}: loss {losses[-1]:.3f}", flush=True)
    write_adapter(model, directory, base_name="smollm2")
    return losses


def row(strength: float, name: str, found: Verification) -> dict[str, Any]:
    """Return the numbers of one export."""
    worst = min(found.layers, key=lambda layer: layer.sqnr_db)
    return {
        "strength": strength,
        "export": name,
        "to_model": vars(found.to_model),
        "kept": found.effect_kept,
        "to_base": vars(found.to_base) if found.to_base else None,
        "sqnr_against": found.sqnr_against,
        "sqnr_db_lowest": worst.sqnr_db,
        "sqnr_db_median": sorted(layer.sqnr_db for layer in found.layers)[len(found.layers) // 2],
        "lowest_layer": worst.path,
        "tokens": found.to_model.tokens if found.to_model else 0,
    }


def measure(adapter: Path, tokenizer: Any, texts: list[str], strengths: list[float]) -> list[dict[str, Any]]:
    """Export in every mode and return the rows."""
    model = qerl_compile.load("smollm2", RECIPE, device="cpu", inner="eager", adapter=adapter)
    trained = {path: each.b_NR.data.clone() for path, each in adapters_of(model).items()}
    windows = token_windows(tokenizer, texts, max_tokens=MAX_TOKENS)
    rows: list[dict[str, Any]] = []
    for strength in strengths:
        for path, each in adapters_of(model).items():
            each.b_NR.data.copy_(trained[path] * strength)
        adapted = record_logits(model, windows)
        with adapters_off(model):
            rows.append(
                {"strength": strength, "export": "without adapter", "to_model": vars(compare(adapted, model, windows))}
            )
        with tempfile.TemporaryDirectory() as folder:
            for mode in ("", "dequantized", "bf16-master", "nvfp4"):
                if not mode and strength != strengths[0]:
                    continue
                found = export_verified(
                    *(model, Path(folder) / (mode or "plain")),
                    target="vllm",
                    tokenizer=tokenizer,
                    merge=mode,
                    texts=texts,
                    budgets=NO_LIMITS,
                )
                rows.append(row(strength, mode or "no merge (RTN NVFP4)", found))
                print(json.dumps(rows[-1], default=str), flush=True)
    return rows


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"# Quality of exports, SmolLM2-135M\n\n{report['date']}, {report['cpu']}, torch {report['torch']}. "
        f"Adapter: rank 32 on {report['adapted']} linears, {report['training']}. "
        f"{report['tokens']:,} tokens: the sample text and GSM8K test problems. `benchmarks/export_quality.py`.\n",
        "## Merges, against the model with its adapter\n",
        "| adapter × | what | KL, nats/token | worst | max Δlogit | top-1 | kept | ppl, model → export | lowest SQNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in report["rows"]:
        if each["export"].startswith("no merge"):
            continue
        near = each["to_model"]
        kept = f"{each['kept']:.1%}" if each.get("kept") is not None else "0 % by definition"
        lowest = f"{each['sqnr_db_lowest']:.1f} dB" if "sqnr_db_lowest" in each else "–"
        lines.append(
            f"| {each['strength']:g} | {each['export']} | {near['kl']:.4f} | {near['kl_worst']:.2f} | "
            f"{near['logit_error']:.2f} | {near['top1']:.1%} | {kept} | "
            f"{near['reference_perplexity']:.3f} → {near['perplexity']:.3f} | {lowest} |"
        )
    lines += [
        "\n## NVFP4 itself, round to nearest, against the bf16 base\n",
        "| KL, nats/token | worst | top-1 | ppl, bf16 → NVFP4 | lowest SQNR | median SQNR | KL, file to model |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report["rows"]:
        if each["export"].startswith("no merge"):
            base = each["to_base"]
            lines.append(
                f"| {base['kl']:.4f} | {base['kl_worst']:.2f} | {base['top1']:.1%} | "
                f"{base['reference_perplexity']:.3f} → {base['perplexity']:.3f} | {each['sqnr_db_lowest']:.2f} dB "
                f"({each['lowest_layer']}) | {each['sqnr_db_median']:.2f} dB | {each['to_model']['kl']:.1e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="use this adapter instead of training one")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--data", type=Path, default=Path("/work/shared/data/gsm8k"))
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 0.1])
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    texts = [*sample_texts(), *read_texts(arguments.data / "test.jsonl")[:12]]
    with tempfile.TemporaryDirectory() as folder:
        adapter = arguments.adapter or Path(folder) / "adapter"
        training = f"{arguments.steps} steps of AdamW at 2e-4 on 4 GSM8K solutions each"
        if arguments.adapter is None:
            train(adapter, tokenizer, read_texts(arguments.data / "train.jsonl"), arguments.steps)
        rows = measure(adapter, tokenizer, texts, arguments.strengths)
    report = {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "adapted": 210,
        "training": training,
        "tokens": max(each.get("tokens", 0) for each in rows),
        "rows": rows,
    }
    (RESULTS / "export_quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "export_quality.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
