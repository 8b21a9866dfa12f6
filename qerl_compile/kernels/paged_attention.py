"""Attention over a paged KV cache: two operators, `qerl::paged_decode` (one new token a row) and `qerl::paged_write`.

A cache of one layer is two tensors of pages, each page holding PAGE consecutive positions of one row for every kv head:

    position t of row b   lies in   pages[table[b, t // PAGE], :, t % PAGE]        [J, D]

Rows own their last page and may share earlier ones (a prompt's pages, by all samples of its group), so no operator here
writes anywhere but at the positions of this call. Entries of `table` past a row's last page, and the rest of its last
page, may hold anything, NaN included.

`paged_decode` writes the new k and v at position length - 1 and attends there and to everything before:

    s[t] = scaling * q[h] . k[t, h // (H / J)]        max(0, length - window) <= t < length;  window 0: all
    y[h] = sum_t softmax(s)[t] v[t, h // (H / J)]     softmax and sums in float32

Why one operator and not a write followed by a read: the kernel has the new k and v at hand, so no program waits for
another's write, and a layer has one launch less. Why lengths are a tensor on the device: a CUDA graph is captured once
and replayed while rows grow, end and are replaced. A row of length 0 is idle: nothing of it is read or written, and its
output is 0.

With `cos`, `sin` and `bias` the call brings q, k and v as the projections left them. Before anything else

    q, k, v += bias                                   [H + 2 J, D]: heads of q, then of k, then of v
    q, k = x cos + (-x[D/2:], x[:D/2]) sin            float32 throughout, rounded to the dtype once

What was a kernel each for q, k and v is a few instructions of this one (passes/rotary.py).

`paged_write` is for prefill: k and v of many positions, from 0 on, right-padded. Attention there is torch's own over
the call's k and v, which needs no page.

The bodies below are plain torch, right on every device and slow; paged_cpu.py and paged_cuda.py replace them.

What is checked: dtypes, shapes, strides, devices. Lengths and page numbers are data: the CPU form checks them, the CUDA
form trusts them, as it may not wait for the device.

Legend: B rows, H query heads, J kv heads, G = H / J, D head dimension, T positions, P pages of a row at most.
"""

import torch
from torch import Tensor

from qerl_compile.errors import FormatError
from qerl_compile.kernels.checks import ACTIVATION_DTYPES, describe

DECODE, WRITE = "qerl::paged_decode", "qerl::paged_write"


@torch.library.custom_op(DECODE, mutates_args=("pages_k", "pages_v"))
def paged_decode(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    scaling: float,
    window: int,
    cos_BD: Tensor | None = None,
    sin_BD: Tensor | None = None,
    bias_XD: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per row; writes its k and v into the row's last page.

    Args:
        q_BHD: [B, H, D], any strides.
        k_BJD: [B, J, D], any strides; H is a multiple of J.
        v_BJD: [B, J, D], any strides.
        pages_k: [pages, J, PAGE, D], pages contiguous; mutated.
        pages_v: as pages_k; mutated.
        table_BP: int32 [B, P], page numbers of each row in order of position.
        length_B: int32 [B], positions of each row with the new one; 0 for an idle row; at most P * PAGE.
        scaling: multiplies q . k.
        window: positions that a token sees, itself included; 0 for all.
        cos_BD: [B, D] or, for all rows alike, [1, D], in the dtype of q; None if q and k are rotated already.
        sin_BD: as cos_BD.
        bias_XD: [H + 2 J, D] in the dtype of q, contiguous; None if q, k and v have none or have it already.

    Returns:
        [B, H, D], dtype of q, contiguous.

    Raises:
        FormatError: a dtype, shape, stride or device does not fit the others; on CPU also a length or a page number.
    """
    check_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, window)
    check_before(q_BHD, k_BJD, cos_BD, sin_BD, bias_XD)
    check_rows(DECODE, q_BHD, k_BJD, v_BJD, table_BP, length_B)
    check_rotary_rows(cos_BD, sin_BD, length_B)
    q_BHD, k_BJD, v_BJD = finished(q_BHD, k_BJD, v_BJD, cos_BD, sin_BD, bias_XD)
    return reference_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, scaling, window)


@torch.library.custom_op(WRITE, mutates_args=("pages_k", "pages_v"))
def paged_write(
    k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor
) -> None:
    """Write positions 0 to length - 1 of each row into its pages.

    Args:
        k_BJTD: [B, J, T, D], any strides; what lies at length and later is not read.
        v_BJTD: [B, J, T, D], any strides.
        pages_k: [pages, J, PAGE, D], pages contiguous; mutated.
        pages_v: as pages_k; mutated.
        table_BP: int32 [B, P], page numbers of each row in order of position.
        length_B: int32 [B], at most T and P * PAGE; 0 for an idle row.

    Raises:
        FormatError: as `paged_decode`.
    """
    check_write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)
    check_rows(WRITE, k_BJTD, v_BJTD, table_BP, length_B)
    reference_write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)


@paged_decode.register_fake
def _(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    scaling: float,
    window: int,
    cos_BD: Tensor | None = None,
    sin_BD: Tensor | None = None,
    bias_XD: Tensor | None = None,
) -> Tensor:
    check_decode(q_BHD, k_BJD, v_BJD, pages_k, pages_v, table_BP, length_B, window)
    check_before(q_BHD, k_BJD, cos_BD, sin_BD, bias_XD)
    return q_BHD.new_empty(q_BHD.shape)


@paged_write.register_fake
def _(k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor) -> None:
    check_write(k_BJTD, v_BJTD, pages_k, pages_v, table_BP, length_B)


def reference_decode(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    scaling: float,
    window: int,
) -> Tensor:
    """`paged_decode` row by row, unchecked; reads the lengths, so it cannot be captured in a CUDA graph."""
    heads_kv, page, d = pages_k.shape[1:]
    wide = torch.promote_types(q_BHD.dtype, torch.float32)
    y_BHD = q_BHD.new_zeros(q_BHD.shape)
    for row, length in enumerate(length_B.tolist()):
        if length == 0:
            continue
        last, first = length - 1, max(0, length - window) if window else 0
        numbers = table_BP[row, first // page : last // page + 1].long()
        seen = slice(first % page, length - first // page * page)
        pages_k[numbers[-1], :, last % page] = k_BJD[row]
        pages_v[numbers[-1], :, last % page] = v_BJD[row]
        k_JTD, v_JTD = (pages[numbers].transpose(0, 1).flatten(1, 2)[:, seen].to(wide) for pages in (pages_k, pages_v))
        q_JGD = q_BHD[row].reshape(heads_kv, -1, d).to(wide)
        weights_JGT = (q_JGD @ k_JTD.mT * scaling).softmax(-1)
        y_BHD[row] = (weights_JGT @ v_JTD).flatten(0, 1)
    return y_BHD


def finished(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    cos_BD: Tensor | None,
    sin_BD: Tensor | None,
    bias_XD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with bias and rotary embedding, as the module's essay defines it; themselves without either."""
    if cos_BD is None and bias_XD is None:
        return q_BHD, k_BJD, v_BJD
    dtype, sizes = q_BHD.dtype, [x.shape[1] for x in (q_BHD, k_BJD, v_BJD)]
    x_BXD = torch.cat([q_BHD, k_BJD, v_BJD], 1).to(torch.promote_types(dtype, torch.float32))
    if bias_XD is not None:
        x_BXD = x_BXD + bias_XD
    x_BYD, v_BJD = x_BXD.split([sizes[0] + sizes[1], sizes[2]], 1)
    if cos_BD is not None and sin_BD is not None:
        low, high = x_BYD.chunk(2, -1)
        x_BYD = x_BYD * cos_BD[:, None] + torch.cat([-high, low], -1) * sin_BD[:, None]
    return (*x_BYD.to(dtype).split(sizes[:2], 1), v_BJD.to(dtype))  # pyright: ignore[reportReturnType]


def reference_write(
    k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor
) -> None:
    """`paged_write` row by row, unchecked."""
    page = pages_k.shape[2]
    for row, length in enumerate(length_B.tolist()):
        position = torch.arange(length, device=pages_k.device)
        numbers = table_BP[row].long()[position // page]
        pages_k[numbers, :, position % page] = k_BJTD[row, :, :length].transpose(0, 1)
        pages_v[numbers, :, position % page] = v_BJTD[row, :, :length].transpose(0, 1)


def check_decode(
    q_BHD: Tensor,
    k_BJD: Tensor,
    v_BJD: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table_BP: Tensor,
    length_B: Tensor,
    window: int,
) -> None:
    """Refuse what `paged_decode` cannot take; batch sizes are left to `check_rows`, as they may be symbols."""
    _check_cache(DECODE, pages_k, pages_v, table_BP, length_B)
    _check_new(DECODE, ("k", "v"), (k_BJD, v_BJD), pages_k, 3)
    heads_kv, d = pages_k.shape[1], pages_k.shape[3]
    if q_BHD.dim() != 3 or q_BHD.shape[1] % heads_kv or q_BHD.shape[2] != d or not _alike(q_BHD, pages_k):
        raise FormatError(
            where=DECODE,
            expected=f"q [B, H, {d}] with H a multiple of {heads_kv}, dtype and device as the pages",
            got=f"q {describe(q_BHD)} on {q_BHD.device}",
            do="Pass the query of one position per row, heads before head dimension.",
        )
    if window < 0:
        raise FormatError(
            where=DECODE,
            expected="window >= 0",
            got=str(window),
            do="Pass the number of positions that a token sees, itself included, or 0 for all.",
        )


def check_before(
    q_BHD: Tensor, k_BJD: Tensor, cos_BD: Tensor | None, sin_BD: Tensor | None, bias_XD: Tensor | None
) -> None:
    """Refuse a rotary embedding or a bias that does not fit q, k and v; rows are left to `check_rows`."""
    d, heads = q_BHD.shape[2], q_BHD.shape[1] + 2 * k_BJD.shape[1]
    tables = [x for x in (cos_BD, sin_BD) if x is not None]
    fits = all(x.dim() == 2 and x.shape[1] == d and _alike(x, q_BHD) for x in tables)
    if tables and (d % 2 or len(tables) == 1 or not fits):
        raise FormatError(
            where=DECODE,
            expected=f"cos and sin [B or 1, {d}] with an even {d}, dtype and device as q; or neither",
            got=" and ".join("None" if x is None else f"{describe(x)} on {x.device}" for x in (cos_BD, sin_BD)),
            do="Pass both halves of the rotary embedding, one line per row, or rotate q and k before the call.",
        )
    if bias_XD is not None and not (bias_XD.shape == (heads, d) and _alike(bias_XD, q_BHD) and bias_XD.is_contiguous()):
        raise FormatError(
            where=DECODE,
            expected=f"bias [{heads}, {d}] for the heads of q, k and v, contiguous, dtype and device as q",
            got=f"{describe(bias_XD)}, strides {bias_XD.stride()}, on {bias_XD.device}",
            do="Pass the biases of q, k and v one after the other, or add them before the call.",
        )


def check_write(
    k_BJTD: Tensor, v_BJTD: Tensor, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor
) -> None:
    """Refuse what `paged_write` cannot take; batch sizes are left to `check_rows`, as they may be symbols."""
    _check_cache(WRITE, pages_k, pages_v, table_BP, length_B)
    _check_new(WRITE, ("k", "v"), (k_BJTD, v_BJTD), pages_k, 4)


def check_rows(where: str, *tensors: Tensor) -> None:
    """Refuse tensors that do not all have the same number of rows."""
    rows = tensors[-1].shape[0]
    if any(tensor.shape[0] != rows for tensor in tensors):
        raise FormatError(
            where=where,
            expected=f"{rows} rows in every tensor, as in length_B",
            got=", ".join(describe(tensor) for tensor in tensors),
            do="Slice the page table and the lengths to the rows of this call.",
        )


def check_rotary_rows(cos_BD: Tensor | None, sin_BD: Tensor | None, length_B: Tensor) -> None:
    """Refuse cos and sin with neither one row nor those of the batch."""
    for x in (cos_BD, sin_BD):
        if x is not None and x.shape[0] != 1:
            check_rows(DECODE, x, length_B)


def refuse_row(where: str, row: int, pages_k: Tensor, table_BP: Tensor, length_B: Tensor, limit: int) -> None:
    """Raise the error for a row whose length or page numbers are out of range.

    Args:
        where: operator name.
        row: its index.
        pages_k: for the number of pages.
        table_BP: for what the row holds.
        length_B: for what the row holds.
        limit: longest length that the call allows.
    """
    page = pages_k.shape[2]
    length = int(length_B[row])
    numbers = table_BP[row, : max(0, -(-length // page))].tolist()
    raise FormatError(
        where=f"{where}, row {row}",
        expected=f"a length from 0 to {limit} and page numbers from 0 to {pages_k.shape[0] - 1}",
        got=f"length {length}, pages {numbers}",
        do="Give the row as many pages as its length takes before the call; set idle rows to length 0.",
    )


def _check_cache(where: str, pages_k: Tensor, pages_v: Tensor, table_BP: Tensor, length_B: Tensor) -> None:
    fits = pages_k.dim() == 4 and pages_k.dtype in ACTIVATION_DTYPES and pages_k.shape == pages_v.shape
    if not fits or not _alike(pages_v, pages_k) or not _whole(pages_k) or not _whole(pages_v):
        raise FormatError(
            where=where,
            expected="pages_k and pages_v alike: floating point [pages, J, PAGE, D], each page contiguous",
            got=f"{describe(pages_k)}, strides {pages_k.stride()}, and {describe(pages_v)}, strides {pages_v.stride()}",
            do="Pass one layer's view of the cache as the engine allocates it.",
        )
    table_fits = table_BP.dtype is torch.int32 and table_BP.dim() == 2 and table_BP.stride(1) == 1
    length_fits = length_B.dtype is torch.int32 and length_B.dim() == 1 and length_B.stride(0) == 1
    here = table_BP.device == pages_k.device == length_B.device
    if not (table_fits and length_fits and here):
        raise FormatError(
            where=where,
            expected=f"table_BP int32 [B, P] and length_B int32 [B], rows contiguous, on {pages_k.device}",
            got=f"{describe(table_BP)} on {table_BP.device} and {describe(length_B)} on {length_B.device}",
            do="Convert them once, where they are made.",
        )


def _check_new(where: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], pages: Tensor, dims: int) -> None:
    heads_kv, d = pages.shape[1], pages.shape[3]
    for name, new in zip(names, tensors, strict=True):
        if new.dim() != dims or new.shape[1] != heads_kv or new.shape[-1] != d or not _alike(new, pages):
            middle = "" if dims == 3 else "T, "
            raise FormatError(
                where=where,
                expected=f"{name} [B, {heads_kv}, {middle}{d}], dtype and device as the pages",
                got=f"{name} {describe(new)} on {new.device}, pages {describe(pages)} on {pages.device}",
                do="Allocate the cache for this model's kv heads, head dimension, dtype and device.",
            )


def _alike(tensor: Tensor, pages: Tensor) -> bool:
    return tensor.dtype == pages.dtype and tensor.device == pages.device


def _whole(pages: Tensor) -> bool:
    _, _, page, d = pages.shape
    return pages.stride(3) == 1 and pages.stride(2) == d and pages.stride(1) == page * d
