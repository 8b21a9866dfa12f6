"""Where the time of one GRPO step goes, by stamps on the device's own stream, and the least that each part could take.

    prefill     the backbone over prompts
    decode      the rest of the rollout: decode steps from CUDA graphs, draws, the host that feeds them
    forward     the backbone over micro-batches
    head        lm-head, log-probabilities and loss with their backward; each chunk of logits is made twice
    backward    the layers, down to the adapters; clipping the gradient is in here
    optimizer   AdamW on the adapters
    host, rest  what is left of the step: noise, rewards, bringing completions to the host, waiting

Stamps are hooks that anyone may register: before and after the backbone, on the gradient of its hidden states (the
moment at which the head's backward is done), before and after the optimizer's step. Nothing is traced, so the times
are those of the step itself; what they cannot show is which kernel it was (kernel_profile.py).

*Floors.* Products of matrices at the rate that one of 8192 cubed reaches, memory at the bandwidth of a copy, both
measured in the same run on the same card (gpu_timing.ceilings); data sheets promise more of both.

    decode      each step reads every weight of layers and head, the adapters, and every live page once
    prefill     the larger of its products and of reading the weights once
    forward     2 FLOP for each weight and adapter weight and token, and causal attention
    head        three products with the vocabulary: logits, the same again, the gradient of hidden states
    backward    the gradient of inputs: as many FLOP as forward, twice the adapters', 2.5 times the attention's; with
                recompute the forward once more
    optimizer   parameters and both moments read and written, gradients read

What this module does not count: norms, activations, rotary embeddings, the dequantized copy of a weight. They are the
distance to the floor, not the floor.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import gpu_timing
from qerl_compile.rl.rollout.cache import PrefillView

PHASES = ("prefill", "decode", "forward", "head", "backward", "optimizer", "host, rest")


def ceilings(device: str) -> dict[str, float]:
    """TB/s of a copy and TFLOP/s of bf16, measured now."""
    if device == "cuda":
        found = gpu_timing.ceilings(gpu_timing.GpuClock())
        torch.cuda.empty_cache()
        return found
    source = torch.zeros(1 << 22)
    target, square = torch.empty_like(source), torch.randn(512, 512).bfloat16()
    seconds = [_cpu_seconds(lambda: target.copy_(source)), _cpu_seconds(lambda: square @ square)]
    return {
        "copy_tb_per_s": 2 * source.nbytes / seconds[0] / 1e12,
        "bf16_tflop_per_s": 2 * 512**3 / seconds[1] / 1e12,
    }


def _cpu_seconds(work: Any) -> float:
    work()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Stopwatch:
    """Stamps on the current stream of a GPU; on a CPU, of its clock."""

    def __init__(self, device: str) -> None:
        self.on_cuda = device == "cuda"

    def stamp(self) -> Any:
        """Note the moment at which everything enqueued so far is done."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until everything enqueued is done."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two stamps that have passed."""
        return begin.elapsed_time(end) / 1e3 if self.on_cuda else end - begin


class PhaseHooks:
    """Stamps of one step, while it is entered.

    Args:
        model: a causal LM; its backbone is `get_decoder()`.
        optimizer: of its adapters.
        watch: makes stamps.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, watch: Stopwatch) -> None:
        self.watch = watch
        self.backbone, self.optimizer = model.get_decoder(), optimizer
        self.stamps: list[tuple[str, Any]] = []  # what begins, and when

    def __enter__(self) -> "PhaseHooks":
        """Register."""
        self._handles = [
            self.backbone.register_forward_pre_hook(self._enters, with_kwargs=True),
            self.backbone.register_forward_hook(self._leaves, with_kwargs=True),
            self.optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer")),
            self.optimizer.register_step_post_hook(lambda *_: self._begin("rest")),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Remove every hook; a step that follows is as it was before."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, phase: str) -> None:
        self.stamps.append((phase, self.watch.stamp()))

    def _enters(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get("qerl_cache"), PrefillView):
            self._begin("prefill")
        elif torch.is_grad_enabled():  # decode steps run without gradients, and most of them not even this code
            self._begin("forward")

    def _leaves(self, _: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(kwargs.get("qerl_cache"), PrefillView):
            self._begin("decode")
        elif torch.is_grad_enabled():
            self._begin("head")
            output[0].register_hook(lambda _: self._begin("backward"))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase whose end was seen too; everything was waited for."""
        found: dict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(self.stamps, self.stamps[1:], strict=False):
            found[phase] += self.watch.seconds(begin, end)
        return found


def phases_of(hooks: PhaseHooks, rollout_s: float, step_s: float) -> dict[str, float]:
    """Seconds of all `PHASES`, which add up to the step.

    Args:
        hooks: of the step.
        rollout_s: seconds that the engine ran.
        step_s: of the whole step.
    """
    seen = hooks.seconds()
    found = {name: seen[name] for name in ("prefill", "forward", "head", "backward", "optimizer")}
    found["decode"] = rollout_s - found["prefill"]
    found["host, rest"] = step_s - sum(found.values())
    return {name: found[name] for name in PHASES}


@dataclass(frozen=True)
class Load:
    """What a step had to do.

    Args:
        prompts: different ones, prefilled once each.
        rows: completions.
        prompt_tokens: of each prompt.
        new_tokens: of each completion.
    """

    prompts: int
    rows: int
    prompt_tokens: int
    new_tokens: int


def floors(
    model: Any, optimizer: torch.optim.Optimizer, load: Load, ceiling: dict[str, float], *, weight_bytes: int
) -> dict[str, float]:
    """Least seconds of each phase; see the module's essay. The host's is 0.

    Args:
        model: a transformed Qwen2.
        optimizer: after a step.
        load: the step.
        ceiling: of `ceilings`.
        weight_bytes: what a decode step reads without the cache.
    """
    config, recompute = model.config, model.qerl.recompute
    flop_per_s, bytes_per_s = ceiling["bf16_tflop_per_s"] * 1e12, ceiling["copy_tb_per_s"] * 1e12
    dense, adapters = products_per_token(model)
    head_dim = config.hidden_size // config.num_attention_heads
    length, layers = load.prompt_tokens + load.new_tokens, config.num_hidden_layers

    def attention(tokens: int) -> float:
        # 2 products of 2 FLOP each over half a square
        return 2 * tokens**2 * head_dim * config.num_attention_heads * layers

    trained = load.rows * length
    forward = (dense + adapters) * trained + load.rows * attention(length)
    backward = (dense + 2 * adapters) * trained + 2.5 * load.rows * attention(length)
    head = 3 * 2 * config.hidden_size * config.vocab_size * load.rows * load.new_tokens
    prefill = load.prompts * ((dense + adapters) * load.prompt_tokens + attention(load.prompt_tokens))
    position = layers * 2 * config.num_key_value_heads * head_dim * 2  # keys and values in bf16
    steps = load.new_tokens - 1  # the first token comes from the prefill
    live = steps * (load.prompts * load.prompt_tokens + load.rows * (1 + steps) / 2)
    return {
        "prefill": max(prefill / flop_per_s, weight_bytes / bytes_per_s),
        "decode": (steps * weight_bytes + live * position) / bytes_per_s,
        "forward": forward / flop_per_s,
        "head": head / flop_per_s,
        "backward": (backward + (forward if recompute else 0)) / flop_per_s,
        "optimizer": optimizer_bytes(optimizer) / bytes_per_s,
        "host, rest": 0.0,
    }


def products_per_token(model: Any) -> tuple[float, float]:
    """FLOP of one token in the linears of all layers, and in their adapters."""
    plan = model.qerl.plan
    linears = [m for m in model.get_decoder().modules() if hasattr(m, "in_features")]
    dense = sum(2 * m.in_features * m.out_features for m in linears)
    sites = [model.get_submodule(path) for path in plan.lora]
    return float(dense), float(sum(2 * (m.lora_A.numel() + m.lora_B.numel()) for m in sites))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What a step moves at least: parameters and state read and written, gradients read."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.dim()]
    return 3 * sum(p.nbytes for p in parameters) + 2 * sum(t.nbytes for t in state)
