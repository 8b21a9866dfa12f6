"""A launch finds what processes that saw no GPU compiled ahead: both agree in all that Triton specializes on."""

import json
import os
import subprocess
import sys

import torch

from qerl_compile.kernels.cuda_device import capability_and_multiprocessors
from qerl_compile.kernels.rehearsal_script import Attention, Linear, Script
from qerl_compile.warm_up import Rehearsal

LAUNCHES = """
import json, sys, torch
from triton import knobs
import qerl_compile.kernels
from qerl_compile.kernels.rehearsal_script import Script

script, missed, found = Script.from_json(sys.argv[1]), [], []

def listener(*, src, cache_hit, **_):
    (found if cache_hit else missed).append(f"{src.fn.__module__}.{src.fn.__name__} {src.signature} {src.attrs}")

knobs.compilation.listener = listener
ops, bf16 = torch.ops.qerl, {"device": "cuda", "dtype": torch.bfloat16}

def packed(linear):
    codes = torch.zeros(linear.n, linear.k // 2, device="cuda", dtype=torch.uint8)
    block = torch.ones(linear.n, linear.k // 16, device="cuda").to(torch.float8_e4m3fn)
    return codes, block, torch.ones(1, device="cuda")

with torch.no_grad():
    for linear in script.linears:
        weight = packed(linear)
        adapter = torch.zeros(linear.rank, linear.k, **bf16), torch.zeros(linear.n, linear.rank, **bf16)
        for tokens in (*script.prefill_tokens, *script.decode_rows):
            residual = torch.zeros(tokens, linear.n, **bf16) if linear.residual else None
            ops.adapted_linear(torch.zeros(tokens, linear.k, **bf16), *weight, *adapter, residual)
        for tokens in script.training_tokens:
            ops.quantized_linear(torch.zeros(tokens, linear.k, **bf16), *weight)
            ops.quantized_linear_dx(torch.zeros(tokens, linear.n, **bf16), *weight)
    one = script.attention
    heads = one.heads + 2 * one.kv_heads
    pages = [torch.zeros(8, one.kv_heads, one.page_tokens, one.head_dim, **bf16) for _ in range(2)]
    for rows in script.decode_rows:
        q, k, v = torch.zeros(rows, heads, one.head_dim, **bf16).split([one.heads, one.kv_heads, one.kv_heads], 1)
        table = torch.zeros(rows, one.pages, device="cuda", dtype=torch.int32)
        length = torch.ones(rows, device="cuda", dtype=torch.int32)
        rotary = torch.zeros(rows, one.head_dim, **bf16)
        bias = torch.zeros(heads, one.head_dim, **bf16)
        ops.paged_decode(q, k, v, *pages, table, length, one.head_dim**-0.5, 0, rotary, rotary, bias)
    torch.cuda.synchronize()
print(json.dumps({"missed": missed, "found": len(found)}))
"""


def test_a_launch_finds_what_was_compiled_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability, multiprocessors = capability_and_multiprocessors(torch.cuda.current_device())
    script = Script(
        capability,
        multiprocessors,
        (Linear(6144, 4096, 128), Linear(4096, 4096, 32), Linear(4096, 11264, 32, residual=True)),
        Attention(32, 8, 128, 64, 4, bias=True),
        decode_rows=(2, 64),
        prefill_tokens=(512,),
        training_tokens=(256, 4096),
        processes=8,
    )
    ahead = Rehearsal(script).wait()
    assert ahead.failures == ()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, script.to_json()], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["missed"] == []
    assert 0 < result["found"] <= ahead.forms
