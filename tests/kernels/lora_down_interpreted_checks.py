"""Run by test_lora_down_interpreted.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.

Prints one JSON object, name of a check -> largest error over largest result, or infinity if tickets were left behind or
x in order is not, to the bit, what the pass over x alone makes of it.
"""

# ruff: noqa: T201

import json

import torch

from qerl_compile.kernels import lead_in, lora_down, nvfp4_fragments, nvfp4_permute
from qerl_compile.kernels.nvfp4_workspace import Arrivals
from tests.models import LONG

torch.set_num_threads(1)
torch.manual_seed(0)
results: dict[str, float] = {}
scratch = torch.full((1 << 16,), float("nan"))
tickets = torch.zeros(1 << 10, dtype=torch.int32)
lora_down.partial_sums = lambda device, count: scratch.fill_(float("nan"))[:count]
lora_down.flags = lead_in.flags = lambda device, count: tickets[:count]

for dtype in (torch.float16, torch.float32)[: 1 + LONG]:
    for m, r, k in ((1, 16, 128), (3, 48, 208), (16, 32, 256), (37, 64, 400)):
        # columns of a larger matrix on the left, rows of one on the right; the rest is poison
        x = torch.full((m, k + 48), float("nan"), dtype=dtype)[:, 16 : 16 + k].copy_(torch.randn(m, k))
        a = torch.full((r + 16, k), float("nan"), dtype=dtype)[16:].copy_(torch.randn(r, k))
        exact = x.double() @ a.double().T
        for bm, br, ks, steps, groups in (
            (1, 1, 512, 1, 0),
            (4, 2, 64, 1, 0),
            (2, 16, 32, 2, 0),
            (16, 16, 64, 1, 1),
            (64, 32, 32, 4, 1),
            (16, 16, 64, 2, 4),
            (32, 16, 128, 1, 2),
            (16, 64, 512, 1, 4),
        ):
            if groups == 0 and m > 16:
                continue  # thousands of programs
            form = {"BM": bm, "BR": br, "KS": ks, "STEPS": steps, "GROUPS": groups}
            h = lora_down.launch(x, a, form | {"num_warps": 4, "num_stages": 2, "DEPENDENT": False})
            right = h.dtype == dtype and h.shape == (m, r) and h.is_contiguous() and not tickets.any()
            error = ((h.double() - exact).abs().max() / exact.abs().max()).item()
            name = f"{dtype} M{m} R{r} K{k} {' '.join(f'{key}{value}' for key, value in form.items())}"
            results[name] = error if right else float("inf")
# h and x in order from one launch, as fragments and as planes, with the GEMM's counters beside h's partial sums
for m, r, k, form in (
    (1, 16, 256, {"BM": 1, "BR": 1, "KS": 256, "STEPS": 1, "GROUPS": 0}),
    (5, 32, 512, {"BM": 8, "BR": 1, "KS": 1024, "STEPS": 1, "GROUPS": 0}),
    (7, 16, 1280, {"BM": 16, "BR": 16, "KS": 256, "STEPS": 2, "GROUPS": 4}),
    (16, 48, 1024, {"BM": 16, "BR": 16, "KS": 256, "STEPS": 1, "GROUPS": 1}),
):
    form |= {"num_warps": 1, "num_stages": 2, "DEPENDENT": False}
    lora_down.config = lambda m, k, form=form: form
    x = torch.full((m, k + 48), float("nan"), dtype=torch.float16)[:, 16 : 16 + k].copy_(torch.randn(m, k))
    a = torch.full((r + 16, k), float("nan"), dtype=torch.float16)[16:].copy_(torch.randn(r, k))
    exact = x.double() @ a.double().T
    for fragments in (True, False):
        for counters in (0, 300):
            tokens, used = 8 if m <= 8 else 16, 40 + counters
            if fragments:
                alone = nvfp4_fragments.fragments(x, tokens)
            else:
                blank = x.new_full((nvfp4_permute.permuted_rows(m, k, tokens), 64), 3)
                alone = nvfp4_permute.permute(x, tokens, out=blank)
            out = torch.full_like(alone, 3)
            offset = lead_in.behind(used)
            memory = torch.full((offset + lead_in.sums(m, r, k) + 8,), float("nan"))
            at = counters // 300
            words = torch.tensor([5, 0] if at else [0, 5], dtype=torch.int32)
            order = lead_in.Order(fragments, tokens, out, 40, counters)
            lead_in.arrivals = lambda device, words=words, at=at: Arrivals(words, at, early=True)
            h, arrivals, _, arriving = lead_in.launch(x, a, order, memory, offset, waits=False, triggers=False)
            width = lead_in.lanes(fragments, 1)
            pieces = nvfp4_fragments.programs_for(tokens, k, width) if fragments else m * -(-k // (8 * width))
            right = torch.equal(out.view(torch.int16), alone.view(torch.int16)) and not tickets.any()
            right = right and arriving == 0 and arrivals.tolist() == ([0, pieces] if at else [pieces, 0])
            around = torch.cat((memory[:40], memory[-8:]))
            right = right and bool(memory[40:used].eq(0).all() and around.isnan().all())
            error = ((h.double() - exact).abs().max() / exact.abs().max()).item()
            name = f"lead-in M{m} R{r} K{k} {'fragments' if fragments else 'planes'} {counters} counters"
            results[name] = error if right else float("inf")
print(json.dumps(results))
