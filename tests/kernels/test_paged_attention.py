"""The paged operators on the CPU, in C++ and in torch, against float64 attention over gathered keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_compile.errors import FormatError
from qerl_compile.kernels import cpu_build, paged_cpu
from qerl_compile.kernels.paged_attention import paged_decode, paged_write
from tests.kernels.paged_oracle import NO_PAGE, error, expected, make_case, rounded_alike, same_bits, written

# Largest error over the largest output; one rounding of the output is half of it for the 16-bit types.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
LENGTHS = [1, 0, 16, 17, 33, 64, 65, 150, 0, 200]
# What the same source becomes elsewhere: AVX2 laptops, and the plain vector path that other CPUs take.
INSTRUCTION_SETS = {"this machine": "native", "AVX2": "x86-64-v3", "128-bit vectors": "x86-64"}


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Run the test with the C++ kernel and without it."""
    if request.param == "torch":
        monkeypatch.setattr(paged_cpu, "load", lambda: None)
    else:
        assert paged_cpu.load() is not None, "the tests need g++ or clang++"
    return request.param


def tiny(lengths, values):
    """One head of 16 equal dimensions, pages of two positions, scaling 0: the output is the mean of what is seen."""
    case = make_case(1, 1, 16, 2, lengths)
    case.scaling = 0.0
    for b, row in enumerate(values):
        for t, value in enumerate(row[:-1]):
            case.pages_v[case.table_BP[b, t // 2], 0, t % 2] = value
        case.v_BJD[b] = row[-1]
    return case


@pytest.mark.parametrize(
    ("window", "means"), [(0, [5, 3, 4]), (1, [5, 6, 7]), (2, [5, 4, 5.5]), (3, [5, 3, 4]), (9, [5, 3, 4])]
)
def test_without_scores_the_output_is_the_mean_of_the_window(path, window, means):
    case = tiny([1, 3, 4], [[5], [1, 2, 6], [4, 1, 4, 7]])
    case.window = window
    assert paged_decode(*case.args)[:, 0, 0].tolist() == pytest.approx(means, abs=1e-6)


def test_a_key_far_ahead_takes_everything(path):
    case = make_case(2, 1, 16, 4, [6])
    case.pages_k[case.table_BP[0, 0], 0, 1] = 100.0
    case.q_BHD[:] = 1.0
    case.scaling = 1.0
    value = case.pages_v[case.table_BP[0, 0], 0, 1].clone()
    assert torch.equal(paged_decode(*case.args)[0], value.expand(2, 16))


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(
    ("group", "heads_kv", "d"), [(1, 3, 64), (2, 2, 16), (3, 3, 64), (4, 2, 80), (5, 2, 128), (7, 1, 96), (5, 1, 256)]
)
def test_decode_is_attention_over_the_live_positions(path, group, heads_kv, d, page, dtype):
    for window in (0, 1, 20, 64, 1000):
        case = make_case(group * heads_kv, heads_kv, d, page, LENGTHS, window=window, dtype=dtype, shared=2)
        exact, (pages_k, pages_v) = expected(case), written(case)
        y = paged_decode(*case.args)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert error(y, exact) < LIMIT[dtype], window
        assert not y[1].any()
        assert not y[8].any()
        # the new position and nothing else, NaN poison and shared pages included
        assert same_bits(case.pages_k, pages_k)
        assert same_bits(case.pages_v, pages_v)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("rotary, bias", [(True, False), (False, True), (True, True)])
def test_bias_and_rotary_embedding_come_before_attention_and_before_the_page(path, rotary, bias, dtype):
    for group, heads_kv, d in ((3, 3, 64), (4, 2, 80), (7, 1, 16)):
        case = make_case(group * heads_kv, heads_kv, d, 16, LENGTHS, dtype=dtype, rotary=rotary, bias=bias)
        exact, (pages_k, pages_v) = expected(case), written(case)
        plain = paged_decode(*case.copy().args[:9])
        y = paged_decode(*case.args)
        assert error(y, exact) < LIMIT[dtype]
        assert not torch.allclose(y, plain, atol=0.1)  # it matters
        assert rounded_alike(case.pages_k, pages_k)
        assert rounded_alike(case.pages_v, pages_v)


def test_a_quarter_turn_swaps_the_halves_and_changes_a_sign(path):
    """cos 0, sin 1: (low, high) becomes (-high, low), in q and in the key that is stored."""
    case = make_case(1, 1, 16, 4, [1], rotary=True)
    case.cos_BD[:], case.sin_BD[:] = 0.0, 1.0
    case.k_BJD[:] = torch.arange(16.0)
    paged_decode(*case.args)
    stored = case.pages_k[case.table_BP[0, 0], 0, 0].tolist()
    assert stored == [-8, -9, -10, -11, -12, -13, -14, -15, 0, 1, 2, 3, 4, 5, 6, 7]


def test_one_line_of_cos_and_sin_serves_all_rows(path):
    case = make_case(4, 2, 16, 16, [20, 30], rotary=True)
    case.cos_BD, case.sin_BD = case.cos_BD[:1], case.sin_BD[:1]
    many = case.copy()
    many.cos_BD, many.sin_BD = (x.repeat(2, 1) for x in (case.cos_BD, case.sin_BD))
    assert same_bits(paged_decode(*case.args), paged_decode(*many.args))


@pytest.mark.parametrize(("page", "d"), [(1, 16), (5, 16), (48, 32), (100, 48), (128, 16)])
def test_any_page_size_serves(path, page, d):
    case = make_case(3, 1, d, page, LENGTHS, window=70)
    exact = expected(case)
    assert error(paged_decode(*case.args), exact) < 2e-6


@pytest.mark.parametrize("march", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_agrees(march, dtype):
    option = f"-march={INSTRUCTION_SETS[march]}"
    flags = tuple(option if flag.startswith("-march") else flag for flag in cpu_build.FLAGS)
    kernels = paged_cpu.PagedKernels(cpu_build.build(paged_cpu.SOURCE, flags))
    for heads, heads_kv, d in ((9, 3, 64), (7, 1, 80), (2, 2, 16)):
        case = make_case(heads, heads_kv, d, 16, LENGTHS, window=50, dtype=dtype)
        exact = expected(case)
        assert error(kernels.decode(*case.args[:9]), exact) < LIMIT[dtype]


def test_weights_are_accurate_from_one_to_nothing():
    # Scores fall by 0.37 a position: weights from 1 to 2^-107, each beside a value that undoes it.
    case = make_case(1, 1, 16, 64, [200])
    case.q_BHD[:], case.scaling = 1.0, 1 / 16
    fall = -0.37 * torch.arange(200.0)
    t = torch.arange(199)
    at = case.table_BP[0].long()[t // 64], slice(None), t % 64
    case.pages_k[at] = fall[:-1, None, None].expand(-1, 1, 16)
    case.k_BJD[:] = fall[-1]
    values = torch.zeros(199, 1, 16)
    values[torch.arange(16) * 12, 0, torch.arange(16)] = 1.0
    case.pages_v[at] = values
    exact = expected(case)
    y = paged_decode(*case.args).double()
    assert ((y - exact) / exact).abs().max() < 1e-5  # of that, the score itself is 74 * 2^-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bit_by_bit_in_any_batch(dtype):
    for window in (0, 20):
        case = make_case(9, 3, 64, 16, LENGTHS, window=window, dtype=dtype)
        alone = torch.cat([paged_decode(*case.row(b).args) for b in range(len(LENGTHS))])
        assert same_bits(paged_decode(*case.args), alone)


def test_threads_and_repetition_give_equal_bits(monkeypatch):
    case = make_case(9, 3, 64, 16, LENGTHS * 4, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu_build, "threads", lambda work: 1)
    first, once = case.copy(), paged_decode(*case.args)
    for threads in (2, 3, 50):
        monkeypatch.setattr(cpu_build, "threads", lambda work, threads=threads: threads)
        again = first.copy()
        assert same_bits(paged_decode(*again.args), once)
        assert same_bits(again.pages_k, case.pages_k)


def test_a_nan_stays_in_its_row(path):
    case = make_case(4, 2, 16, 16, [20, 30, 40])
    case.q_BHD[1, 2, 3] = float("nan")
    y = paged_decode(*case.args)
    assert y[1, 2].isnan().all()
    assert y.isnan().sum() == 16


def test_strides_are_followed(path):
    case = make_case(6, 2, 32, 16, LENGTHS)
    plain = paged_decode(*case.copy().args)
    both = torch.stack([case.pages_k, case.pages_v], 1)  # one allocation for keys and values
    case.pages_k, case.pages_v = both.unbind(1)
    case.q_BHD = case.q_BHD.mT.contiguous().mT
    case.k_BJD = case.k_BJD.transpose(0, 1).contiguous().transpose(0, 1)
    case.table_BP = torch.nn.functional.pad(case.table_BP, (0, 3), value=NO_PAGE)[:, :-3]
    torch.testing.assert_close(paged_decode(*case.args), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize(("page", "d"), [(16, 64), (64, 80), (7, 24)])
def test_write_puts_live_positions_in_their_pages_and_nothing_elsewhere(path, page, d, dtype):
    lengths = [0, 1, 16, 17, 40, 0, 40]
    case = make_case(2, 2, d, page, lengths, dtype=dtype)
    fused = torch.full((len(lengths), 40, 2, 2 * d), float("inf"), dtype=dtype)  # padding must not be written
    for b, length in enumerate(lengths):
        fused[b, :length] = torch.randn(length, 2, 2 * d).to(dtype)
    k_BJTD, v_BJTD = fused.transpose(1, 2).split(d, dim=-1)
    pages_k, pages_v = case.pages_k.clone(), case.pages_v.clone()
    for b, length in enumerate(lengths):
        for t in range(length):
            pages_k[case.table_BP[b, t // page], :, t % page] = k_BJTD[b, :, t]
            pages_v[case.table_BP[b, t // page], :, t % page] = v_BJTD[b, :, t]
    paged_write(k_BJTD, v_BJTD, case.pages_k, case.pages_v, case.table_BP, case.length_B)
    assert same_bits(case.pages_k, pages_k)
    assert same_bits(case.pages_v, pages_v)


def test_prefill_then_decode_is_attention_over_the_whole_sequence(path):
    rows, heads, heads_kv, d, total = 3, 6, 2, 32, 37
    q, k, v = (torch.randn(rows, h, total, d) for h in (heads, heads_kv, heads_kv))
    prompt = torch.tensor([5, 17, 30], dtype=torch.int32)
    case = make_case(heads, heads_kv, d, 16, [total] * rows)
    for pages in (case.pages_k, case.pages_v):
        pages.fill_(float("nan"))
    paged_write(k[:, :, :30], v[:, :, :30], case.pages_k, case.pages_v, case.table_BP, prompt)
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for step in range(7):
        at = prompt.long() + step
        new = [x[torch.arange(rows), :, at] for x in (q, k, v)]
        y = paged_decode(*new, case.pages_k, case.pages_v, case.table_BP, prompt + step + 1, d**-0.5, 0)
        torch.testing.assert_close(y, whole[torch.arange(rows), :, at], rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    group=st.integers(1, 9),
    heads_kv=st.integers(1, 3),
    lanes=st.integers(1, 5),
    page=st.integers(1, 70),
    window=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shared=st.integers(0, 2),
)
def test_any_shape_agrees_with_float64(lengths, group, heads_kv, lanes, page, window, dtype, shared):
    lengths[0] = lengths[0] or 1
    case = make_case(group * heads_kv, heads_kv, 16 * lanes, page, lengths, window=window, dtype=dtype, shared=shared)
    exact, (pages_k, pages_v) = expected(case), written(case)
    assert error(paged_decode(*case.args), exact) < LIMIT[dtype]
    assert same_bits(case.pages_k, pages_k)
    assert same_bits(case.pages_v, pages_v)


@pytest.mark.parametrize("rows", [1, 0])
def test_a_batch_of_idle_or_no_rows_does_nothing(path, rows):
    case = make_case(4, 2, 16, 16, [20])
    case.length_B[0] = 0
    case.table_BP[:] = NO_PAGE
    before = case.pages_k.clone()
    args = [x[:rows] if i in (0, 1, 2, 5, 6) else x for i, x in enumerate(case.args)]
    assert paged_decode(*args).tolist() == torch.zeros(rows, 4, 16).tolist()
    assert same_bits(case.pages_k, before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"length_B": [65, 3]}, r"row 0: expected a length from 0 to 64 .* got length 65"),
        ({"length_B": [20, -1]}, r"row 1: expected a length from 0 to 64 .* got length -1"),
        ({"length_B": [20, 34]}, rf"row 1: .* page numbers from 0 to 9; got length 34, pages \[\d+, {NO_PAGE}"),
    ],
)
def test_lengths_and_page_numbers_out_of_range_are_refused_before_anything_is_written(path, change, sentence):
    case = make_case(4, 2, 16, 16, [40, 16])
    case.length_B[:] = torch.tensor(change["length_B"])
    before = case.pages_k.clone()
    with pytest.raises(FormatError, match=sentence):
        paged_decode(*case.args)
    assert same_bits(case.pages_k, before)
    k_BJTD = torch.zeros(2, 2, 64, 16)
    with pytest.raises(FormatError, match=sentence):
        paged_write(k_BJTD, k_BJTD, case.pages_k, case.pages_v, case.table_BP, case.length_B)
    assert same_bits(case.pages_k, before)


def test_a_page_before_the_window_may_be_gone(path):
    case = make_case(4, 2, 16, 16, [40], window=8)
    exact = expected(case)
    case.table_BP[0, :2] = NO_PAGE  # positions 0 to 31; the window is 32 to 39
    assert error(paged_decode(*case.args), exact) < 2e-6


def test_write_refuses_more_positions_than_it_was_given(path):
    case = make_case(4, 2, 16, 16, [40])
    k_BJTD = torch.zeros(1, 2, 39, 16)
    with pytest.raises(FormatError, match=r"a length from 0 to 39 .* got length 40"):
        paged_write(k_BJTD, k_BJTD, case.pages_k, case.pages_v, case.table_BP, case.length_B)


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("q_BHD", lambda x: x[:, :3], r"q \[B, H, 16\] with H a multiple of 2"),
        ("q_BHD", lambda x: x.double(), "dtype and device as the pages"),
        ("q_BHD", lambda x: x[:1], "2 rows in every tensor"),
        ("k_BJD", lambda x: x[:, :1], r"k \[B, 2, 16\]"),
        ("v_BJD", lambda x: x[:, :, None], r"v \[B, 2, 16\]"),
        ("v_BJD", lambda x: x.bfloat16(), "v .* dtype and device as the pages"),
        ("pages_k", lambda x: x.mT.contiguous().mT, "each page contiguous"),
        ("pages_v", lambda x: x[1:], "pages_k and pages_v alike"),
        ("pages_v", lambda x: x.double(), "pages_k and pages_v alike"),
        ("table_BP", lambda x: x.long(), r"table_BP int32 \[B, P\]"),
        ("table_BP", lambda x: x[:1], "2 rows in every tensor"),
        ("length_B", lambda x: x.long(), r"length_B int32 \[B\]"),
        ("length_B", lambda x: x[:, None], r"length_B int32 \[B\]"),
        ("window", lambda x: -1, "window >= 0"),
        ("cos_BD", lambda x: None, r"cos and sin \[B or 1, 16\] .* or neither; got None and"),
        ("sin_BD", lambda x: x[:, :8], r"cos and sin \[B or 1, 16\]"),
        ("sin_BD", lambda x: x.double(), "dtype and device as q"),
        ("cos_BD", lambda x: x.repeat(2, 1)[:3], "2 rows in every tensor"),
        ("bias_XD", lambda x: x[:6], r"bias \[8, 16\] for the heads of q, k and v"),
        ("bias_XD", lambda x: x.mT.contiguous().mT, "contiguous"),
        ("bias_XD", lambda x: x.bfloat16(), "dtype and device as q"),
    ],
)
def test_what_does_not_fit_is_named(name, wrong, sentence):
    case = make_case(4, 2, 16, 16, [20, 30], rotary=True, bias=True)
    setattr(case, name, wrong(getattr(case, name)))
    with pytest.raises(FormatError, match=sentence):
        paged_decode(*case.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operators_keep_what_their_schema_promises(dtype):
    case = make_case(4, 2, 16, 16, [20, 0, 30], dtype=dtype)
    for cache in (case.pages_k, case.pages_v):
        cache.nan_to_num_()  # opcheck compares with ==
    torch.library.opcheck(paged_decode, case.args[:9])
    extra = make_case(4, 2, 16, 16, [1], dtype=dtype, rotary=True, bias=True)
    torch.library.opcheck(paged_decode, (*case.args[:9], extra.cos_BD, extra.sin_BD, extra.bias_XD))
    new = torch.randn(3, 2, 30, 16).to(dtype)
    torch.library.opcheck(paged_write, (new, new, *case.args[3:7]))


def test_a_compiled_step_writes_the_callers_pages_and_one_graph_serves_all_batches():
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import run_and_get_code

    def step(x, pages_k, pages_v, table, length):
        q, k, v = ((x * 2).unflatten(1, (8, 16))).split([4, 2, 2], 1)
        return paged_decode(q + 1, k - 1, v, pages_k, pages_v, table, length, 0.1, 0) * 3

    graphs: list[object] = []
    codes: list[str] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    case = make_case(4, 2, 16, 16, [20, 33, 40, 17, 64])
    for rows in (2, 5, 3):
        x = torch.randn(rows, 128)
        args = x, case.pages_k, case.pages_v, case.table_BP[:rows], case.length_B[:rows]
        for i in (0, 3, 4):
            torch._dynamo.mark_dynamic(args[i], 0)
        eager = case.copy()
        want = step(x, eager.pages_k, eager.pages_v, *args[3:])
        with torch.no_grad():
            if graphs:
                got = compiled(*args)
            else:
                got, codes = run_and_get_code(compiled, *args)
        torch.testing.assert_close(got, want)
        assert same_bits(case.pages_k, eager.pages_k)
        assert same_bits(case.pages_v, eager.pages_v)
    assert len(graphs) == len(codes) == 1
    (call,) = [line for line in codes[0].splitlines() if "ops.qerl.paged_decode.default(" in line and "=" in line]
    names = call.split("default(")[1].split(", ")
    # the caller's tensors themselves, not copies that would be written back: the cache is most of the memory
    assert all(name.startswith("arg") for name in names[3:5]), call
