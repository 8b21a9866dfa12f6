"""torchao's quantize_ with our config."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from qerl_compile import QerlNVFP4Config
from qerl_compile.doors.torchao_handler import PackedLinear
from qerl_compile.errors import FormatError
from qerl_compile.formats.nvfp4 import dequantize, quantize


def small(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48, bias=bias), nn.ReLU(), nn.Linear(48, 16)).to(dtype)


def oracle(model):
    """A plain copy whose linears hold the decoded weights."""
    import copy

    plain = copy.deepcopy(model)
    for layer in plain:
        if isinstance(layer, nn.Linear):
            layer.weight.data = dequantize(quantize(layer.weight.data), layer.weight.dtype)
    return plain


@pytest.mark.parametrize("bias", [True, False])
def test_the_model_computes_with_the_decoded_weights_and_has_the_same_bytes(bias):
    model = small(bias=bias)
    plain, packed = oracle(model), quantize(model[0].weight.data)
    first = model[0]
    quantize_(model, QerlNVFP4Config())
    assert model[0] is first
    assert [type(layer) for layer in model] == [PackedLinear, nn.ReLU, PackedLinear]
    x = torch.randn(5, 32)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert torch.equal(first.weight_packed, packed.codes_NK2)
    assert torch.equal(first.weight_scale.view(torch.uint8), packed.block_decode_scale_NG.view(torch.uint8))
    assert torch.equal(first.weight_global_scale, packed.global_scale)


def test_gradients_reach_inputs_and_biases_and_no_packed_tensor():
    model = small()
    plain = oracle(model)
    quantize_(model, QerlNVFP4Config())
    x, y = (torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    model(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)
    assert torch.allclose(model[0].bias.grad, plain[0].bias.grad, atol=1e-4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.bias", "2.bias"}


def test_the_filter_decides():
    model = small()
    quantize_(model, QerlNVFP4Config(), filter_fn=lambda module, name: name == "2")
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, PackedLinear]


def test_a_model_that_is_one_linear_is_quantized_too():
    """torchao cannot replace the model itself, which would silently leave it as it was."""
    model = nn.Linear(32, 16)
    quantize_(model, QerlNVFP4Config())
    assert type(model) is PackedLinear
    assert "nvfp4" in repr(model)


def test_torch_compile_takes_it_in_one_graph():
    model = small()
    quantize_(model, QerlNVFP4Config())
    x = torch.randn(5, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_state_dicts_go_out_and_in():
    model, other = small(), small()
    with torch.no_grad():
        other[0].weight.mul_(-3)
    quantize_(model, QerlNVFP4Config())
    quantize_(other, QerlNVFP4Config())
    x = torch.randn(5, 32)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_changes_the_bias_and_not_the_packed_tensors(dtype):
    model = small()
    quantize_(model, QerlNVFP4Config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.to(dtype)
    for name, value in model.state_dict().items():
        wanted = dtype if name.endswith("bias") else before[name].dtype
        assert value.dtype == wanted, name
        if not name.endswith("bias"):
            assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
    assert model(torch.randn(5, 32, dtype=dtype)).dtype == dtype
    assert not any(p.requires_grad for name, p in model.named_parameters() if "weight" in name)


def test_a_move_moves_everything():
    model = small()
    quantize_(model, QerlNVFP4Config())
    assert {value.device.type for value in model.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        pytest.param(lambda: nn.Linear(24, 8), "K", id="columns no multiple of 16"),
        pytest.param(lambda: nn.Linear(32, 8, device="meta"), "on the meta device", id="no weight in memory"),
        pytest.param(lambda: nn.Embedding(8, 32), "a Embedding", id="no linear"),
        pytest.param(lambda: nn.Linear(32, 8).double(), "float64", id="float64"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_left_as_it_is(module, message):
    model = nn.Sequential(module())
    before = model[0].weight
    with pytest.raises(FormatError, match=message):
        quantize_(model, QerlNVFP4Config(), filter_fn=lambda module, name: name == "0")
    assert model[0].weight is before


def test_without_torchao_the_error_says_what_to_do():
    code = """
import sys
sys.modules["torchao"] = None
import qerl_compile
from qerl_compile.errors import ModelError
try:
    qerl_compile.QerlNVFP4Config
except ModelError as fault:
    assert "pip install torchao" in str(fault), fault
else:
    raise SystemExit("no error")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
