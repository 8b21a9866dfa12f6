"""Run by test_triton_interpreted.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.

Prints one JSON object, name of a check -> number (an error or a count of wrong values).
"""

# ruff: noqa: T201

import json

import torch

from qerl_compile.formats import nvfp4
from qerl_compile.kernels import nvfp4_decode, nvfp4_dequantize, nvfp4_dx, nvfp4_permute, nvfp4_quantize, reference

torch.set_num_threads(1)
torch.manual_seed(0)
results: dict[str, float] = {}
n, k = 40, 160

for dtype in (torch.float32, torch.float16):
    for magnitude in (1.0, 1e-30, 1e30):
        w = (torch.randn(n, k) * torch.exp(torch.randn(n, 1)) * magnitude).to(dtype)
        if not bool(w.isfinite().all()):
            continue
        w[0] = 0
        w[1] = torch.linspace(-6, 6, k).to(dtype) * magnitude
        expected, got = nvfp4.quantize(w), nvfp4_quantize.quantize(w)
        wrong = (got[0] != expected.codes_NK2).sum() + (got[2] != expected.global_scale).sum()
        wrong += (got[1].view(torch.uint8) != expected.block_decode_scale_NG.view(torch.uint8)).sum()
        results[f"quantize {dtype} {magnitude:g}"] = int(wrong)

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
print(json.dumps(results))
