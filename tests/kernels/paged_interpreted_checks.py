"""Run by test_paged_interpreted.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.

Prints one JSON object, name of a check -> largest error over largest output, or infinity if wrong pages were written.
"""

# ruff: noqa: T201

import json

import torch

from qerl_compile.kernels import flash_decode, paged_attention
from tests.kernels.paged_oracle import error, expected, make_case, rounded_alike, same_bits, written
from tests.models import LONG

torch.set_num_threads(1)
torch.manual_seed(0)
results: dict[str, float] = {}
LENGTHS = [1, 0, 17, 64, 65, 130]
# Every window and every number of splits, with each shape; all pairs would take three times as long for no new branch.
PAIRS = {
    torch.float32: ((0, 1), (0, 5), (1, 2), (20, 1), (20, 5), (70, 2)),
    torch.float16: ((0, 2), (1, 5), (70, 1)),
}

DTYPES = (torch.float32, torch.float16) if LONG else (torch.float32,)

for dtype in DTYPES:
    for group, heads_kv, d, page, tile in (
        (1, 2, 64, 16, 32),
        (3, 1, 80, 64, 64),
        (5, 2, 16, 32, 16),
        (17, 1, 32, 48, 32),
    ):
        for window, splits in PAIRS[dtype]:
            case = make_case(group * heads_kv, heads_kv, d, page, LENGTHS, window=window, dtype=dtype, shared=1)
            exact, (pages_k, pages_v) = expected(case), written(case)
            y = flash_decode.decode(*case.args, multiprocessors=4, choice={"TILE": tile, "splits": splits})
            right = same_bits(case.pages_k, pages_k) and same_bits(case.pages_v, pages_v) and not y[1].any()
            name = f"decode {dtype} G{group} D{d} page{page} tile{tile} window{window} splits{splits}"
            results[name] = error(y, exact) if right else float("inf")

for dtype in DTYPES:
    for rotary, bias in ((True, False), (False, True), (True, True)):
        for group, heads_kv, d, splits in ((3, 1, 80, 1), (5, 2, 16, 2), (7, 1, 32, 5)):
            case = make_case(group * heads_kv, heads_kv, d, 16, LENGTHS, dtype=dtype, rotary=rotary, bias=bias)
            exact, pages = expected(case), written(case)
            y = flash_decode.decode(*case.args, multiprocessors=4, choice={"splits": splits})
            right = all(map(rounded_alike, (case.pages_k, case.pages_v), pages)) and not y[1].any()
            results[f"before {dtype} rotary{rotary} bias{bias} D{d}"] = error(y, exact) if right else float("inf")
case = make_case(6, 2, 32, 16, LENGTHS, rotary=True)
case.cos_BD, case.sin_BD = case.cos_BD[:1], case.sin_BD[:1]
results["before torch.float32, one table for all rows"] = error(
    flash_decode.decode(*case.copy().args, multiprocessors=4), expected(case)
)

for d, page in ((64, 16), (80, 64), (16, 7)):
    case = make_case(2, 2, d, page, LENGTHS)
    k_BJTD, v_BJTD = torch.randn(6, 130, 2, 2 * d).transpose(1, 2).split(d, dim=-1)
    right = case.copy()
    paged_attention.reference_write(k_BJTD, v_BJTD, right.pages_k, right.pages_v, right.table_BP, right.length_B)
    flash_decode.write(k_BJTD, v_BJTD, case.pages_k, case.pages_v, case.table_BP, case.length_B)
    same = same_bits(case.pages_k, right.pages_k) and same_bits(case.pages_v, right.pages_v)
    results[f"write D{d} page{page}"] = 0.0 if same else float("inf")
print(json.dumps(results))
