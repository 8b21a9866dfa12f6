"""The cache gives what no cache gives, counts its memory, and never outlives or outlasts the weight it stands for."""

import gc

import pytest
import torch

from qerl_compile.kernels import cpu, ops, weight_cache
from tests.kernels.oracle import Weight, make_weight

MANY = cpu.FEW_ROWS + 8


def forward_and_dx(weight: Weight, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    n, k = weight.packed.shape
    x, dy = torch.randn(MANY, k).to(dtype), torch.randn(MANY, n).to(dtype)
    return cpu.linear(x, *weight.args), cpu.linear_dx(dy, *weight.args)


def test_it_is_off_by_default() -> None:
    assert weight_cache.active() is None
    forward_and_dx(make_weight(24, 48))
    assert weight_cache.active() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cached_results_equal_uncached_ones(path: str, dtype: torch.dtype) -> None:
    weight = make_weight(24, 48)
    expected = forward_and_dx(weight, dtype)
    with weight_cache.enabled():
        for _ in range(2):
            for got, want in zip(forward_and_dx(weight, dtype), expected, strict=True):
                assert torch.equal(got, want)


def test_forward_and_dx_share_one_entry_and_it_is_counted(path: str) -> None:
    weight = make_weight(24, 48)
    with weight_cache.enabled() as cache:
        forward_and_dx(weight, torch.bfloat16)
        assert cache is weight_cache.active()
        assert cache.nbytes == 24 * 48 * 2
        forward_and_dx(weight, torch.bfloat16)
        assert cache.nbytes == 24 * 48 * 2
        forward_and_dx(weight, torch.float32)
        assert cache.nbytes == 24 * 48 * (2 + 4)
    assert weight_cache.active() is None
    assert cache.nbytes == 0


def test_few_rows_fill_it_only_without_the_kernel(path: str) -> None:
    with weight_cache.enabled() as cache:
        cpu.linear(torch.randn(1, 48), *make_weight(24, 48).args)
        weight = make_weight(24, 48)
        cpu.linear(torch.randn(1, 48), *weight.args)
        assert cache.nbytes == (0 if path == "native" else 24 * 48 * 4)


def test_a_dead_weight_leaves() -> None:
    with weight_cache.enabled() as cache:
        weight = make_weight(24, 48)
        forward_and_dx(weight)
        assert cache.nbytes > 0
        del weight
        gc.collect()
        assert cache.nbytes == 0


@pytest.mark.parametrize("changed", [0, 1])
def test_an_in_place_change_is_seen(path: str, changed: int) -> None:
    weight, other = make_weight(24, 48, seed=1), make_weight(24, 48, seed=2)
    with weight_cache.enabled() as cache:
        forward_and_dx(weight)
        weight.args[changed].copy_(other.args[changed])
        got = forward_and_dx(weight)
        cached_bytes = cache.nbytes
        products = cache.get(*weight.args[:2], torch.float32, pytest.fail)  # and the new one is kept
        assert products.shape == (24, 48)
    assert cached_bytes == 24 * 48 * 4  # replaced, not added
    for a, b in zip(got, forward_and_dx(weight), strict=True):
        assert torch.equal(a, b)


def test_a_load_into_the_same_buffers_is_seen() -> None:
    weight, other = make_weight(24, 48, seed=1), make_weight(24, 48, seed=2)
    module = torch.nn.Module()
    for name, tensor in zip(("codes", "blocks", "decode_scale"), weight.args, strict=True):
        module.register_buffer(name, tensor)
    names = dict(zip(("codes", "blocks", "decode_scale"), other.args, strict=True))
    with weight_cache.enabled():
        forward_and_dx(weight)
        module.load_state_dict(names)
        y = cpu.linear(torch.ones(MANY, 48), module.codes, module.blocks, module.decode_scale)
    assert torch.equal(y, cpu.linear(torch.ones(MANY, 48), *other.args))


def test_the_matrix_scale_is_not_cached() -> None:
    codes, blocks, decode_scale = make_weight(24, 48).args
    x = torch.randn(MANY, 48)
    with weight_cache.enabled():
        y = cpu.linear(x, codes, blocks, decode_scale)
        assert torch.equal(cpu.linear(x, codes, blocks, decode_scale * 2), y * 2)


def test_other_block_scales_for_the_same_codes_are_another_weight() -> None:
    codes, blocks, decode_scale = make_weight(24, 48).args
    other = (blocks.float() * 2).to(torch.float8_e4m3fn)
    x = torch.randn(MANY, 48)
    with weight_cache.enabled():
        cpu.linear(x, codes, blocks, decode_scale)
        got = cpu.linear(x, codes, other, decode_scale)
    assert torch.equal(got, cpu.linear(x, codes, other, decode_scale))


def test_inference_tensors_are_not_cached() -> None:
    with torch.inference_mode():
        weight = make_weight(24, 48)
        with weight_cache.enabled() as cache:
            forward_and_dx(weight)
            assert cache.nbytes == 0


def test_leaving_restores_the_outer_cache_even_after_an_error() -> None:
    with weight_cache.enabled() as outer:
        weight = make_weight(24, 48)
        with pytest.raises(KeyError), weight_cache.enabled() as inner:
            forward_and_dx(weight)
            raise KeyError
        assert weight_cache.active() is outer
        assert inner.nbytes == 0


def test_compiled_training_steps_decode_each_weight_once() -> None:
    weight = make_weight(24, 48)
    module = torch.nn.Module()
    for name, tensor in zip(("codes", "blocks", "decode_scale"), weight.args, strict=True):
        module.register_buffer(name, tensor)
    module.forward = lambda x: ops.quantized_linear(x.sin(), module.codes, module.blocks, module.decode_scale)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    decoded = []
    get = weight_cache.WeightCache.get

    def counting(self, codes, blocks, dtype, decode):
        return get(self, codes, blocks, dtype, lambda: decoded.append(1) or decode())

    with pytest.MonkeyPatch.context() as monkeypatch, weight_cache.enabled():
        monkeypatch.setattr(weight_cache.WeightCache, "get", counting)
        for _ in range(3):
            compiled(torch.randn(MANY, 48, requires_grad=True)).sum().backward()
    assert decoded == [1]
