"""Models of real shapes with random weights, made on the device: nothing is read and bf16 never coexists with packed.

The packed form is drawn directly: random codes under random block scales, with the matrix scale that gives the weights
a standard deviation of 0.02. Kernels take as long for these as for a trained model's, and zeros are nowhere.
"""

from typing import Any

import torch
from torch import nn

from qerl_compile.attach import Attacher
from qerl_compile.formats.nvfp4 import PackedNVFP4
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip
RECIPES = {"nvfp4": "qerl-nvfp4-aqn", "bf16": "bf16-lora-aqn"}
STANDARD_DEVIATION = 0.02


def empty_model(size: str, layers: int | None = None) -> Any:
    """A Qwen2 model of a shape in bf16, its parameters on the meta device and its buffers on the CPU."""
    from accelerate import init_empty_weights
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = SHAPES[size] | ({"num_hidden_layers": layers} if layers else {})
    with init_empty_weights(include_buffers=False):
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=32768, tie_word_embeddings=False))
    return model.to(torch.bfloat16).eval()


def random_model(
    size: str,
    recipe: str,
    *,
    layers: int | None = None,
    inner: str = "inductor",
    device: str = "cuda",
    recompute: bool = False,
) -> Any:
    """A transformed Qwen2 model in bf16 with random weights, random adapters and zero noise.

    Args:
        size: a key of `SHAPES`.
        recipe: a key of `RECIPES`, or a recipe.
        layers: fewer layers than the shape has.
        inner: inner compiler.
        device: where to make it.
        recompute: whether training graphs run the recompute pass.
    """
    model = empty_model(size, layers)
    rules = Recipe.resolve(RECIPES.get(recipe, recipe))
    plan = make_plan(model, rules)
    attacher = Attacher(model, plan)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for path, module in model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if leaf == "weight" and path in plan.quantize:
                    attacher.packed(path, _random_packed(*parameter.shape, generator), torch.bfloat16)
                    continue
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value.normal_(0, STANDARD_DEVIATION, generator=generator)
                value += float(value.dim() == 1 and leaf == "weight")  # norms
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            for leaf, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.device.type != torch.device(device).type:
                    module._buffers[leaf] = buffer.to(device)
        plan = attacher.finish()
        for path in plan.lora:
            model.get_submodule(path).lora_B.normal_(0, STANDARD_DEVIATION, generator=generator)
    become_qerl(model, TransformState(rules, plan, inner, recompute=recompute, base_name=f"random {size}"))
    return model


def _random_packed(n: int, k: int, generator: torch.Generator) -> PackedNVFP4:
    device = generator.device
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device, generator=generator)
    block = (torch.rand(n, k // 16, device=device, generator=generator) * 384 + 64).to(torch.float8_e4m3fn)
    # E2M1's sixteen values have a mean square of 8.5625; block scales are uniform in [64, 448].
    divisor = torch.full((1,), (8.5625 * 77_824) ** 0.5 / STANDARD_DEVIATION, device=device)
    return PackedNVFP4(codes, block, divisor, direction="divisor")
