"""Tiny models with hand-attached state: what `transform` leaves behind, without `transform`."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qerl_compile.formats.nvfp4 import dequantize, quantize_group

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
RECIPE_YAML = "version: 1\nquantize:\n- match: .*_proj\n"


def tiny_model(family: str, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype
    ).eval()  # .to(dtype) would round the rotary frequencies
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zero biases and unit norms would hide a lost tensor
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def pack(model: nn.Module, *, shared: bool = True) -> nn.Module:
    """Pack every decoder linear in place; return a dense copy of the model with the decoded weights."""
    dense = copy.deepcopy(model)
    for path, parent in list(model.named_modules()):
        children = dict(parent.named_children())
        for names in GROUPS:
            members = {name: children[name] for name in names if name in children}
            weights = {name: member.weight.detach() for name, member in members.items()}
            parts = [weights] if shared else [{name: weight} for name, weight in weights.items()]
            for name, packed in (item for part in parts for item in quantize_group(part).items()):
                attach(members[name], packed)
                target = dense.get_submodule(f"{path}.{name}")
                target.weight.data = dequantize(packed, target.weight.dtype)
    return dense


def attach(module: nn.Module, packed) -> None:
    dtype = module.weight.dtype
    module._parameters.pop("weight")
    module.weight_packed = nn.Parameter(packed.codes_NK2, requires_grad=False)
    module.weight_scale = nn.Parameter(packed.block_decode_scale_NG, requires_grad=False)
    module.register_buffer("weight_global_scale", packed.global_scale)
    ghost = torch.full((), float("nan"), dtype=dtype).expand(packed.shape)
    module.register_buffer("weight", ghost, persistent=False)


def add_lora(model: nn.Module, sites: dict[str, tuple[int, float]], *, seed: int = 1) -> None:
    """Give modules (leaf name or full path → rank, alpha) random LoRA factors, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        site = sites.get(path) or sites.get(path.rpartition(".")[2])
        if site is not None:
            rank, alpha = site
            rows, columns = module.weight.shape
            module.lora_A = nn.Parameter(torch.randn(rank, columns, generator=generator) * 0.1)
            module.lora_B = nn.Parameter(torch.randn(rows, rank, generator=generator) * 0.1)
            module.lora_rank, module.lora_alpha = rank, alpha


def record(model: nn.Module, base_name: str = "org/base") -> None:
    model.__dict__["qerl"] = SimpleNamespace(recipe=SimpleNamespace(to_yaml=lambda: RECIPE_YAML), base_name=base_name)


@pytest.fixture
def state() -> SimpleNamespace:
    """The functions of this file: test modules cannot import a conftest by name."""
    return SimpleNamespace(tiny_model=tiny_model, pack=pack, attach=attach, add_lora=add_lora, record=record)


@pytest.fixture
def input_ids_BT() -> torch.Tensor:
    return torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(9))


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0")  # noqa: S106  # no password
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1")  # noqa: S106
