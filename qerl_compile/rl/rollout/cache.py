"""Keys and values of all layers in pages, and how a forward of the Hugging Face model reaches them.

transformers lets anyone register an attention function and hands unknown keyword arguments of `model(...)` down to it.
So a rollout calls `model(..., qerl_cache=VIEW)` while the model's attention implementation is ours, and no model code
is touched. A view is a batch's way of looking at the pages:

    DecodeView     B rows, one new token each: write its key and value, attend to the row's pages     (one operator)
    PrefillView    the tokens of several prompts one after the other, [1, N]: no padding in any linear; attention pads
                   them to a rectangle, where a causal mask is enough since the padding comes last

`view.layer(i)` is the part of one layer. A compiled region gets that part and not the view (region_calls.py): an index
would become a guard, one graph per layer.

No mask is registered beside the attention function, on purpose: transformers then builds none, and with it skips code
that looks at tensors' values and would break a CUDA graph.

What this module does not do: decide which pages a row gets (schedule.py, pages.py).

Shapes: B rows or prompts, N prompt tokens, T of the longest prompt, H query heads, J kv heads, D head size, P pages of
a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.errors import ModelError
from qerl_compile.isolation import mark_dynamic
from qerl_compile.kernels import paged_attention as _paged_attention  # noqa: F401  # registers qerl::paged_*

ATTENTION = "qerl_paged"
"""The name under which transformers knows our attention function."""


@dataclass(frozen=True)
class CacheShape:
    """What a page holds.

    Args:
        layers: decoder layers.
        kv_heads: J.
        head_dim: D.
        page_tokens: positions of a page.
        dtype: of keys and values.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: its keys and its values, in all layers."""
        return self.layers * 2 * self.kv_heads * self.page_tokens * self.head_dim * self.dtype.itemsize

    @classmethod
    def of(cls, model: Any, page_tokens: int) -> "CacheShape":
        """Read the shape off a model's config; the dtype is that of its embedding.

        Raises:
            ModelError: the model caps its attention scores, which no kernel here does, or its keys are wider than its
                values (DeepSeek's latent attention). `attend` would say so too, but within a compiled region nobody
                could read it.
        """
        config = model.config.get_text_config()
        if getattr(config, "attn_logit_softcapping", None) is not None:
            raise _not_computed(type(model).__name__, "softcap")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths = getattr(config, "qk_head_dim", None) or head_dim, getattr(config, "v_head_dim", None) or head_dim
        if widths != (head_dim, head_dim):
            raise ModelError(
                where=f"{type(model).__name__}: attention",
                expected=f"keys and values as wide as head_dim, {head_dim}, which is how pages hold them",
                got=f"keys of {widths[0]} and values of {widths[1]}",
                do="Use HuggingFaceSampler for this model.",
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dtype = model.get_input_embeddings().weight.dtype
        return cls(config.num_hidden_layers, heads, head_dim, page_tokens, dtype)


class PagedCache:
    """The pages of all layers: per layer two tensors [pages, J, PAGE, D]."""

    def __init__(self, shape: CacheShape, pages: int, device: torch.device) -> None:
        # Dynamo specialises size 1, so there are two pages at least.
        size = (max(2, pages), shape.kv_heads, shape.page_tokens, shape.head_dim)
        self.shape, self.pages = shape, pages
        self.keys, self.values = ([_zeros(size, shape.dtype, device) for _ in range(shape.layers)] for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(pages.nbytes for pages in (*self.keys, *self.values))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to), in all layers."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.keys[0].device).T
        for pages in (*self.keys, *self.values):
            pages[target] = pages[source]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    pages = torch.zeros(size, dtype=dtype, device=device)
    mark_dynamic(pages, (0,))  # a larger cache needs no other graph
    return pages


class DecodeLayer:
    """One layer's pages for rows that get one token each."""

    def __init__(self, keys: Tensor, values: Tensor, table_BP: Tensor, length_B: Tensor) -> None:
        self.pages_k, self.pages_v, self.table_BP, self.length_B = keys, values, table_BP, length_B

    def attend(self, q_BHTD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, scaling: float, window: int) -> Tensor:
        """Write this token's key and value; return what it sees, [B, 1, H, D]."""
        new = (x.squeeze(2) for x in (q_BHTD, k_BJTD, v_BJTD))
        pages = (self.pages_k, self.pages_v, self.table_BP, self.length_B)
        return torch.ops.qerl.paged_decode(*new, *pages, scaling, window).unsqueeze(1)


class PrefillLayer:
    """One layer's pages for whole prompts, packed one after the other."""

    def __init__(
        self, keys: Tensor, values: Tensor, table_BP: Tensor, length_B: Tensor, pad_BT: Tensor, pack_N: Tensor
    ) -> None:
        self.pages_k, self.pages_v, self.table_BP, self.length_B = keys, values, table_BP, length_B
        self.pad_BT, self.pack_N = pad_BT, pack_N

    def attend(self, q_1HND: Tensor, k_1JND: Tensor, v_1JND: Tensor, scaling: float, window: int) -> Tensor:
        """Write the prompts' keys and values; return causal attention within each prompt, [1, N, H, D]."""
        q, k, v = (x[0, :, self.pad_BT].transpose(0, 1) for x in (q_1HND, k_1JND, v_1JND))  # [B, heads, T, D]
        torch.ops.qerl.paged_write(k, v, self.pages_k, self.pages_v, self.table_BP, self.length_B)
        mask_TT = _band(q.shape[2], window, q.device) if window else None
        grouped = q.shape[1] != k.shape[1]
        y_BHTD = nn.functional.scaled_dot_product_attention(
            q, k, v, mask_TT, is_causal=mask_TT is None, scale=scaling, enable_gqa=grouped
        )
        return y_BHTD.transpose(1, 2).flatten(0, 1)[self.pack_N][None]


def _band(size: int, window: int, device: torch.device) -> Tensor:
    """Which positions see which: themselves and the window - 1 before, bool [T, T]."""
    at = torch.arange(size, device=device)
    back_TT = at[:, None] - at
    return (back_TT >= 0) & (back_TT < window)


class DecodeView:
    """B rows of a running batch; the tensors are the engine's own, so changes in place are seen."""

    def __init__(self, cache: PagedCache, table_BP: Tensor, length_B: Tensor) -> None:
        self.cache, self.table_BP, self.length_B = cache, table_BP, length_B

    def layer(self, index: int) -> DecodeLayer:
        """The part of one layer."""
        return DecodeLayer(self.cache.keys[index], self.cache.values[index], self.table_BP, self.length_B)


class PrefillView:
    """Several prompts in one row of tokens.

    Dynamo specialises sizes 0 and 1, so there are always two prompts, positions, pages and tokens at least: an idle
    prompt and a padding token make up the number. One graph then serves every prefill.

    Args:
        cache: the pages.
        prompts: token ids, in the order in which they are packed.
        pages: page numbers of each prompt, in order of position.
    """

    def __init__(self, cache: PagedCache, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]]) -> None:
        device = cache.keys[0].device
        tokens = [(token, t) for prompt in prompts for t, token in enumerate(prompt)]
        lengths = [len(prompt) for prompt in prompts]
        ends = list(accumulate(lengths))
        starts = [0, *ends[:-1]]
        if len(prompts) == 1:
            lengths, starts = [*lengths, 0], [*starts, 0]
        tokens += [(0, 0)] * (len(tokens) == 1)
        widest, most = max(2, *lengths), max(2, *map(len, pages))
        pad = [[start + max(0, min(t, n - 1)) for t in range(widest)] for start, n in zip(starts, lengths, strict=True)]
        pack = [row * widest + t for row, length in enumerate(lengths) for t in range(length)]
        pack += [0] * (len(tokens) - len(pack))
        table = [[*row, *[0] * (most - len(row))] for row in (*pages, *[()] * (len(lengths) - len(pages)))]

        def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.cache = cache
        self.ids_1N, self.positions_1N = (
            tensor([token for token, _ in tokens])[None],
            tensor([t for _, t in tokens])[None],
        )
        self.last = tensor([end - 1 for end in ends])
        self.pad_BT, self.pack_N = tensor(pad), tensor(pack)
        mark_dynamic(self.pad_BT, (0, 1))  # the other two are marked by region_calls.py
        mark_dynamic(self.pack_N, (0,))
        self.table_BP, self.length_B = tensor(table, torch.int32), tensor(lengths, torch.int32)

    def layer(self, index: int) -> PrefillLayer:
        """The part of one layer."""
        pages = self.cache.keys[index], self.cache.values[index]
        return PrefillLayer(*pages, self.table_BP, self.length_B, self.pad_BT, self.pack_N)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    qerl_cache: Any = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; see the module's essay.

    Raises:
        ModelError: the model asks for attention that no kernel here computes, or brings a mask.
    """
    unknown = [name for name in ("softcap", "s_aux", "head_mask") if given.get(name) is not None]
    unknown += ["attention_mask"] if attention_mask is not None else []
    if unknown or qerl_cache is None:
        raise _not_computed(type(module).__name__, ", ".join(unknown) or "a call without its cache")
    layer = qerl_cache.layer(module.layer_idx) if hasattr(qerl_cache, "layer") else qerl_cache
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, scaling, sliding_window or 0), None


def _not_computed(where: str, got: str) -> ModelError:
    return ModelError(
        where=f"rollout: {where}",
        expected="plain causal attention, with or without a sliding window, called by the rollout engine",
        got=got,
        do="Use HuggingFaceSampler for this model.",
    )


@contextmanager
def paged_attention(model: Any) -> Iterator[None]:
    """Let `model` use our attention function; on the way out it has its own again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
