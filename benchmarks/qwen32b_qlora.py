"""One training step on adapters: our NVFP4, our bf16, and Hugging Face + PEFT + bitsandbytes' NF4 (QLoRA).

    forward → log-probabilities of random completion tokens → minus their mean → backward → AdamW on the adapters

The same tokens, micro-batches, loss code (rl/token_logps.py: its head runs over chunks of logits, for all three),
optimizer (torch's AdamW) and adapters (rank 32 on seven linears, float32) for each. What differs is the model:

    nvfp4, bf16   ours, graphs compiled by Inductor
    nf4           `bnb.nn.Linear4bit` as QLoRA has it: NF4, double quantization, bf16 compute, PEFT's LoRA, under
                  autocast to bf16 as Hugging Face's Trainer runs it (without, PEFT computes adapters in float32);
                  eager, as it is commonly run
    nf4-compiled  the same with each decoder layer under `torch.compile`, which is not how QLoRA is commonly run; so
                  that what we measure is not Python's overhead alone

Weights are drawn and quantized linear by linear on the device, so the dense model never exists whole. Each model is
alone on the card; they are timed one after the other, so that a drifting clock may favour one by a few per cent.
A model that runs out of memory gives a row that says so.
"""

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.qwen32b_phases import Stopwatch
from benchmarks.qwen32b_rows import GB, append, provenance
from benchmarks.random_models import STANDARD_DEVIATION, empty_model, random_model
from qerl_compile.recipe import Recipe
from qerl_compile.rl.policy_batch import MicroBatch
from qerl_compile.rl.token_logps import token_logps

MODELS = ("nvfp4", "bf16", "nf4", "nf4-compiled")
PROMPT = 16
WARM_UP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    parser.add_argument("--models", default="nvfp4,bf16,nf4", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a row, prompt and completion")
    parser.add_argument("--rows-at-a-time", type=int, default=8)
    parser.add_argument("--recompute", default="off", help="off, on, or both as off,on")
    parser.add_argument("--timed", type=int, default=6, help="steps that are timed, after two that are not")


def run(options: argparse.Namespace) -> None:
    """Measure each model."""
    if unknown := {*options.models.split(",")} - {*MODELS} or {*options.recompute.split(",")} - {"on", "off"}:
        raise SystemExit(f"qlora: {', '.join(unknown)}: models are {', '.join(MODELS)}, recompute is on, off or on,off")
    if "nf4-compiled" in options.models.split(",") and "on" in options.recompute.split(","):
        raise SystemExit(
            "nf4-compiled: set --recompute off; Dynamo cannot compile layers that transformers checkpoints"
        )
    for recompute in options.recompute.split(","):
        for name in options.models.split(","):
            row = {
                "part": "qlora", "size": options.size, "model": name, "rows": options.rows, "tokens": options.tokens,
                "layers": options.layers, "rows_at_a_time": options.rows_at_a_time, "recompute": recompute == "on",
                "inner": options.inner, **provenance(options),
            }  # fmt: skip
            try:
                row |= measure(name, options, recompute == "on")
            except torch.OutOfMemoryError as fault:
                row["out_of_memory"] = str(fault).splitlines()[0]
            append(options.json, row)
            print(describe(row), flush=True)
            torch._dynamo.reset()  # compiled graphs hold on to their model
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def describe(row: dict[str, Any]) -> str:
    """A row in one line."""
    what = f"{row['size']} {row['model']}, {row['rows']} x {row['tokens']}, recompute {row['recompute']}"
    if "out_of_memory" in row:
        return f"{what}: {row['out_of_memory']}"
    return (
        f"{what}: {row['step_s'] * 1e3:.0f} ms/step, {row['tokens_per_s']:.0f} tok/s, after load "
        f"{row['after_load'] / GB:.1f} GB, peak {row['peak'] / GB:.1f} GB, first step {row['first_s']:.1f} s"
    )


def measure(name: str, options: argparse.Namespace, recompute: bool) -> dict[str, Any]:
    """Seconds of a step, median over the timed ones, and bytes."""
    device, watch = options.device, Stopwatch(options.device)
    model, surrounding = _model(name, options, recompute)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    batches = _batches(options, model.config.vocab_size)
    after_load = torch.cuda.memory_allocated() if watch.on_cuda else 0
    seconds, losses = [], []
    for number in range(WARM_UP + options.timed):
        if number == WARM_UP and watch.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        watch.wait()
        begin = watch.stamp()
        losses.append(_step(model, batches, optimizer, surrounding))
        end = watch.stamp()
        watch.wait()
        seconds.append(watch.seconds(begin, end))
    if not all(torch.isfinite(loss) for loss in losses):
        raise RuntimeError(f"{name}: losses {losses}")
    step_s = statistics.median(seconds[WARM_UP:])
    return {
        "step_s": step_s, "steps_s": seconds[WARM_UP:], "first_s": seconds[0],
        "tokens_per_s": options.rows * options.tokens / step_s, "after_load": after_load,
        "peak": torch.cuda.max_memory_allocated() if watch.on_cuda else 0,
        "losses": [float(loss) for loss in losses], "trained": sum(p.numel() for p in parameters),
        "attention": model.config._attn_implementation, "on": str(device),
    }  # fmt: skip


def _step(
    model: Any,
    batches: list[MicroBatch],
    optimizer: torch.optim.Optimizer,
    surrounding: Callable[[], contextlib.AbstractContextManager[Any]],
) -> torch.Tensor:
    total = torch.zeros((), device=batches[0].ids_BS.device)
    tokens = sum(batch.mask_BC.numel() for batch in batches)
    for batch in batches:
        with surrounding():
            logps_BC, _ = token_logps(model, batch, 1.0)
        loss = -logps_BC.sum() / tokens
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _batches(options: argparse.Namespace, vocabulary: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(0)
    ids_NS = torch.randint(0, vocabulary, (options.rows, options.tokens), generator=generator).to(options.device)
    count, width = options.rows_at_a_time, options.tokens - PROMPT
    return [
        MicroBatch(
            rows=tuple(range(start, start + len(ids_BS))),
            ids_BS=ids_BS,
            attention_BS=torch.ones_like(ids_BS),
            mask_BC=torch.ones_like(ids_BS[:, PROMPT:], dtype=torch.bool),
            sampling_logp_BC=torch.zeros(len(ids_BS), width, device=ids_BS.device),
            advantages_B=torch.ones(len(ids_BS), device=ids_BS.device),
        )
        for start, ids_BS in zip(range(0, options.rows, count), ids_NS.split(count), strict=True)
    ]


def _model(
    name: str, options: argparse.Namespace, recompute: bool
) -> tuple[Any, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Return the model and what its forward runs under."""
    if name in ("nvfp4", "bf16"):
        model = random_model(
            options.size, name, layers=options.layers, inner=options.inner, device=options.device, recompute=recompute
        )
        return model, contextlib.nullcontext
    model = nf4_model(options.size, layers=options.layers, device=options.device)
    model.train()  # gradient checkpointing asks for it; there is no dropout
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name == "nf4-compiled":
        for layer in model.get_decoder().layers:
            layer.compile(backend=options.inner)
    return model, lambda: torch.autocast(options.device, torch.bfloat16)


def nf4_model(size: str, *, layers: int | None, device: str) -> Any:
    """A random model as QLoRA has it: `Linear4bit` in all layers, PEFT's LoRA over them, head and embedding in bf16."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = empty_model(size, layers)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(parameter: torch.Tensor) -> torch.Tensor:
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        return value.normal_(0, STANDARD_DEVIATION, generator=generator)

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = bnb.nn.Params4bit(
                drawn(module.weight), requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
            )
            packed.weight = weight.to(device)
            if module.bias is not None:
                packed.bias = nn.Parameter(drawn(module.bias), requires_grad=False)
            model.set_submodule(path, packed)
            continue
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = drawn(parameter) + float(parameter.dim() == 1 and leaf == "weight")  # norms
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
    model.is_loaded_in_4bit = True  # by which PEFT knows that Linear4bit is what to expect
    rule = Recipe.named("bf16-lora-aqn").lora[0]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rule.rank, lora_alpha=int(rule.alpha), target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config).base_model.model
