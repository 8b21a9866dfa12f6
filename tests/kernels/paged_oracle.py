"""Caches to attend over, and what attention over them is: torch's own, in float64, over keys gathered one by one.

A cache made here is poisoned: whatever no live position of a row holds is NaN, and a page table is full of page numbers
that do not exist from a row's last page on. Rows may share pages; `shared` leading pages are the same for all rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NO_PAGE = 2**30


@dataclass
class Case:
    """Arguments of the operators, in their order, and how to read them."""

    q_BHD: Tensor
    k_BJD: Tensor
    v_BJD: Tensor
    pages_k: Tensor
    pages_v: Tensor
    table_BP: Tensor
    length_B: Tensor
    scaling: float
    window: int

    @property
    def args(self):
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def copy(self):
        return replace(self, pages_k=self.pages_k.clone(), pages_v=self.pages_v.clone())

    def row(self, b):
        """The same cache with row b alone."""
        new = {n: getattr(self, n)[b : b + 1] for n in ("q_BHD", "k_BJD", "v_BJD", "table_BP", "length_B")}
        return replace(self.copy(), **new)


def make_case(heads, heads_kv, d, page, lengths, *, window=0, dtype=torch.float32, device="cpu", shared=0, spread=1.0):
    """A poisoned cache with room for the longest row and one page more; q, k, v are views of one fused tensor."""
    rows = len(lengths)
    most = -(-max(lengths) // page) + 1
    pages = rows * most + 2
    order = torch.randperm(pages)
    table_BP = torch.full((rows, most), NO_PAGE)
    for b, length in enumerate(lengths):
        used = -(-length // page)
        table_BP[b, :used] = order[b * most : b * most + used]
        common = min(shared, max(0, length - 1) // page)
        table_BP[b, :common] = order[-shared:][:common] if shared else table_BP[b, :common]
    pages_k, pages_v = (torch.full((pages, heads_kv, page, d), float("nan"), dtype=dtype) for _ in "kv")
    for b, length in enumerate(lengths):
        t = torch.arange(max(0, length - 1))
        for cache in (pages_k, pages_v):
            at = table_BP[b][t // page], slice(None), t % page
            cache[at] = (torch.randn(len(t), heads_kv, d) * spread).to(dtype)
    fused = (torch.randn(rows, (heads + 2 * heads_kv) * d) * spread).to(dtype).to(device)
    q, k, v = fused.split([heads * d, heads_kv * d, heads_kv * d], dim=1)
    return Case(
        q.unflatten(1, (heads, d)),
        k.unflatten(1, (heads_kv, d)),
        v.unflatten(1, (heads_kv, d)),
        pages_k.to(device),
        pages_v.to(device),
        table_BP.int().to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        d**-0.5,
        window,
    )


def expected(case):
    """float64 [B, H, D] by scaled_dot_product_attention; reads the cache as it is before the call."""
    page = case.pages_k.shape[2]
    y = torch.zeros(case.q_BHD.shape, dtype=torch.float64, device=case.q_BHD.device)
    for b, length in enumerate(case.length_B.tolist()):
        if not length:
            continue
        t = torch.arange(max(0, length - case.window) if case.window else 0, length - 1, device=y.device)
        numbers = case.table_BP[b].long()[t // page]
        k, v = (
            torch.cat([cache[numbers, :, t % page], new[b : b + 1]]).double().transpose(0, 1)
            for cache, new in ((case.pages_k, case.k_BJD), (case.pages_v, case.v_BJD))
        )
        q = case.q_BHD[b, :, None].double()
        y[b] = scaled_dot_product_attention(q, k, v, scale=case.scaling, enable_gqa=True)[:, 0]
    return y


def written(case):
    """The pages after the call: the new k and v of every live row in their place, everything else as before."""
    after = case.copy()
    page = case.pages_k.shape[2]
    for b, length in enumerate(case.length_B.tolist()):
        if length:
            number = case.table_BP[b, (length - 1) // page]
            after.pages_k[number, :, (length - 1) % page] = case.k_BJD[b]
            after.pages_v[number, :, (length - 1) % page] = case.v_BJD[b]
    return after.pages_k, after.pages_v


def same_bits(a, b):
    """Equal bit by bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def error(got, exact):
    """Largest difference over the largest value."""
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()
