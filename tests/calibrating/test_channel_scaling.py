"""Factors per channel: the norm that takes them computes the same function, whichever kind of norm it is."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qerl_compile.calibrating.channel_scaling import best_factors, fold_into_norm
from qerl_compile.calibrating.statistics import InputStatistics
from qerl_compile.formats.scale_search import search_group


def randomized(norm):
    with torch.no_grad():
        norm.weight.add_(torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    return norm


FACTOR = torch.rand(32, generator=torch.Generator().manual_seed(1)) * 3 + 0.2
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_times_the_factor_it_took_is_the_old_norm(kind, dtype):
    norm = randomized(kind(32)).to(dtype)
    before = norm.float()(X)
    norm = norm.to(dtype)
    taken = fold_into_norm(norm, FACTOR)
    assert taken is not None
    after = norm.float()(X)
    # Exact in bf16 as well: the factor is that of the rounded weight.
    torch.testing.assert_close(after * taken, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(taken, FACTOR, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind, silent", [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, -1.0)], ids=["plain", "one_plus"])
def test_a_channel_that_the_norm_silences_takes_no_factor(kind, silent):
    norm = kind(32)
    with torch.no_grad():
        norm.weight[7] = silent
    taken = fold_into_norm(norm, FACTOR)
    assert taken is not None
    assert taken[7] == 1
    assert norm.weight[7] == silent


def test_a_norm_of_another_kind_is_left_alone():
    norm = nn.LayerNorm(32)
    nn.init.constant_(norm.bias, 0.5)
    weight = norm.weight.detach().clone()
    assert fold_into_norm(norm, FACTOR) is None
    assert torch.equal(norm.weight, weight)


def statistics(x):
    found = InputStatistics(x.shape[1], hessian=True, device=x.device)
    found.add(x)
    return found


def pack(weights, importance):
    return search_group(weights, "amax")


def test_excited_channels_get_larger_factors():
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(3))
    x[:, ::16] *= 30
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    factor = best_factors({"w": w}, statistics(x), pack)
    assert factor is not None
    assert factor[::16].min() > 2 * factor.median()


def test_factors_lower_the_error_of_the_outputs():
    from qerl_compile.formats.nvfp4 import dequantize

    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(3))
    x[:, ::16] *= 30
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    factor = best_factors({"w": w}, statistics(x), pack)
    plain = dequantize(pack({"w": w}, None)["w"], torch.float32)
    scaled = dequantize(pack({"w": w * factor}, None)["w"], torch.float32) / factor
    errors = [((rounded - w) @ x.T).square().sum() for rounded in (scaled, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_weights_that_are_exact_already_take_no_factors():
    w = torch.tensor([6.0, 3.0, 1.0, -2.0]).repeat(8, 8)
    assert best_factors({"w": w}, statistics(X), pack) is None


def test_a_norm_that_also_feeds_a_router_may_not_take_factors():
    import transformers

    from qerl_compile.regions import capture
    from tests.models import SIZES

    with torch.device("meta"):
        config = transformers.MixtralConfig(**{**SIZES, "num_hidden_layers": 1})
        (facts,) = capture(transformers.MixtralForCausalLM(config)).values()
    layer = "model.layers.0"
    qkv = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
    assert facts.feeds == ((f"{layer}.input_layernorm", qkv),)
