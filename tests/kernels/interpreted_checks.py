"""Run by test_triton_interpreted.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.

Prints one JSON object, name of a check -> number (an error or a count of wrong values).
"""

# ruff: noqa: T201

import json

import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import (
    nvfp4_decode,
    nvfp4_dequantize,
    nvfp4_dx,
    nvfp4_fragments,
    nvfp4_permute,
    nvfp4_quantize,
    reference,
)

torch.set_num_threads(1)
torch.manual_seed(0)
results: dict[str, float] = {}
n, k = 40, 160


def wrong_bytes(w):
    expected, got = nvfp4.quantize(w), nvfp4_quantize.quantize(w)
    wrong = (got[0] != expected.codes_NK2).sum() + (got[2] != expected.global_scale).sum()
    return int(wrong + (got[1].view(torch.uint8) != expected.block_decode_scale_NG.view(torch.uint8)).sum())


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    # 1: fp32 divides, 0.01: it multiplies; 1e-30 and 1e30: everything divides
    for magnitude in (1.0, 0.01, 1e-30, 1e30):
        w = (torch.randn(n, k) * torch.exp(2 * torch.randn(n, 1)) * magnitude).to(dtype)
        if not bool(w.isfinite().all()):
            continue
        w[0] = 0
        w[1] = torch.linspace(-6, 6, k).to(dtype) * magnitude
        w[2] *= 1e-4  # a block scale of zero, or a subnormal one
        w[3, ::3] = -0.0
        w[4, 1::2] = -torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # quotients that may underflow
        results[f"quantize {dtype} {magnitude:g}"] = wrong_bytes(w)
    # A block's largest weight sets the step, the others lie on the borders between codes and next to them.
    largest = torch.linspace(0.5, 1, 64).to(dtype)[:, None]
    alone = nvfp4.quantize(torch.nn.functional.pad(largest, (0, 15)))
    step = alone.block_decode_scale_NG.float() / alone.global_scale
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.1])
    for ulps in (-1, 0, 1):
        w = torch.cat([largest, (step * borders).to(dtype)], 1)
        w.view(torch.int16 if dtype.itemsize == 2 else torch.int32)[:, 1:] += ulps
        results[f"quantize {dtype} borders {ulps:+d} ulp"] = wrong_bytes(w)

packed = nvfp4.quantize((torch.randn(n, k) * 0.05).half())
codes, block, decode = packed.codes_NK2, packed.block_decode_scale_NG, packed.decode_scale
for dtype in (torch.float32, torch.float16):
    out = torch.full((n, k), float("nan"), dtype=dtype)
    nvfp4_dequantize.dequantize_into(out, codes, block, decode)
    results[f"dequantize {dtype}"] = int((out != reference.dequantize(codes, block, decode, dtype)).sum())

every_code = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
every_scale = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
out = torch.full((127, 512), float("nan"))
nvfp4_dequantize.dequantize_into(out, every_code, every_scale, torch.ones(1))
results["dequantize every code under every scale"] = int(
    (out != reference.dequantize(every_code, every_scale, torch.ones(1), torch.float32)).sum()
)

products = nvfp4.exact_products(codes, block, torch.float32).double()
for m in (1, 7, 20):
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    h, lora = torch.randn(m, 16).bfloat16(), torch.randn(n, 16).bfloat16()
    y = (x.double() @ products.T) * decode.double()
    for swap in (0, 1):
        for slices in (1, 3):
            config = {"BM": 16, "BN": 32, "BK": 64, "SWAP": swap, "slices": slices, "num_warps": 4, "num_stages": 2}
            got = nvfp4_decode.linear(x, codes, block, decode, config).double()
            results[f"decode m{m} swap{swap} slices{slices}"] = ((got - y).norm() / y.norm()).item()
            got = nvfp4_decode.linear(x, codes, block, decode, config, h_MR=h, lora_B_NR=lora).double()
            with_lora = y + h.double() @ lora.double().T
            results[f"decode lora m{m} swap{swap} slices{slices}"] = (
                (got - with_lora).norm() / with_lora.norm()
            ).item()
    dx = (dy.double() @ products) * decode.double()
    for slices in (1, 2):
        config = {"BM": 16, "BK": 64, "BN": 32, "slices": slices, "num_warps": 4, "num_stages": 2}
        got = nvfp4_dx.linear_dx(dy, codes, block, decode, config).double()
        results[f"dx m{m} slices{slices}"] = ((got - dx).norm() / dx.norm()).item()

x = torch.randn(11, 512).bfloat16()
planes = nvfp4_permute.permute(x, 8).view(2, 8, 8, 64).permute(0, 2, 1, 3).reshape(16, 512)[:11]
results["permute"] = int((planes != x[:, nvfp4_permute.column_order(512)]).sum())

for tokens, m, k in ((8, 5, 512), (16, 16, 1024), (32, 20, 256)):
    x = torch.arange(1, m * k + 1, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(m, k)
    scratch = torch.full((1040,), float("nan"))
    got = nvfp4_fragments.fragments(x, tokens, clear=(scratch, 20, 1000)).view(torch.int16)
    # token (block, lane), column (tile, t, half, step high, step low, low, high, pair); then the tile of zeros
    expected = torch.zeros(tokens, k, dtype=torch.int16)
    expected[:m] = x.view(torch.int16)
    expected = expected.view(tokens // 8, 8, k // 256, 4, 2, 2, 2, 2, 2, 2).permute(2, 4, 8, 0, 5, 1, 3, 6, 9, 7)
    expected = torch.cat((expected.reshape(-1, 4, 64 * tokens), torch.zeros(1, 4, 64 * tokens, dtype=torch.int16)))
    cleared = scratch[20:1020].count_nonzero() + (~scratch.isnan()).sum() - 1000
    results[f"fragments {tokens} tokens"] = int((got != expected).sum() + cleared)
print(json.dumps(results))
