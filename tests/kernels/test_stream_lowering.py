"""The stream kernel without a GPU: its source and its launcher run on torch tensors, and what it compiles to."""

import contextlib
import re
import sys

import pytest
import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import lead_in, nvfp4_fragments, nvfp4_stream, nvfp4_stream_launch
from tests.kernels.gluon_on_torch import Pointer, run
from tests.kernels.oracle import make_weight
from tests.kernels.test_triton_lowering import disassemble, lower

FORM = {"R": 16, "W": 4, "T": 8, "SLICES": 1, "NATURAL": 0, "dependent": 1, "max_registers": 0}


@pytest.fixture
def on_torch(monkeypatch):
    """Launches run on torch tensors; outputs and scratch are full of NaN and no larger than they have to be.

    `order` is the order of CTAs, `grids` what was launched.
    """
    launches = {"order": iter, "grids": []}

    def prepare(function, *, num_warps, launch_pdl=False, maxnreg=None, **constants):
        assert launch_pdl == constants["DEPENDENT"]
        assert constants.get("W", num_warps) == num_warps

        def launch(grid, *arguments):
            launches["grids"].append((constants.get("SLICES"), grid))
            arguments = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            module, name = sys.modules[function.fn.__module__], function.fn.__name__
            run(module, arguments, constants, grid, kernel=name, pack_dim=-1, order=launches["order"])

        return launch

    def poisoned(tensor, *shape):
        return torch.full(shape, float("nan"), dtype=tensor.dtype)

    monkeypatch.setattr(nvfp4_stream_launch, "prepare", prepare)
    monkeypatch.setattr(nvfp4_fragments, "prepare", prepare)
    monkeypatch.setattr(nvfp4_stream_launch, "turn", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(nvfp4_stream_launch, "partial_sums", lambda device, count: torch.full((count,), float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return launches


CASES = {  # N, K, M, LoRA's rank, config
    "one warp, one tile": (16, 256, 8, 0, {"W": 1}),
    "fewer tiles than warps, rows left over": (40, 512, 5, 0, {}),
    "one tile, four warps, x as it is": (17, 256, 1, 0, {"NATURAL": 1}),
    "five tiles of four warps, 32 rows": (80, 1280, 8, 32, {"R": 32}),
    "six tiles of four warps, x as it is": (50, 1536, 7, 32, {"NATURAL": 1, "R": 32}),
    "three tiles of two warps, 16 tokens": (33, 768, 13, 16, {"W": 2, "T": 16}),
    "32 tokens, x as it is": (16, 1024, 27, 16, {"W": 2, "T": 32, "NATURAL": 1}),
    "32 tokens, 32 rows": (32, 768, 32, 32, {"T": 32, "R": 32}),
    "eight warps": (24, 1536, 8, 16, {"W": 8, "dependent": 0}),
    "two slices of five tiles": (40, 1280, 3, 16, {"W": 2, "SLICES": 2}),
    "three slices, so x does not stay as it is": (40, 1536, 8, 32, {"SLICES": 3, "NATURAL": 1, "R": 32}),
    "four slices, one tile each, 16 tokens": (20, 1024, 16, 0, {"SLICES": 4, "T": 16}),
    "more slices than tiles": (56, 512, 6, 16, {"W": 1, "SLICES": 4, "R": 32}),
    "more slices than one tile": (24, 256, 6, 0, {"W": 2, "SLICES": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_source_on_torch_tensors_agrees_with_float64_whatever_cta_is_last(case, on_torch):
    n, k, m, rank, config = CASES[case]
    config = FORM | config
    w = make_weight(n, k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k + 8, generator=generator).bfloat16()[:, :k]
    exact = x.double() @ w.exact.T
    branch = {}
    if rank:
        h, lora = torch.randn(m, rank + 8, generator=generator), torch.randn(n, rank + 16, generator=generator)
        h, lora = h.bfloat16()[:, :rank], lora.bfloat16()[:, :rank]
        exact += h.double() @ lora.double().T
        branch = {"h_MR": h, "lora_B_NR": lora}
    y = nvfp4_stream_launch.linear(x, *w.args, config, **branch)
    assert ((y.double() - exact).norm() / exact.norm()).item() < 2.5e-3
    slices = min(config["SLICES"], k // 256)
    assert on_torch["grids"][-1] == (slices, (-(-n // config["R"]), slices))
    on_torch["order"] = reversed
    assert torch.equal(y, nvfp4_stream_launch.linear(x, *w.args, config, **branch))
    residual = torch.randn(m, n + 8, generator=generator).bfloat16()[:, :n]
    added = nvfp4_stream_launch.linear(x, *w.args, config, **branch, residual_MN=residual)
    assert torch.equal(added, y + residual)


def test_a_in_place_of_h_gives_the_same_bits_from_scratch_that_is_shared(on_torch, monkeypatch):
    """lead_in.launch is stood in for by torch: what is checked is what it is given and what becomes of it."""
    given = []

    def launch(x_MK, a_RK, order, scratch, offset, *, waits, triggers):
        given.append((offset, len(scratch), waits, triggers))
        clear = (scratch, order.counter_at, order.counters) if order.counters else None
        order.out.copy_(nvfp4_fragments.fragments(x_MK, order.tokens, clear=clear))
        scratch[offset : offset + lead_in.sums(*x_MK.shape[:1], a_RK.shape[0], x_MK.shape[1])] = float("nan")
        arrivals = torch.tensor([3, 5], dtype=torch.int32)
        return lead_in.LeadIn((x_MK.float() @ a_RK.float().T).bfloat16(), arrivals, 1, 5 if triggers else 0)

    monkeypatch.setattr(lead_in, "launch", launch)
    generator = torch.Generator().manual_seed(3)
    w = make_weight(40, 1280)
    x, a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((9, 1280), (32, 1280), (40, 32)))
    for config in ({"T": 16}, {"T": 16, "SLICES": 3, "W": 2}):
        config = FORM | config
        h = (x.float() @ a.float().T).bfloat16()
        want = nvfp4_stream_launch.linear(x, *w.args, config, h_MR=h, lora_B_NR=b)
        assert torch.equal(nvfp4_stream_launch.linear(x, *w.args, config, lora_A_RK=a, lora_B_NR=b), want)
    # 32 ranks x 3 slices of 512 columns x 16 tokens behind nothing; then behind 3 CTAs x 3 slices x 256 and 3 tickets
    assert given == [(0, 1536, True, True), (2336, 2336 + 1536, True, True)]


@pytest.mark.parametrize("config", [{"T": 32, "NATURAL": 1}, {"T": 8, "R": 32}])
def test_identity_activations_read_out_every_code_under_every_scale(config, on_torch):
    codes = torch.arange(256).to(torch.uint8).view(2, 128).repeat(127, 1)
    block = (torch.arange(254)[:, None] // 2 + torch.arange(16)) % 127  # each column holds all 127, twice
    block = block.to(torch.uint8).view(torch.float8_e4m3fn)
    config = FORM | {"W": 1} | config
    eye = torch.eye(256).bfloat16().split(config["T"])
    y = torch.cat([nvfp4_stream_launch.linear(x, codes, block, torch.ones(1), config) for x in eye])
    assert torch.equal(y.float().T, nvfp4.exact_products(codes, block, torch.float32))


def compiled(capability=90, **form):
    constants = {"W": 4, "R": 16, "T": 8, "SLICES": 1, "RANK": 0, "NATURAL": False, "RESIDUAL": False} | form
    constants["DEPENDENT"] = capability >= 90
    warps = constants["W"]
    constants |= {} if constants["RANK"] else {"h_ptr": None, "lora_ptr": None, "arrival_ptr": None}
    constants |= {} if constants["RESIDUAL"] else {"residual_ptr": None}
    constants |= {} if constants["SLICES"] > 1 else {"part_ptr": None}
    block = "*fp8e4nv" if capability >= 90 else "*u8"  # Triton has no E4M3 on Ampere, not even behind a pointer
    return lower(
        nvfp4_stream.kernel,
        constants,
        capability,
        warps,
        block=block,
        gluon=True,
        extra={"x_ptr": "*bf16", "residual_ptr": "*bf16"},
    )


def main_loop(sass):
    """The instructions from the target of the one backward branch around `HMMA` to that branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = []
    for end, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < end:
            loops.append([t for at, t in code if int(target[1], 16) <= at <= end])
    (loop,) = [body for body in loops if any("HMMA" in t for t in body)]
    return "\n".join(loop)


def count(opcode, sass):
    return len(re.findall(rf"\b{opcode}\b", sass))


FORMS = {  # form, most instructions a weight, CTAs (four warps' worth) for which a multiprocessor has registers
    "8 tokens": ({}, 2.9, 5),
    "8 tokens, slices, LoRA": ({"SLICES": 2, "RANK": 32}, 2.9, 5),
    "8 tokens, slices, LoRA, residual": ({"SLICES": 2, "RANK": 32, "RESIDUAL": True}, 2.9, 5),
    "8 tokens, eight warps": ({"W": 8, "RANK": 16}, 2.9, 4),
    "8 tokens, x as it is": ({"NATURAL": True}, 3.3, 4),
    "8 tokens, 32 rows": ({"R": 32}, 2.8, 3),
    "16 tokens": ({"T": 16}, 3.1, 4),
    "16 tokens, 32 rows, slices": ({"T": 16, "R": 32, "SLICES": 4}, 3.0, 3),
    "32 tokens": ({"T": 32}, 3.5, 3),
    "32 tokens, 32 rows": ({"T": 32, "R": 32, "RANK": 32}, 3.3, 2),
}


@pytest.mark.parametrize("case", FORMS)
def test_the_loop_is_loads_decoding_and_mma_and_nothing_moves_between_lanes(case, tmp_path):
    form, most, ctas = FORMS[case]
    kernel = compiled(**form)
    form = {"W": 4, "R": 16, "T": 8, "SLICES": 1, "RANK": 0} | form
    sass = disassemble(kernel, tmp_path)
    loop = main_loop(sass)
    assert not re.search(r"\b(LDL|STL|SHFL|LDS|LDSM|STS|BAR|DEPBAR)\b", loop)
    # Triton 3.9's epilogue of the largest form with slices leaves one value on the stack during the loop.
    assert len(re.findall(r"\b(LDL|STL)\b", sass)) <= (2 if case == "16 tokens, 32 rows, slices" else 0)
    # Two tiles of 256 columns an iteration, 16 rows x 8 tokens x 16 columns an instruction.
    products = form["R"] // 16 * (form["T"] // 8)
    assert count("HMMA", loop) == 2 * 16 * products
    assert count("HMMA", sass) == (2 * 16 + form["RANK"] // 16) * products
    # R x 128 bytes of codes and T x 512 of x a tile and warp, 16 bytes a lane; one word of scales a row and lane.
    assert count(r"LDG\.E\.128(\.CONSTANT)?", loop) == 2 * (form["R"] * 128 + form["T"] * 512) // 512
    assert count("LDG", loop) - count(r"LDG\.E\.128", loop) == 2 * form["R"] // 8
    assert len(loop.splitlines()) <= most * 2 * 256 * form["R"] // 32
    registers = int(re.search(r"REG:(\d+)", disassemble(kernel, tmp_path, "-res-usage"))[1])
    assert -(-registers // 8) * 8 * 128 * ctas <= 1 << 16
    assert kernel.metadata.shared <= 4 * form["W"] * form["R"] * form["T"]  # where the warps' sums meet


@pytest.mark.parametrize("capability", [80, 86, 100, 120])
def test_it_lowers_to_mma_sync_on_other_architectures(capability):
    for form in ({}, {"NATURAL": True, "R": 32}, {"T": 16, "SLICES": 4, "RANK": 32}):
        ptx = compiled(capability, **form).asm["ptx"]
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
        assert not re.search(r"wgmma|tcgen05|ldmatrix", ptx)
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90)


@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_the_pass_over_x_moves_sixteen_bytes_a_lane(tokens, tmp_path):
    constants = {"T": tokens, "LANES": nvfp4_fragments.LANES, "DEPENDENT": True, "CLEAR": True}
    kernel = lower(nvfp4_fragments._kernel, constants, 90, 4, extra={"x_ptr": "*bf16", "ticket_ptr": "*fp32"})
    sass = disassemble(kernel, tmp_path)
    assert count(r"LDG\.E\.128", sass) == count(r"STG\.E\.128", sass) == 2
    assert not re.search(r"\b(LDL|STL)\b", sass)
