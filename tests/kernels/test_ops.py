"""The operators as torch sees them: fake, autograd, compiled, refused."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qerl_compile.errors import FormatError
from qerl_compile.formats import nvfp4
from qerl_compile.kernels import ops
from tests.kernels.oracle import make_weight

# opcheck's test_schema compares inputs before and after with allclose, which torch does not have for float8; that no
# input is written to is tested below instead.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operator_calls() -> dict[str, tuple]:
    codes, blocks, decode_scale = make_weight(24, 48).args
    w = torch.randn(24, 48, requires_grad=True)
    x, dy = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 24, requires_grad=True)
    return {
        "quantized_linear": (x, codes, blocks, decode_scale),
        "quantized_linear_dx": (dy, codes, blocks, decode_scale),
        "quantize": (w,),
        "dequantize": (codes, blocks, decode_scale, torch.bfloat16),
        "fake_quantized_linear": (x, w),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck_accepts(name: str) -> None:
    opcheck(getattr(ops, name), operator_calls()[name], test_utils=CHECKS)


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", operator_calls())
def test_no_operator_writes_to_or_returns_its_inputs(name: str) -> None:
    args = operator_calls()[name]
    tensors = [a for a in args if isinstance(a, Tensor)]
    before = [raw_bytes(t) for t in tensors]
    outputs = getattr(torch.ops.qerl, name)(*args)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(raw_bytes(tensor), old)
    pointers = {t.data_ptr() for t in tensors}
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.data_ptr() not in pointers
        assert output.is_contiguous()


def test_gradcheck_in_float64() -> None:
    args = make_weight(24, 48).args
    x, dy = torch.randn(3, 48, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.quantized_linear(t, *args), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda t: ops.quantized_linear_dx(t, *args), dy.requires_grad_())


def test_backward_saves_the_packed_tensors_and_nothing_else() -> None:
    args = make_weight(24, 48).args
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.quantized_linear(torch.randn(3, 48, requires_grad=True), *args)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in args]


def test_quantize_is_a_constant_for_autograd() -> None:
    codes, blocks, global_scale = ops.quantize(torch.randn(4, 32, requires_grad=True))
    assert not (codes.requires_grad or blocks.requires_grad or global_scale.requires_grad)


def test_quantize_gives_the_bytes_of_the_format() -> None:
    w = torch.randn(4, 32)
    packed = nvfp4.quantize(w)
    codes, blocks, global_scale = ops.quantize(w)
    assert torch.equal(codes, packed.codes_NK2)
    assert torch.equal(blocks.view(torch.uint8), packed.block_decode_scale_NG.view(torch.uint8))
    assert torch.equal(global_scale, packed.global_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize_equals_the_format(dtype: torch.dtype) -> None:
    packed = make_weight(7, 48).packed
    codes, blocks = packed.codes_NK2, packed.block_decode_scale_NG
    w = ops.dequantize(codes, blocks, packed.decode_scale, dtype)
    assert torch.equal(w, nvfp4.dequantize(packed, dtype))


def test_fake_quantized_linear_multiplies_with_the_quantized_weight() -> None:
    w, x = torch.randn(24, 48), torch.randn(3, 48)
    dequantized = nvfp4.dequantize(nvfp4.quantize(w), torch.float32)
    torch.testing.assert_close(ops.fake_quantized_linear(x, w), x @ dequantized.T)


@pytest.mark.parametrize("wanted", ["x", "w", "both"])
def test_fake_quantized_gradients_are_quantized_dx_and_straight_through_dw(wanted: str) -> None:
    w = torch.randn(24, 48, requires_grad=wanted != "x")
    x = torch.randn(2, 3, 48, requires_grad=wanted != "w")
    dy = torch.randn(2, 3, 24)
    ops.fake_quantized_linear(x, w).backward(dy)
    dequantized = nvfp4.dequantize(nvfp4.quantize(w), torch.float32)
    if wanted != "w":
        torch.testing.assert_close(x.grad, dy @ dequantized)
    if wanted != "x":
        torch.testing.assert_close(w.grad, dy.flatten(0, 1).T @ x.detach().flatten(0, 1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_compiled_graph_serves_every_batch_size_with_gradients(backend: str) -> None:
    args = make_weight(24, 48).args
    w = torch.randn(24, 48, requires_grad=True)

    def model(x: Tensor, w: Tensor) -> Tensor:
        return ops.quantized_linear(x.sin(), *args).relu() + ops.fake_quantized_linear(x, w)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 70):
            x = torch.randn(batch, 48, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 0)
            y = compiled(x, w)
            got = torch.autograd.grad(y.square().sum(), (x, w))
            expected = torch.autograd.grad(model(x, w).square().sum(), (x, w))
            torch.testing.assert_close(y, model(x, w))
            torch.testing.assert_close(got, expected)


CODES, BLOCKS, SCALE = make_weight(24, 48).args
X = torch.zeros(3, 48)
REFUSED = {
    "codes not uint8": ((X, CODES.int(), BLOCKS, SCALE), "codes_NK2", "int32 [24, 24]"),
    "codes not a matrix": ((X, CODES[None], BLOCKS, SCALE), "codes_NK2", "[1, 24, 24]"),
    "K no multiple of 16": ((X, CODES[:, :20], BLOCKS, SCALE), "codes_NK2", "[24, 20]"),
    "blocks viewed as uint8": ((X, CODES, BLOCKS.view(torch.uint8), SCALE), "block_decode_scale_NG", "uint8 [24, 3]"),
    "blocks of another weight": ((X, CODES, BLOCKS[:20], SCALE), "[24, 3] for codes [24, 24]", "[20, 3]"),
    "blocks transposed": ((X, CODES, BLOCKS.T, SCALE), "block_decode_scale_NG", "[3, 24]"),
    "decode_scale in bf16": ((X, CODES, BLOCKS, SCALE.bfloat16()), "decode_scale float32", "bfloat16"),
    "decode_scale per row": ((X, CODES, BLOCKS, SCALE.expand(24)), "decode_scale", "float32 [24]"),
    "x too narrow": ((X[:, :32], CODES, BLOCKS, SCALE), "x [..., 48]", "float32 [3, 32]"),
    "x a number": ((X[0, 0], CODES, BLOCKS, SCALE), "x [..., 48]", "float32 []"),
    "x of integers": ((X.int(), CODES, BLOCKS, SCALE), "x in float16", "int32 [3, 48]"),
    "x elsewhere": ((X.to("meta"), CODES, BLOCKS, SCALE), "x on cpu", "x on meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_by_name(case: str, path: str) -> None:
    args, expected, got = REFUSED[case]
    if case == "x elsewhere":
        call = lambda: ops.quantized_linear._init_fn(*args)  # noqa: E731 - the dispatcher would go to the fake kernel
    else:
        call = lambda: ops.quantized_linear(*args)  # noqa: E731
    with pytest.raises(FormatError) as caught:
        call()
    assert caught.value.where == "qerl::quantized_linear"
    assert expected in caught.value.expected
    assert got in caught.value.got


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: ops.quantized_linear_dx(X, CODES, BLOCKS, SCALE), "qerl::quantized_linear_dx"),
        (lambda: ops.dequantize(CODES, BLOCKS, SCALE, torch.int8), "qerl::dequantize"),
        (lambda: ops.quantize(torch.zeros(4, 24)), "qerl::quantize"),
        (lambda: ops.fake_quantized_linear(torch.zeros(3, 24), torch.zeros(4, 24)), "qerl::quantize"),
        (lambda: ops.fake_quantized_linear(X, torch.zeros(4, 32)), "qerl::quantized_linear"),
    ],
)
def test_every_operator_checks(call: object, where: str) -> None:
    with pytest.raises(FormatError) as caught:
        call()
    assert caught.value.where == where


def test_the_located_sentence_survives_compilation() -> None:
    compiled = torch.compile(ops.quantized_linear, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"qerl::quantized_linear: expected x \[\.\.\., 48\]; got float32 \[3, 32\]"):
        compiled(X[:, :32], CODES, BLOCKS, SCALE)


def test_nan_in_a_weight_is_refused_in_the_graph_too() -> None:
    w = torch.zeros(4, 32)
    w[1, 2] = float("nan")
    with pytest.raises(FormatError, match="row 1, column 2"):
        ops.fake_quantized_linear(torch.zeros(1, 32), w)
