"""The transformed model on CUDA: equality with the dequantized model, generate, gradients, training speed, memory.

    python benchmarks/spine_on_cuda.py [OUT.json]

A check and a measurement in one run for the lent GPU, on models built there with random weights: four tiny families for
correctness (fp32 and bf16), and a Qwen2.5-0.5B-shaped model for time and memory against the same model in bf16.
"""

import json
import sys
import time
from pathlib import Path

import torch

from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import resample_noise, transform
from tests.models import FAMILIES, dequantized_oracle, tiny_model

IDS_BT = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))


def check_families(inner: str) -> list[dict[str, object]]:
    rows = []
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model(family, dtype=dtype).cuda()
            oracle = dequantized_oracle(model, make_plan(model, Recipe.named("qerl-nvfp4-aqn")))
            model = transform(model, "qerl-nvfp4-aqn", inner=inner)
            ids_BT = IDS_BT.cuda()
            got, want = (m(input_ids=ids_BT, use_cache=False).logits.float() for m in (model, oracle))
            got.logsumexp(-1).mean().backward()
            trained = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
            tokens = [m.generate(ids_BT, max_new_tokens=8, do_sample=False) for m in (model, oracle)]
            with torch.no_grad():
                sites, _ = resample_noise(model, 1e-2, torch.Generator().manual_seed(1))
                noisy = model(input_ids=ids_BT, use_cache=False).logits.float()
                resample_noise(model, 0.0)
                back = model(input_ids=ids_BT, use_cache=False).logits.float()
            rows.append(
                {
                    "family": family,
                    "dtype": str(dtype),
                    "inner": inner,
                    "max_error": (got - want).abs().max().item(),
                    "max_logit": want.abs().max().item(),
                    "lora_b_with_gradient": trained,
                    "generate_equal": torch.equal(*tokens),
                    "noise_sites": sites,
                    "noise_effect": (noisy - back).abs().max().item(),
                    "noise_restored": torch.equal(got.detach(), back),
                }
            )
            print(rows[-1], flush=True)
    return rows


def measure(recipe: str, inner: str) -> dict[str, object]:
    """Training step and decode of a 0.5B-shaped model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    )
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    start = time.perf_counter()
    model = transform(model, recipe, inner=inner)
    torch.cuda.synchronize()
    transformed_s = time.perf_counter() - start
    ids_BT = torch.randint(0, 1000, (4, 512), device="cuda")

    def step() -> None:
        hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()

    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first_s = time.perf_counter() - start
    step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "recipe": recipe,
        "inner": inner,
        "transform_s": transformed_s,
        "first_step_s": first_s,
        "step_ms_median": sorted(times)[5],
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "graphs": [compiler.graphs for compiler in model.qerl.compilers],
    }


def main() -> None:
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "families": [*check_families("eager"), *check_families("inductor")],
        "steps": [],
    }
    for recipe in ("nvfp4-lora", "bf16-lora"):
        report["steps"].append(measure(recipe, "inductor"))
        print(report["steps"][-1], flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
