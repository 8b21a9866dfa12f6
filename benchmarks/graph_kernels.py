"""How many kernels one decode step takes: a decoder layer, by training and by rollout passes, and what is around it.

    python benchmarks/graph_kernels.py [--rows 8] [--hidden 3584 --heads 28 --kv-heads 4 --intermediate 18944]

A Qwen2-shaped layer with q/k/v biases, rank-32 adapters and noise is compiled by Inductor and its wrapper code is read:

    fused      generated kernels: norms, noise, rotary, SiLU·mul, casts, bias and LoRA sums
    products   calls of extern_kernels (mm, addmm, bmm)
    operators  calls of qerl:: and aten operators: packed products, attention

On CUDA the launches of one step are counted too, by torch.profiler, and their time is summed: an operator may launch
several kernels (adapted_linear: the product with A, then the packed GEMM with B in its epilogue). The training side
attends to its own token through SDPA, the rollout side over pages, where bias and rotary embedding are attention's.

Around the layers of a rollout step are an embedding, a head, the small modules that leaves.py compiles and the function
after the logits (decode.py). The last two are counted in the same way; on CUDA also a whole step of a model of one
layer, whose launches should be those of the layer and of the parts, and two.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from qerl_compile.rl.rollout.cache import CacheShape, DecodeView, PagedCache, paged_attention
from qerl_compile.rl.rollout.decode import DecodeStep, Rows, StepCode
from qerl_compile.rl.rollout.leaves import compiled_leaves
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.stacked_adapters import refresh_stacked_adapters
from qerl_compile.transforming import transform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = {
    "fused": r"\b(?:cpp|triton)_\w*fused_\w+(?:\.run)?\(",
    "products": r"\bextern_kernels\.\w+\(",
    "operators": r"\btorch\.ops\.(?:qerl|aten)\.[\w.]+\(",
}


def one_layer(recipe: str, shape: argparse.Namespace) -> Any:
    """A transformed model of one layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(sizes).to(torch.bfloat16).eval()
    return transform(model, recipe)


def lines(model: Any, rows: int) -> tuple[PagedCache, Rows]:
    """Rows that each hold two tokens, and their pages."""
    params, device = Sampling(4, (), 0), torch.device(DEVICE)
    cache, made = PagedCache(CacheShape.of(model, 64), rows, device), Rows.make(rows, 4, 2, device)
    made.begin(params)
    made.table_RP[:, 0] = torch.arange(rows)
    made.length_R.fill_(2)
    made.position_R.fill_(1)
    return cache, made


def layer_call(recipe: str, shape: argparse.Namespace, *, rollout: bool) -> Callable[[], Any]:
    """One decode step of one transformed layer."""
    model = one_layer(recipe, shape)
    hidden_BTD = torch.randn(shape.rows, 1, shape.hidden, device=DEVICE).to(torch.bfloat16)
    position_ids = torch.ones(shape.rows, 1, dtype=torch.long, device=DEVICE)
    rotary = model.model.rotary_emb(hidden_BTD, position_ids)
    keywords: dict[str, Any] = {"position_ids": position_ids, "position_embeddings": rotary, "use_cache": False}
    if rollout:
        refresh_stacked_adapters(model)
        cache, made = lines(model, shape.rows)
        keywords["qerl_cache"] = DecodeView(cache, made.table_RP, made.length_R)

    def call() -> Any:
        with torch.no_grad(), paged_attention(model) if rollout else nullcontext():
            return model.model.layers[0](hidden_BTD, **keywords)

    return call


def around(recipe: str, shape: argparse.Namespace) -> Mapping[str, Callable[[], Any]]:
    """What a rollout step runs beside its layers, compiled, by name; and "step", which is all of it."""
    model = one_layer(recipe, shape)
    refresh_stacked_adapters(model)
    cache, made = lines(model, shape.rows)
    code = StepCode.of(model, Sampling(4, (), 0), compiled_leaves(model), graphs=True)
    step = DecodeStep(code, cache, made, graphs=True)
    hidden_BTD = torch.randn(shape.rows, 1, shape.hidden, device=DEVICE).to(torch.bfloat16)
    logits_BV = torch.randn(shape.rows, shape.vocabulary, device=DEVICE).to(torch.bfloat16)
    rotary, norm = (code.leaves[module] for module in (model.model.rotary_emb, model.model.norm))

    def whole() -> None:
        with paged_attention(model):
            step._step(shape.rows)

    calls = {
        "rotary tables": lambda: rotary(hidden_BTD, made.position_R[:, None]),
        "final norm": lambda: norm(hidden_BTD),
        "after the logits": lambda: code.advance(made, logits_BV, code.draw),
        "step": whole,
    }
    return {name: torch.inference_mode()(call) for name, call in calls.items()}


def generated(call: Callable[[], Any]) -> dict[str, Any]:
    """Compile, and count the calls in the body of Inductor's wrapper."""
    with config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(call)
    # The wrapper holds the kernels' sources as strings and, on CUDA, its benchmark harness after `call`.
    bodies = [code[re.search(r"\bdef call\(", code).start() :].partition("def benchmark_compiled")[0] for code in codes]
    found: dict[str, Any] = {kind: sum(len(re.findall(at, body)) for body in bodies) for kind, at in CALLS.items()}
    names = Counter(
        name for body in bodies for name in re.findall(r"\b(?:extern_kernels|torch\.ops)\.([\w.]+)\(", body)
    )
    return {"graphs": len(codes), **found, "calls": sum(found.values()), "names": dict(names)}


def launched(call: Callable[[], Any]) -> dict[str, Any]:
    """Count the kernels of one warm step on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(5):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    events = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in events if not event.name.startswith("Mem")]
    return {
        "launches": len(kernels),
        "copies": len(events) - len(kernels),
        "kernel_us": sum(event.device_time for event in kernels),
        "kernels": [f"{event.device_time:7.2f} us  {event.name[:100]}" for event in kernels],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=3584 if on_gpu else 256)
    parser.add_argument("--heads", type=int, default=28 if on_gpu else 4)
    parser.add_argument("--kv-heads", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--intermediate", type=int, default=18944 if on_gpu else 512)
    parser.add_argument("--vocabulary", type=int, default=152064 if on_gpu else 4096)
    shape = parser.parse_args()
    if not on_gpu:
        torch.set_num_threads(1)
    for recipe in ("qerl-nvfp4-aqn", "bf16-lora-aqn"):
        for rollout in (False, True):
            call = layer_call(recipe, shape, rollout=rollout)
            row = {"recipe": recipe, "passes": "rollout" if rollout else "training", **generated(call)}
            if on_gpu:
                row |= launched(call)
            print(json.dumps(row, indent=1), flush=True)
    for name, call in around("qerl-nvfp4-aqn", shape).items():
        row = {"around the layers": name}
        if name != "step":
            row |= generated(call)
        if on_gpu:
            row |= launched(call)
        if len(row) > 1:
            print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
