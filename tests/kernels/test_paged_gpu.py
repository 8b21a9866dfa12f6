"""The paged operators on a GPU: against float64, poisoned pages, run-to-run equality, graphs; and a table of times.

pytest tests/kernels/test_paged_gpu.py -s -k table       prints µs and GB/s of live keys and values
"""

# ruff: noqa: T201

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qerl_compile.kernels import flash_decode
from qerl_compile.kernels.paged_attention import paged_decode, paged_write
from tests.kernels.paged_oracle import Case, error, expected, make_case, rounded_alike, same_bits, written

# Largest error over the largest output. Weights are rounded to the values' dtype before they multiply.
LIMIT = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-13}
LENGTHS = [1, 0, 16, 17, 33, 64, 65, 150, 0, 200, 511, 1, 300]
ON_HOPPER = torch.cuda.get_device_capability()[0] >= 9
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count


def launch(case, **choice):
    return flash_decode.decode(*case.args, multiprocessors=MULTIPROCESSORS, choice=choice)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize(
    ("group", "heads_kv", "d", "page"),
    [
        (1, 3, 64, 16),
        (2, 2, 16, 64),
        (3, 3, 64, 64),
        (4, 2, 80, 64),
        (5, 8, 128, 64),
        (7, 4, 128, 16),
        (7, 1, 96, 16),
        (5, 1, 256, 64),
        (32, 1, 64, 64),
    ],
)
def test_decode_is_attention_over_the_live_positions_and_repeats_to_the_bit(group, heads_kv, d, page, dtype):
    for window in (0, 1, 130):
        case = make_case(
            group * heads_kv, heads_kv, d, page, LENGTHS, window=window, dtype=dtype, shared=2, device="cuda"
        )
        exact, (pages_k, pages_v) = expected(case), written(case)
        again = case.copy()
        poison = torch.full((1 << 22,), float("nan"), device="cuda")
        del poison  # outputs and partial results land here
        y = paged_decode(*case.args)
        assert error(y, exact) < LIMIT[dtype], window
        assert not y[1].any()
        assert not y[8].any()
        assert same_bits(case.pages_k, pages_k)
        assert same_bits(case.pages_v, pages_v)
        for _ in range(5):
            assert same_bits(paged_decode(*again.args), y)


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("rotary, bias", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("group", "heads_kv", "d"), [(7, 4, 128), (5, 8, 128), (3, 3, 64), (4, 2, 80), (1, 1, 256)])
def test_bias_and_rotary_embedding_come_before_attention_and_before_the_page(group, heads_kv, d, rotary, bias, dtype):
    case = make_case(group * heads_kv, heads_kv, d, 64, LENGTHS, dtype=dtype, device="cuda", rotary=rotary, bias=bias)
    exact, (pages_k, pages_v) = expected(case), written(case)
    again = case.copy()
    y = paged_decode(*case.args)
    assert error(y, exact) < LIMIT[dtype]
    assert rounded_alike(case.pages_k, pages_k)
    assert rounded_alike(case.pages_v, pages_v)
    for _ in range(3):
        assert same_bits(paged_decode(*again.args), y)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("dependent", [False, True] if ON_HOPPER else [False])
def test_every_form_of_the_launch(splits, dependent):
    forms = [(64, 4, 3), (32, 2, 4), (16, 4, 3), (32, 4, 2), (64, 4, 2), (64, 4, 4), (64, 8, 3), (128, 4, 2)]
    for tile, warps, stages in forms[: 8 if splits == 3 else 2]:  # each compiles for seconds
        case = make_case(35, 5, 128, 64, LENGTHS, window=100, dtype=torch.bfloat16, device="cuda")
        exact = expected(case)
        choice = {"TILE": tile, "num_warps": warps, "num_stages": stages, "splits": splits, "dependent": dependent}
        for _ in range(4):  # the first two launches are Triton's, the others prepared ones
            assert error(launch(case, **choice), exact) < LIMIT[torch.bfloat16], choice


def test_a_row_is_the_same_bit_by_bit_in_any_batch_that_is_split_alike():
    case = make_case(40, 8, 128, 64, LENGTHS, dtype=torch.bfloat16, device="cuda")
    for splits in (1, 3):
        alone = torch.cat([launch(case.row(b), splits=splits) for b in range(len(LENGTHS))])
        assert same_bits(launch(case, splits=splits), alone)


@pytest.mark.parametrize("rows", [1, 5, 64, 256])
def test_a_graph_follows_lengths_tables_and_idle_rows(rows):
    lengths = torch.randint(0, 300, (rows,)).tolist()
    lengths[0] = 300
    case = make_case(28, 4, 128, 64, lengths, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):
        paged_decode(*case.copy().args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = paged_decode(*case.args)
    for turn in range(5):
        other = make_case(28, 4, 128, 64, lengths, dtype=torch.bfloat16, device="cuda")
        for name in ("q_BHD", "k_BJD", "v_BJD", "pages_k", "pages_v", "table_BP", "length_B"):
            getattr(case, name).copy_(getattr(other, name))
        if turn % 2:
            case.length_B[1:].random_(0, 300).clamp_(max=other.length_B[1:])
        exact, (pages_k, pages_v) = expected(case), written(case)
        graph.replay()
        assert error(y, exact) < LIMIT[torch.bfloat16]
        assert same_bits(case.pages_k, pages_k)
        assert same_bits(case.pages_v, pages_v)
        lengths = lengths[:1] + torch.randint(0, 300, (rows - 1,)).tolist()


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize(("page", "d"), [(16, 64), (64, 80), (64, 128), (7, 24)])
def test_write_puts_live_positions_in_their_pages_and_nothing_elsewhere(page, d, dtype):
    lengths = [0, 1, 16, 17, 40, 0, 700]
    case = make_case(2, 2, d, page, lengths, dtype=dtype, device="cuda")
    fused = torch.full((len(lengths), 700, 2, 2 * d), float("inf"), dtype=dtype, device="cuda")
    for b, length in enumerate(lengths):
        fused[b, :length] = torch.randn(length, 2, 2 * d, device="cuda").to(dtype)
    k_BJTD, v_BJTD = fused.transpose(1, 2).split(d, dim=-1)
    pages_k, pages_v = case.pages_k.clone(), case.pages_v.clone()
    for b, length in enumerate(lengths):
        t = torch.arange(length, device="cuda")
        at = case.table_BP[b].long()[t // page], slice(None), t % page
        pages_k[at], pages_v[at] = k_BJTD[b, :, :length].transpose(0, 1), v_BJTD[b, :, :length].transpose(0, 1)
    paged_write(k_BJTD, v_BJTD, case.pages_k, case.pages_v, case.table_BP, case.length_B)
    assert same_bits(case.pages_k, pages_k)
    assert same_bits(case.pages_v, pages_v)


def test_pages_beyond_two_to_the_31_elements_are_reached():
    pages, heads_kv, page, d = 40000, 8, 64, 128  # 2.6e9 elements, 5.2 GB each
    case = make_case(40, heads_kv, d, page, [129], dtype=torch.bfloat16, device="cuda")
    small = case.copy()
    far = torch.tensor([pages - 3, pages - 1, pages - 2], device="cuda")
    for name in ("pages_k", "pages_v"):
        large = torch.empty(pages, heads_kv, page, d, dtype=torch.bfloat16, device="cuda")
        large[far] = getattr(case, name)[case.table_BP[0, :3].long()]
        setattr(case, name, large)
    case.table_BP = case.table_BP.clone()
    case.table_BP[0, :3] = far
    assert same_bits(paged_decode(*case.args), paged_decode(*small.args))
    assert same_bits(case.pages_k[far[2]], small.pages_k[small.table_BP[0, 2]])


def live_cases(rows, heads, heads_kv, d, lengths, copies, capacity=1024, page=64):
    """Layers of one cache, as the engine has them: pages in random order, one table for all layers."""
    per_row = capacity // page
    table = torch.randperm(rows * per_row, device="cuda").int().view(rows, per_row)
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    for _ in range(copies):
        k, v = (torch.randn(rows * per_row, heads_kv, page, d, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        fused = torch.randn(rows, (heads + 2 * heads_kv) * d, dtype=torch.bfloat16, device="cuda")
        q, new_k, new_v = fused.unflatten(1, (-1, d)).split([heads, heads_kv, heads_kv], 1)
        yield Case(q, new_k, new_v, k, v, table, length, d**-0.5, 0)


def test_table_of_times():
    from benchmarks.gpu_timing import Capture, GpuClock, interleaved

    clock = GpuClock()
    forms = {
        "default": {},
        "pdl": {"dependent": True},
        "st2": {"num_stages": 2},
        "st4": {"num_stages": 4},
        "w2": {"num_warps": 2},
        "w8": {"num_warps": 8},
        "t32": {"TILE": 32},
        "t32w2": {"TILE": 32, "num_warps": 2, "num_stages": 4},
        "s/2": {"times": 0.5},
        "s*2": {"times": 2},
        "s=1": {"splits": 1},
    }
    print(f"\n{torch.cuda.get_device_name()}, {MULTIPROCESSORS} multiprocessors; µs (GB/s of live keys and values)")
    for model, heads, heads_kv, d in (("32B", 40, 8, 128), ("7B", 28, 4, 128)):
        for rows in (1, 2, 4, 8, 64, 256):
            generator = torch.Generator().manual_seed(rows)
            ragged = torch.randint(64, 1025, (rows,), generator=generator).tolist()
            for kind, lengths in (("512", [512] * rows), ("ragged", ragged)):
                live = sum(lengths) * heads_kv * d * 4
                copies = max(2, min(64, math.ceil(1.2e8 / live)))
                cases = list(live_cases(rows, heads, heads_kv, d, lengths, copies))
                tile = flash_decode.config(d, 64, 2)["TILE"]
                usual = flash_decode.splits(rows, heads_kv, 1024, tile, MULTIPROCESSORS)
                exact = launch(cases[0])
                capture, graphs = Capture(), {}
                for name, form in forms.items():
                    choice = dict(form)
                    if times := choice.pop("times", None):
                        choice["splits"] = max(1, min(int(usual * times), 1024 // tile))
                    assert error(launch(cases[0], **choice), exact.double()) < LIMIT[torch.bfloat16], name
                    calls = [lambda case=case, choice=choice: launch(case, **choice) for case in cases]
                    for call in calls[:3]:
                        call()
                    graphs[name] = capture(calls).replay
                dense = []
                for case in cases[: max(1, int(2e9 / (rows * 1024 * heads_kv * d * 4)))]:
                    at = case.table_BP.long()
                    k, v = (x[at].transpose(1, 2).flatten(2, 3) for x in (case.pages_k, case.pages_v))
                    dense.append((case.q_BHD[:, :, None], k[:, :, : max(lengths)], v[:, :, : max(lengths)]))
                mask = (torch.arange(max(lengths), device="cuda") < cases[0].length_B[:, None])[:, None, None]
                sdpa = [
                    lambda x=x, mask=mask: scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=True)
                    for x in dense
                ]
                graphs["sdpa"] = capture(sdpa).replay
                counts = {name: len(dense) if name == "sdpa" else copies for name in graphs}
                times = interleaved(graphs, 9, clock, calls=counts)
                cells = [f"{name} {median:.1f} ({live / median / 1e3:.0f})" for name, (median, *_) in times.items()]
                print(f"{model} B{rows} {kind} S{usual}: " + ", ".join(cells), flush=True)
                del cases, dense, sdpa, graphs, capture
                torch.cuda.empty_cache()


def test_table_of_bias_and_rotary_embedding():
    """What decides whether they belong into the kernel: µs of the whole, in a graph, outside of it and inside."""
    from benchmarks.gpu_timing import Capture, GpuClock, interleaved

    def outside(case, fused):
        q, k, v = _finished_by_inductor(fused, *case.args[9:], case.q_BHD.shape[1], case.k_BJD.shape[1])
        return launch(Case(q, k, v, *case.args[3:9]))

    clock = GpuClock()
    forms = {"outside": outside, "inside": lambda case, _: launch(case)}
    print(f"\n{torch.cuda.get_device_name()}; µs of bias, rotary embedding and attention")
    for model, heads, heads_kv, d in (("7B", 28, 4, 128), ("32B", 40, 8, 128)):
        for rows in (1, 2, 4, 8, 16):
            torch._dynamo.reset()  # each size is compiled for itself, as many as there are
            for capacity in (512, 1024, 4096):
                lengths = [capacity // 2] * rows
                cases = []
                for case in live_cases(rows, heads, heads_kv, d, lengths, 16, capacity):
                    fused = torch.cat([x.flatten(1) for x in (case.q_BHD, case.k_BJD, case.v_BJD)], 1)
                    parts = fused.unflatten(1, (-1, d)).split([heads, heads_kv, heads_kv], 1)
                    case.q_BHD, case.k_BJD, case.v_BJD = parts
                    case.cos_BD, case.sin_BD = torch.randn(2, rows, d, dtype=torch.bfloat16, device="cuda")
                    case.bias_XD = torch.randn(heads + 2 * heads_kv, d, dtype=torch.bfloat16, device="cuda")
                    cases.append((case, fused))
                capture, graphs = Capture(), {}
                want = outside(*cases[0])
                for name, form in forms.items():
                    assert error(form(*cases[0]), want.double()) < 2 * LIMIT[torch.bfloat16], name
                    calls = [lambda case=case, form=form: form(*case) for case in cases]
                    for call in calls[:3]:
                        call()
                    graphs[name] = capture(calls).replay
                times = interleaved(graphs, 9, clock, calls=dict.fromkeys(graphs, len(cases)))
                cells = [f"{name} {median:.2f}" for name, (median, *_) in times.items()]
                print(f"{model} B{rows} of {capacity}: " + ", ".join(cells), flush=True)


@torch.compile(fullgraph=True, dynamic=False)
def _finished_by_inductor(fused, cos_BD, sin_BD, bias_XD, heads, heads_kv):
    """Bias and rotary embedding as a decode graph has them outside of the operator."""
    d = cos_BD.shape[1]
    x = (fused + bias_XD.flatten()).unflatten(1, (-1, d))
    q, k, v = x.split([heads, heads_kv, heads_kv], 1)
    cos, sin = cos_BD[:, None], sin_BD[:, None]

    def turned(x):
        return torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin, v.contiguous()
