"""The CPU form against float64: values, shapes, dtypes, bits, memory, with and without the C++ kernel."""

import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qerl_compile.kernels import cpu, cpu_native, cpu_products, reference
from tests.kernels.oracle import assert_rounded_once, hide_native, make_weight

FEW, MANY = cpu.FEW_ROWS, cpu.FEW_ROWS + 6
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_a_hand_packed_row() -> None:
    # Codes 0..15 in order, block scale 2 (E4M3 byte 0x40), matrix scale 1/2: the values of E2M1 themselves.
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    blocks = torch.tensor([[0x40]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    half = torch.tensor(0.5)
    assert cpu.linear(torch.eye(16), codes, blocks, half).flatten().tolist() == values
    assert cpu.linear_dx(torch.tensor([2.0]), codes, blocks, half).tolist() == [2 * v for v in values]
    assert cpu.dequantize(codes, blocks, half, torch.bfloat16).tolist() == [values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 13, FEW, FEW + 1])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (3, 16), (17, 48), (64, 64), (37, 80)])
def test_forward_rounds_once(path: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    weight = make_weight(n, k)
    x = torch.randn(m, k).to(dtype)
    y = cpu.linear(x, *weight.args)
    assert y.dtype == dtype
    assert_rounded_once(y, x, weight.exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (3, 17, 48), (MANY, 37, 80)])
def test_dx_rounds_once(path: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    weight = make_weight(n, k)
    dy = torch.randn(m, n).to(dtype)
    dx = cpu.linear_dx(dy, *weight.args)
    assert dx.dtype == dtype
    assert_rounded_once(dx, dy, weight.exact.T)


@given(
    m=st.integers(0, MANY),
    n=st.integers(1, 40),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    native=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_agrees_with_float64(
    m: int, n: int, blocks: int, dtype: torch.dtype, native: bool, seed: int
) -> None:
    weight = make_weight(n, 16 * blocks, seed)
    x, dy = torch.randn(m, 16 * blocks).to(dtype), torch.randn(m, n).to(dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not native:
            hide_native(monkeypatch)
        assert_rounded_once(cpu.linear(x, *weight.args), x, weight.exact)
        assert_rounded_once(cpu.linear_dx(dy, *weight.args), dy, weight.exact.T)


def test_the_reference_rounds_once_too() -> None:
    weight = make_weight(17, 48)
    for dtype in DTYPES:
        x, dy = torch.randn(3, 48).to(dtype), torch.randn(3, 17).to(dtype)
        assert_rounded_once(reference.quantized_linear(x, *weight.args), x, weight.exact)
        assert_rounded_once(reference.quantized_linear_dx(dy, *weight.args), dy, weight.exact.T)


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (1, 48), (2, 3, 48), (2, 3, 4, 48)])
def test_leading_dimensions_are_kept(path: str, shape: tuple[int, ...]) -> None:
    weight = make_weight(24, 48)
    x = torch.randn(shape)
    y = cpu.linear(x, *weight.args)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y, (x.double() @ weight.exact.T).float())
    assert cpu.linear_dx(y, *weight.args).shape == shape


@pytest.mark.parametrize("m", [4, MANY])
def test_strides_do_not_matter(path: str, m: int) -> None:
    weight = make_weight(24, 48)
    transposed = torch.randn(48, m).T
    every_second = torch.randn(m, 96)[:, ::2]
    expanded = torch.randn(1, 48).expand(m, 48)
    for x in (transposed, every_second, expanded):
        assert torch.equal(cpu.linear(x, *weight.args), cpu.linear(x.contiguous(), *weight.args))
    codes, blocks, decode_scale = weight.args
    wide_codes = torch.cat([codes, codes], 1)[:, : codes.shape[1]]
    wide_blocks = torch.cat([blocks.view(torch.uint8)] * 2, 1)[:, : blocks.shape[1]].view(torch.float8_e4m3fn)
    assert torch.equal(
        cpu.linear(transposed, wide_codes, wide_blocks, decode_scale), cpu.linear(transposed, *weight.args)
    )


def test_decode_scale_may_have_zero_or_one_dimension(path: str) -> None:
    codes, blocks, decode_scale = make_weight(24, 48).args
    x = torch.randn(4, 48)
    assert torch.equal(cpu.linear(x, codes, blocks, decode_scale), cpu.linear(x, codes, blocks, decode_scale.view(1)))


@pytest.mark.parametrize("m", [7, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_calls_give_equal_bits(path: str, m: int, dtype: torch.dtype) -> None:
    weight = make_weight(70, 80)
    x, dy = torch.randn(m, 80).to(dtype), torch.randn(m, 70).to(dtype)
    y, dx = cpu.linear(x, *weight.args), cpu.linear_dx(dy, *weight.args)
    for _ in range(3):
        assert torch.equal(cpu.linear(x.clone(), *weight.args), y)
        assert torch.equal(cpu.linear_dx(dy.clone(), *weight.args), dx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_gives_equal_bits_in_every_small_batch(dtype: torch.dtype) -> None:
    weight = make_weight(37, 144)
    x = torch.randn(cpu.FEW_ROWS, 144).to(dtype)
    alone = torch.cat([cpu.linear(row[None], *weight.args) for row in x])
    for m in range(1, cpu.FEW_ROWS + 1):
        assert torch.equal(cpu.linear(x[:m], *weight.args), alone[:m])


@pytest.mark.parametrize("m", [5, MANY])
def test_threads_give_equal_bits(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    weight = make_weight(37, 144)
    x = torch.randn(m, 144)
    y = cpu.linear(x, *weight.args)
    for threads in (2, 3, 50):
        monkeypatch.setattr(cpu_native, "threads", lambda work, threads=threads: threads)
        assert torch.equal(cpu.linear(x, *weight.args), y)


def test_calls_from_several_threads_do_not_share_scratch(path: str) -> None:
    cases = [(make_weight(24 + i, 48, seed=i), torch.randn(MANY, 48)) for i in range(4)]
    expected = [cpu.linear(x, *weight.args) for weight, x in cases]
    wrong = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(cpu.linear(cases[i][1], *cases[i][0].args), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("m", [5, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_smaller_than_the_weight_change_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch, m: int, dtype: torch.dtype
) -> None:
    weight = make_weight(37, 80)
    x, dy = torch.randn(m, 80).to(dtype), torch.randn(m, 37).to(dtype)
    w = cpu.dequantize(*weight.args, dtype)
    monkeypatch.setattr(cpu, "PIECE_ELEMENTS", 300)  # three rows of K, or less than one block of columns
    assert_rounded_once(cpu.linear(x, *weight.args), x, weight.exact)
    assert_rounded_once(cpu.linear_dx(dy, *weight.args), dy, weight.exact.T)
    assert torch.equal(cpu.dequantize(*weight.args, dtype), w)


def test_uninitialized_memory_is_never_read(path: str) -> None:
    weight = make_weight(37, 80)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for m in (0, 5, MANY):
            for dtype in DTYPES:
                x, dy = torch.randn(m, 80).to(dtype), torch.randn(m, 37).to(dtype)
                assert cpu.linear(x, *weight.args).isfinite().all()
                assert cpu.linear_dx(dy, *weight.args).isfinite().all()
        assert cpu.dequantize(*weight.args, torch.float32).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_flushing_subnormals_changes_nothing(path: str) -> None:
    weight = make_weight(37, 80)
    x = torch.randn(MANY, 80)
    expected = [cpu.linear(x[:m].to(dtype), *weight.args) for m in (5, MANY) for dtype in DTYPES]
    cpu_products.product_pairs.cache_clear()
    assert torch.set_flush_denormal(True)
    try:
        got = [cpu.linear(x[:m].to(dtype), *weight.args) for m in (5, MANY) for dtype in DTYPES]
    finally:
        torch.set_flush_denormal(False)
        cpu_products.product_pairs.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("m", [5, MANY])
def test_nan_and_inf_in_x_reach_y(path: str, m: int) -> None:
    weight = make_weight(24, 48)
    x = torch.randn(m, 48, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y = cpu.linear(x, *weight.args)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2:].isfinite().all()


def test_float16_sums_beyond_its_range_survive() -> None:
    # 512 · 2688 = 1.4e6 overflows float16 before decode_scale brings it back to 512.
    codes = torch.full((1, 256), 0x77, dtype=torch.uint8)
    blocks = torch.full((1, 32), 448.0).to(torch.float8_e4m3fn)
    for m in (1, MANY):
        y = cpu.linear(torch.ones(m, 512, dtype=torch.float16), codes, blocks, torch.tensor(1 / 2688))
        assert y.unique().tolist() == [512.0]


class Created(TorchDispatchMode):
    """Records every tensor with memory of its own that is made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_by_storage: dict[int, int] = {}
        self.dtypes: set[torch.dtype] = set()
        self.keep: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim():
            self.keep.append(result)
            self.dtypes.add(result.dtype)
            storage = result.untyped_storage()
            self.bytes_by_storage.setdefault(storage.data_ptr(), storage.nbytes())
        return result


@pytest.mark.parametrize("m", [4, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_int64_tensor_is_made(path: str, m: int, dtype: torch.dtype) -> None:
    weight = make_weight(64, 96)
    cpu_products.product_pairs()
    with Created() as created:
        cpu.linear(torch.randn(m, 96).to(dtype), *weight.args)
        cpu.linear_dx(torch.randn(m, 64).to(dtype), *weight.args)
        cpu.dequantize(*weight.args, dtype)
    assert torch.int64 not in created.dtypes
    assert created.dtypes


def test_few_rows_make_nothing_but_y() -> None:
    weight = make_weight(64, 96)
    x = torch.randn(4, 96)
    with Created() as created:
        cpu.linear(x, *weight.args)
    own = {x.data_ptr(), *(t.data_ptr() for t in weight.args)}
    assert [size for key, size in created.bytes_by_storage.items() if key not in own] == [4 * 64 * 4]


@pytest.mark.parametrize("operator", [cpu.linear, cpu.linear_dx])
def test_many_rows_make_y_and_one_piece_at_a_time(path: str, monkeypatch: pytest.MonkeyPatch, operator: object) -> None:
    monkeypatch.setattr(cpu, "PIECE_ELEMENTS", 2 * 16 * 96)
    weight = make_weight(96, 96)
    x = torch.randn(MANY, 96)
    with Created() as created:
        operator(x, *weight.args)
    own = {x.data_ptr(), weight.packed.global_scale.data_ptr(), cpu_products.product_pairs().data_ptr()}
    own |= {t.data_ptr() for t in weight.args}
    made = sorted(size for key, size in created.bytes_by_storage.items() if key not in own)
    assert made[-1] == max(MANY * 96 * 4, 2 * 16 * 96 * 4)
    assert sum(size == 2 * 16 * 96 * 4 for size in made) >= 3

    alive = []
    decode = cpu._decode

    def one_at_a_time(*args: object) -> Tensor:
        assert [piece for piece in alive if piece() is not None] == []
        result = decode(*args)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(cpu, "_decode", one_at_a_time)
    operator(x, *weight.args)
    assert len(alive) == 3


def test_without_compiler_temporaries_are_bounded_by_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_native(monkeypatch)
    monkeypatch.setattr(cpu, "PIECE_ELEMENTS", 16 * 96)
    weight = make_weight(640, 96)
    cpu_products.product_pairs()
    x = torch.randn(2, 96, dtype=torch.bfloat16)
    with Created() as created:
        cpu.linear(x, *weight.args)
    own = {x.data_ptr(), *(t.data_ptr() for t in weight.args), cpu_products.product_pairs().data_ptr()}
    made = [size for key, size in created.bytes_by_storage.items() if key not in own]
    assert max(made) <= max(2 * 640 * 2, 16 * 96 * 2)  # y, or one piece: its int32 indices are as large as its products
