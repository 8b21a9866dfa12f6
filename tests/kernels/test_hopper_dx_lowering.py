"""The Hopper backward kernel without a GPU: its source run on torch tensors, and what it compiles to."""

import re

import pytest
import torch

from qerl_compile.kernels import nvfp4_arithmetic
from tests.kernels.oracle import make_weight

if nvfp4_arithmetic.GLUON:
    from qerl_compile.kernels import nvfp4_hopper_dx, nvfp4_wgmma_dx
    from qerl_compile.kernels import nvfp4_wgmma_dx_layouts as layouts
    from tests.kernels.gluon_on_torch import Descriptor, Pointer, run
    from tests.kernels.test_triton_lowering import disassemble, lower

    def multiply(dy, codes, block, decode, config, multiprocessors=1):
        """What nvfp4_hopper_dx.linear_dx launches, on torch tensors."""
        config = {"registers": 0, "max_registers": 0, "per_sm": 1, "waves": -1, "share": 1000, "groups": 1} | config
        (m, n), k = dy.shape, codes.shape[1] * 2
        plan = nvfp4_hopper_dx._plan(m, n, k, multiprocessors, tuple(config.items()))
        dx = torch.full((m, k), float("nan"), dtype=torch.bfloat16)
        flags = torch.zeros(plan.counters, dtype=torch.int32)
        arguments = (
            Descriptor(dy, plan.dy.shape),
            Descriptor(codes.view(torch.int16), plan.codes.shape),
            Descriptor(block.view(torch.int32), plan.block.shape),
            *map(Pointer, (decode.reshape(1), dx, torch.full((plan.partial,), float("nan")), flags)),
            *plan.integers,
        )
        constants = {"TOKENS": config["tokens"], "SLOTS": config["slots"], "STEPS": config["steps"]}
        run(nvfp4_wgmma_dx, arguments, {**constants, "CONSUMER_REGISTERS": 0}, plan.grid)
        assert not flags.any()
        return dx

    CASES = {
        "one CTA, whole tiles, tails of N and M": (200, 256, 20, 1, {"tokens": 16, "steps": 1}),
        "whole tiles, then one shared by three": (200, 512, 20, 3, {"tokens": 16, "steps": 2}),
        "everything shared, runs across tiles": (648, 512, 40, 5, {"tokens": 32, "steps": 2, "waves": 0}),
        "one tile shared by seven": (648, 256, 8, 7, {"tokens": 8, "steps": 1}),
        "tiles shared by two at most": (648, 512, 8, 7, {"tokens": 8, "steps": 1, "share": 2}),
        "three groups of five": (648, 512, 40, 16, {"tokens": 16, "steps": 1, "groups": 4, "waves": 0}),
        "two groups of three, two tiles of tokens each": (648, 512, 56, 7, {"tokens": 16, "steps": 2, "groups": 2}),
        "fewer steps left over than CTAs": (128, 1280, 8, 4, {"tokens": 8, "steps": 1}),
        "the largest tile": (128, 256, 128, 1, {"tokens": 128, "steps": 1}),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_the_source_on_torch_tensors_agrees_with_float64(case):
        n, k, m, multiprocessors, config = CASES[case]
        w = make_weight(n, k)
        dy = torch.randn(m, n, generator=torch.Generator().manual_seed(1)).bfloat16()
        dx = multiply(dy, *w.args, {"slots": 2, **config}, multiprocessors)
        exact = dy.double() @ w.exact
        assert ((dx.double() - exact).norm() / exact.norm()).item() < 2.5e-3

    def test_identity_gradients_read_out_every_code_under_every_scale():
        codes = (torch.arange(128) + 128 * (torch.arange(248)[:, None] >= 124)).to(torch.uint8)
        block = (torch.arange(248 * 16) % 127).to(torch.uint8).reshape(248, 16)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat((values, -values))
        nibbles = torch.stack((codes & 15, codes >> 4), -1).reshape(248, 256).long()
        expected = values[nibbles] * block.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
        one = torch.ones(1)
        config = {"tokens": 128, "slots": 2, "steps": 1}
        dx = multiply(torch.eye(248).bfloat16(), codes, block.view(torch.float8_e4m3fn), one, config)
        assert torch.equal(dx.float(), expected)

    def compiled(tokens, steps, slots, registers=232, maxnreg=None):
        descriptors = {
            "dy_desc": f"tensordesc<bf16[{tokens}, 64],{layouts.DY_SMEM!r}>",
            "w_desc": f"tensordesc<i16[{64 * steps}, 64],{layouts.CODES_SMEM!r}>",
            "raw_desc": f"tensordesc<i32[{64 * steps}, 4],{layouts.RAW_SMEM!r}>",
        }
        constants = {"TOKENS": tokens, "SLOTS": slots, "STEPS": steps, "CONSUMER_REGISTERS": registers}
        return lower(nvfp4_wgmma_dx.kernel, constants, 90, 4, gluon=True, extra=descriptors, maxnreg=maxnreg)

    @pytest.mark.parametrize(
        ("tokens", "steps", "slots", "registers", "maxnreg"),
        [
            (16, 1, 8, 104, 80),
            (32, 1, 7, 104, 80),
            (64, 2, 5, 232, None),
            (128, 1, 8, 232, None),
            (128, 2, 4, 232, None),
        ],
    )
    def test_decoding_overlaps_with_wgmma_without_spills(tokens, steps, slots, registers, maxnreg, tmp_path):
        kernel = compiled(tokens, steps, slots, registers, maxnreg)
        sass = disassemble(kernel, tmp_path)
        assert not re.search(r"\b(LDL|STL|SHFL)\b", sass)
        # Per consumer and 64-row step two groups of four, in the peeled first slot and in the loop.
        assert len(re.findall(r"\bHGMMA\b", sass)) == 2 * 2 * steps * 8
        # One wait per group and not one after every HGMMA; all but the last leave one group running.
        assert sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x1") == 2 * (4 * steps - 1)
        assert sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == 2
        # The transposed load is one instruction for four fragments: 16 codes of a thread each.
        assert len(re.findall(r"LDSM\.16\.MT88\.4", sass)) == 2 * 2 * steps * 2
        assert kernel.metadata.shared <= 227 * 1024 // (1 if maxnreg is None else 2)

    def test_the_transposed_load_lies_where_wgmma_reads():
        """Matrices 2 s and 2 s + 1 of the loads are rows 16 s and 16 s + 8; codes 0 and 1 are rows g and g + 8 of A."""
        ptx = compiled(64, 1, 8).asm["ptx"]
        loads = re.findall(r"ldmatrix\S+ \{(.*?)\}", ptx)
        matrices = ", ".join(loads[:2]).split(", ")
        scales = ", ".join(re.findall(r"ld\.shared\.v4\.b32\s+\{(.*?)\}", ptx)[:2]).split(", ")
        decoded = {}
        for text in re.findall(r"mov\.b32 v, %r.*?\}", ptx, re.DOTALL):
            pair = re.findall(r"mul\.rn\.bf16x2 (%r\d+), a, (%r\d+)", text)
            decoded[re.search(r"v, (%r\d+)", text)[1]] = pair
        expected = []
        for matrix, scale in zip(matrices, scales, strict=True):
            (even, even_scale), (odd, odd_scale) = decoded[matrix]
            assert even_scale == odd_scale == scale
            expected += [even, odd]
        groups = re.findall(r"wgmma\.mma_async\S+ \{.*?\}, \{(.*?)\}", ptx)[:4]
        copies = dict(re.findall(r"mov\.b32\s+(%r\d+), (%r\d+);", ptx))  # Triton 3.8 copies what inline assembly gives
        assert [copies.get(register, register) for register in ",".join(groups).split(",")] == expected

    def test_a_step_costs_less_than_three_instructions_a_weight(tmp_path):
        sass = disassemble(compiled(128, 2, 4), tmp_path)
        code = [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
        loops = []
        for end, text in code:
            target = re.search(r"\bBRA 0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < end:
                body = [t for at, t in code if int(target[1], 16) <= at <= end]
                if sum("HGMMA" in t for t in body) == 16:
                    loops.append(len(body))
        assert min(loops) <= 3 * 128  # a thread has 128 weights of two steps
