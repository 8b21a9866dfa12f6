"""Tiny models for tests: four families, random weights, norms away from 1 so that a wrong norm shows.

Every family is in the logits, greedy, golden and export tests. Slow tests whose subject is something else take
`SOME_FAMILIES`, and fewer cases unless `LONG`; `QERL_LONG=1 pytest` runs all of them (CI has 15 minutes on two cores).
"""

import os
from typing import Any

import torch

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
LONG = bool(os.environ.get("QERL_LONG"))
SOME_FAMILIES = FAMILIES if LONG else ("llama", "gemma3")


def tiny_model(
    family: str, *, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A causal LM of `family` with random weights; Qwen2 has q/k/v biases, Qwen3 q/k norms, Gemma 3 a tied head."""
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, "num_hidden_layers": layers, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "lm_head" not in name:
                parameter.mul_(5)  # transformers' 0.02 gives logits too flat to tell tokens apart
    return model.to(dtype)


def tiny_mixture(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A Qwen3-MoE of four experts, two a token, with random weights."""
    import transformers

    sizes = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZES, **sizes, **changes})
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(5)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not model.to: rotary frequencies stay float32
    return model


def with_filled_adapters(model: Any) -> Any:
    """Return a transformed model whose adapters are no longer silent: lora_B is drawn, the same for every model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def dequantized_oracle(model: Any, plan: Any) -> Any:
    """A plain copy of a dense `model` whose planned linears hold the values of their packed form."""
    import copy

    from qerl_compile.formats.nvfp4 import dequantize, quantize_group

    oracle = copy.deepcopy(model)
    for group in dict.fromkeys(plan.group_of(path) for path in plan.quantize):
        weights = {path: model.get_submodule(path).weight.data for path in group}
        for path, packed in quantize_group(weights).items():
            linear = oracle.get_submodule(path)
            linear.weight.data = dequantize(packed, linear.weight.dtype)
    return oracle
