"""From the last hidden states to logits, row by row, so that nobody has to make all logits at once.

    logits = transform(head(hidden)),     hidden = backbone(ids)

The backbone is `get_decoder()`, the head `get_output_embeddings()`. What a family does to logits afterwards is in its
code, and only its numbers are in its config: Gemma squashes them (cap * tanh(logits / cap)), Cohere multiplies by
`logit_scale`, Granite divides by `logits_scaling`, and HyperCLOVA X multiplies by a number of the same name. So names
alone decide nothing. They give candidates, and the first batch decides: its first rows run through the whole model and
through each candidate, and the candidate that comes closest is taken if it agrees to rounding.

If none agrees, there is a step between hidden states and logits that we do not know. `completion_logits` then takes
the model's own logits, whole, and says so in a warning: more memory, never a wrong number. Logits that are NaN or all
0 decide nothing; such a batch takes the whole logits without a word, and the next batch is tried again.

The trial costs two forwards of two rows, once per model and process. It runs in the caller's gradient mode, because
compiled layers have a graph for each mode and this way the one they need anyway is made.

What it cannot see: a step that changes nothing on the rows of the trial and something later.

**No mask.** A micro-batch has its prompts padded on the left, so that completions begin in one column. The model gets
every row from its first token on, padding behind it, and no mask: nothing that is causal looks ahead. A mask would cost
a graph of its own beside that for rows which need none, a [B, 1, S, S] of memory, repeated key-value heads, and the
kernels of attention that skip what lies above the diagonal. Columns that are padding in every row are left out.

Shapes: N completion tokens, n some of them, B rows, L longest row (prompt and completion), C completion width, D hidden
width, V vocabulary.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qerl_compile.peft_face import PeftFace
from qerl_compile.rl.policy_batch import MicroBatch
from qerl_compile.rl.rollout.padding import last_positions

# Names in transformers 5.23: Cohere, Falcon-H1, Muse, HyperCLOVA X; Granite; Gemma 2 to 4, nanochat.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling",)
CAP = "final_logit_softcapping"

TRIAL_ROWS, TRIAL_TOKENS = 2, 8


@dataclass(frozen=True)
class LogitTransform:
    """What happens to the head's output, in this order and in its own dtype.

    Args:
        factor: multiplies; None for nothing.
        divisor: divides; None for nothing.
        cap: logits become cap * tanh(logits / cap); None for nothing.
        wide: whether that happens in float32.
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None
    wide: bool = False

    def __call__(self, logits_nV: Tensor) -> Tensor:
        """Return the logits as the model returns them."""
        if self.factor is not None:
            logits_nV = logits_nV * self.factor
        if self.divisor is not None:
            logits_nV = logits_nV / self.divisor
        if self.cap is not None:
            logits_nV = torch.tanh((logits_nV.float() if self.wide else logits_nV) / self.cap) * self.cap
        return logits_nV


@dataclass(frozen=True)
class CompletionLogits:
    """The logits of a batch's completion tokens, made when asked for.

    Args:
        features_NX: hidden states [N, D], or the logits themselves [N, V], in the model's dtype.
        logits: makes logits [n, V] of some rows of `features_NX`.
        vocabulary: V.
    """

    features_NX: Tensor
    logits: Callable[[Tensor], Tensor]
    vocabulary: int


def completion_logits(model: Any, batch: MicroBatch) -> CompletionLogits:
    """Run the model up to its head; keep the positions that predict completion tokens, in the order of `mask_BC`.

    Args:
        model: a causal LM, transformed or not.
        batch: B rows.
    """
    transform = _transform_of(model, batch)
    rows = _Rows.of(batch)
    row_N, column_N = batch.mask_BC.nonzero(as_tuple=True)
    first_B = batch.ids_BS.shape[1] - batch.mask_BC.shape[1] - 1 - rows.start_B  # predicts the row's first token
    at_N = first_B[row_N] + column_N
    if transform is None:
        before = int(first_B.min())
        logits_BKV = model(
            **rows.inputs, logits_to_keep=last_positions(rows.ids_BL, rows.ids_BL.shape[1] - before)
        ).logits
        logits_NV = _select(logits_BKV, row_N, at_N - before)
        return CompletionLogits(logits_NV, lambda logits_nV: logits_nV, logits_NV.shape[1])
    hidden_BLD = model.get_decoder()(**rows.inputs)[0]
    head = _head(model)

    def logits(hidden_nD: Tensor) -> Tensor:
        # With a row dimension, because a head that is compiled has its leading two marked dynamic.
        return transform(head(hidden_nD[None])[0])

    return CompletionLogits(_select(hidden_BLD, row_N, at_N), logits, head.weight.shape[0])


@dataclass(frozen=True)
class _Rows:
    """A micro-batch, or a part of it, as the model gets it: each row from its first token on.

    Attributes:
        ids_BL: int64.
        start_B: int64, columns of the micro-batch before the row's first token.
    """

    ids_BL: Tensor
    start_B: Tensor

    @classmethod
    def of(cls, batch: MicroBatch, rows: slice = slice(None)) -> "_Rows":
        ids_BS, attention_BS = batch.ids_BS[rows], batch.attention_BS[rows]
        start_B = attention_BS.argmax(1)  # the first of equals
        column_L = torch.arange(int(attention_BS.sum(1).max()), device=ids_BS.device)
        column_BL = (start_B[:, None] + column_L).clamp(max=ids_BS.shape[1] - 1)
        return cls(ids_BS.gather(1, column_BL), start_B)

    @property
    def inputs(self) -> dict[str, Any]:
        count, width = self.ids_BL.shape
        positions_BL = torch.arange(width, device=self.ids_BL.device).repeat(count, 1)
        return {"input_ids": self.ids_BL, "position_ids": positions_BL, "use_cache": False}


def _head(model: Any) -> Any:
    """Return the module that makes logits, or None.

    A transformed model does not hand out a head that is packed or adapted, since others multiply by its weight
    (peft_face.py). Here it is only called, and that is right for every kind of head.
    """
    if isinstance(model, PeftFace):
        return super(PeftFace, model).get_output_embeddings()  # pyright: ignore[reportAttributeAccessIssue]
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _select(values_BLX: Tensor, row_N: Tensor, column_N: Tensor) -> Tensor:
    """Return one line per completion token, [N, X], contiguous."""
    return values_BLX.flatten(0, 1).index_select(0, row_N * values_BLX.shape[1] + column_N)


_decided: "weakref.WeakKeyDictionary[Any, tuple[list[LogitTransform], LogitTransform | None]]" = (
    weakref.WeakKeyDictionary()
)


def _transform_of(model: Any, batch: MicroBatch) -> LogitTransform | None:
    """Return what the trial of this model decided, None for whole logits; hold it if the config has changed since."""
    candidates = _candidates(model)
    if model not in _decided or _decided[model][0] != candidates:
        chosen = None
        if candidates:
            rows = _Rows.of(batch, slice(TRIAL_ROWS))
            kept = _trial_positions(rows)
            want_rnV = model(**rows.inputs, logits_to_keep=kept).logits.detach()
            if not want_rnV.any() or want_rnV.isnan().any():
                return None
            chosen = _closest(model, rows, candidates, want_rnV)
        _decided[model] = (candidates, chosen)
        if chosen is None:
            warnings.warn(
                f"{type(model).__name__}: its logits are no known function of its head's output, so log-probabilities "
                "are taken from whole logits [rows, tokens, vocabulary], which need more memory.",
                stacklevel=4,
            )
    return _decided[model][1]


def _trial_positions(rows: _Rows) -> Tensor:
    return last_positions(rows.ids_BL, min(TRIAL_TOKENS, rows.ids_BL.shape[1]))


def _candidates(model: Any) -> list[LogitTransform]:
    """Return what the config's numbers allow, the most that it names first; none if the model has no head to ask."""
    if _head(model) is None or model.get_decoder() is model:
        return []
    config = model.config.get_text_config()
    factors = [{"factor": float(value)} for name in FACTORS if (value := getattr(config, name, None)) is not None]
    divisors = [{"divisor": float(value)} for name in DIVISORS if (value := getattr(config, name, None)) is not None]
    cap = getattr(config, CAP, None)
    caps = [] if cap is None else [{"cap": float(cap)}, {"cap": float(cap), "wide": True}]
    scalings: list[dict[str, Any]] = [*factors, *divisors, {}]
    return [LogitTransform(**scaling, **squash) for squash, scaling in itertools.product([*caps, {}], scalings)]


def _closest(model: Any, rows: _Rows, candidates: list[LogitTransform], want_rnV: Tensor) -> LogitTransform | None:
    """Return the candidate that gives the model's own logits [rows, tokens, V] of the trial, or None."""
    try:
        hidden_rLD = model.get_decoder()(**rows.inputs)[0].detach()
    except TypeError:  # it does not take what the whole model takes
        return None
    head_rnV = _head(model)(hidden_rLD[:, _trial_positions(rows)]).detach()
    if head_rnV.shape != want_rnV.shape:
        return None
    finite = want_rnV.isfinite()
    # Same shapes run the same kernels, so the right candidate is usually equal bit by bit; two units of the dtype, and
    # 1e-5 for float32, leave room for kernels that add in another order.
    tolerance = max(2 * torch.finfo(want_rnV.dtype).eps, 1e-5) * float(want_rnV[finite].abs().max())

    def distance(transform: LogitTransform) -> float:
        got_rnV = transform(head_rnV).float()
        same = torch.where(finite, (got_rnV - want_rnV.float()).abs(), torch.where(got_rnV == want_rnV, 0.0, torch.inf))
        return float(same.max())

    best = min(candidates, key=distance)
    return best if distance(best) <= tolerance else None
