"""Run one kernel a few times, for compute-sanitizer: `python benchmarks/racecheck/real.py KERNEL TOKENS`.

KERNEL is stream, hopper, dx or quantize.
"""

import sys

import torch

from qerl_compile.kernels import cuda, dispatch, ops

N, K = 640, 1024


def main(kernel: str, tokens: int) -> None:
    torch.manual_seed(0)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    w_NK = (torch.randn(N, K, device="cuda") * 0.02).bfloat16()
    codes, block, divisor = ops.quantize(w_NK)
    weight = codes, block, divisor.reciprocal()
    x, dy = (torch.randn(tokens, width, device="cuda").bfloat16() for width in (K, N))
    for _ in range(3):
        if kernel == "hopper":
            form = dispatch._HOPPER[next(bucket for bucket in dispatch._HOPPER if tokens <= bucket)]
            cuda.linear(x, *weight, choice={"kernel": "hopper", **form, "dependent": 0})
        elif kernel == "stream":
            cuda.linear(x, *weight, choice=dispatch._stream(N, K, tokens, multiprocessors))
        elif kernel == "dx":
            cuda.linear_dx(dy, *weight, choice=dispatch._hopper_dx(K, tokens, multiprocessors))
        else:
            ops.dequantize(*ops.quantize(w_NK)[:2], weight[2], torch.bfloat16)
    torch.cuda.synchronize()
    print(kernel, tokens, "done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
