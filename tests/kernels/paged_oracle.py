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
    cos_BD: Tensor | None = None
    sin_BD: Tensor | None = None
    bias_XD: Tensor | None = None

    @property
    def args(self):
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def copy(self):
        return replace(self, pages_k=self.pages_k.clone(), pages_v=self.pages_v.clone())

    def row(self, b):
        """The same cache with row b alone."""
        per_row = ["q_BHD", "k_BJD", "v_BJD", "table_BP", "length_B"]
        per_row += ["cos_BD", "sin_BD"] if self.cos_BD is not None else []
        new = {n: getattr(self, n)[b : b + 1] for n in per_row}
        return replace(self.copy(), **new)


def make_case(
    heads, heads_kv, d, page, lengths, *, window=0, dtype=torch.float32, device="cpu", shared=0, spread=1.0,
    rotary=False, bias=False,
):  # fmt: skip
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
    cos, sin = torch.randn(2, rows, d).to(dtype).to(device) if rotary else (None, None)
    added = torch.randn(heads + 2 * heads_kv, d).to(dtype).to(device) if bias else None
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
        cos,
        sin,
        added,
    )


def finished(case):
    """q, k and v with bias and rotary embedding, computed in float64 pair by pair and rounded to the dtype once."""
    sizes = [x.shape[1] for x in (case.q_BHD, case.k_BJD, case.v_BJD)]
    x = torch.cat([case.q_BHD, case.k_BJD, case.v_BJD], 1).double()
    if case.bias_XD is not None:
        x += case.bias_XD.double()
    q, k, v = x.split(sizes, 1)
    if case.cos_BD is not None:
        half = x.shape[2] // 2
        cos, sin = case.cos_BD.double()[:, None], case.sin_BD.double()[:, None]
        for part in (q, k):
            for i in range(half):
                low, high = part[..., i].clone(), part[..., i + half].clone()
                part[..., i] = low * cos[..., i] - high * sin[..., i]
                part[..., i + half] = high * cos[..., i + half] + low * sin[..., i + half]
    return tuple(part.to(case.q_BHD.dtype) for part in (q, k, v))


def expected(case):
    """float64 [B, H, D] by scaled_dot_product_attention; reads the cache as it is before the call."""
    page = case.pages_k.shape[2]
    new_q, new_k, new_v = finished(case)
    y = torch.zeros(case.q_BHD.shape, dtype=torch.float64, device=case.q_BHD.device)
    for b, length in enumerate(case.length_B.tolist()):
        if not length:
            continue
        t = torch.arange(max(0, length - case.window) if case.window else 0, length - 1, device=y.device)
        numbers = case.table_BP[b].long()[t // page]
        k, v = (
            torch.cat([cache[numbers, :, t % page], new[b : b + 1]]).double().transpose(0, 1)
            for cache, new in ((case.pages_k, new_k), (case.pages_v, new_v))
        )
        q = new_q[b, :, None].double()
        y[b] = scaled_dot_product_attention(q, k, v, scale=case.scaling, enable_gqa=True)[:, 0]
    return y


def written(case):
    """The pages after the call: the new k and v of every live row in their place, everything else as before."""
    after = case.copy()
    _, new_k, new_v = finished(case)
    page = case.pages_k.shape[2]
    for b, length in enumerate(case.length_B.tolist()):
        if length:
            number = case.table_BP[b, (length - 1) // page]
            after.pages_k[number, :, (length - 1) % page] = new_k[b]
            after.pages_v[number, :, (length - 1) % page] = new_v[b]
    return after.pages_k, after.pages_v


def same_bits(a, b):
    """Equal bit by bit, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rounded_alike(got, want):
    """Equal but for the last bit of some elements, NaN in the same places: sums in float32 against sums in float64."""
    ulps = 8 if got.dtype == torch.float32 else 1  # where terms cancel, float32 keeps fewer bits of the difference
    size = torch.maximum(want.abs(), torch.tensor(1.0)).nan_to_num(1.0)
    close = ((got - want).abs() <= ulps * torch.finfo(got.dtype).eps * size) | (got.isnan() & want.isnan())
    return bool(close.all())


def error(got, exact):
    """Largest difference over the largest value."""
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()
