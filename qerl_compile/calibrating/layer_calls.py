"""Decoder layers called one at a time, on all samples, each on the outputs of the one before.

A model's own forward decides what its layers are called with: masks, rotary tables, which differ between layers in
some models (Gemma's sliding windows). Instead of rebuilding that, the model is run once per batch with every layer's
forward replaced, for that call, by a note-taker that hands the hidden states on. No layer computes; embeddings, masks
and rotary tables do, and each layer's arguments are known. Afterwards a layer can be called by itself.

That works where a layer gets the hidden states that the one before returned, and is checked: the very same tensor has
to come in. All transformers causal LMs but a few (Gemma 3n, Falcon-H1) are so.

Arguments that are equal from batch to batch are kept once. Hidden states are kept on the CPU in the model's dtype;
only the batch that is computed lies on the device.

What this module does not do: decide what is done with the outputs (running.py).

Shape suffixes: S samples, B samples of a batch, T tokens, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qerl_compile.errors import GraphError

TOKENS_AT_ONCE = 4096


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerCalls:
    """The arguments of every layer, and the hidden states before the layer that comes next.

    Args:
        model: weights outside the decoder layers are on the device; those of layers may be on meta.
        layers: module paths of the decoder layers, in order.
        rows_ST: int64 token ids, without padding.

    Raises:
        GraphError: something is computed between two layers.
    """

    def __init__(self, model: Any, layers: Sequence[str], rows_ST: Tensor) -> None:
        self.model, self.layers = model, [model.get_submodule(path) for path in layers]
        self.device = model.get_input_embeddings().weight.device
        per_batch = max(1, TOKENS_AT_ONCE // rows_ST.shape[1])
        self.batches = rows_ST.split(per_batch)
        self.hidden: list[Tensor] = []
        self.calls: list[list[_Call]] = []
        known: list[Tensor] = []
        for ids_BT in self.batches:
            self._run_model(ids_BT, notes := _Notes(layers, known))
            self.hidden.append(notes.hidden_BTH.cpu())
            self.calls.append(notes.calls)

    def outputs(self, index: int, cache: object | None = None) -> Iterator[Tensor]:
        """Call layer `index` on each batch of hidden states; yield its outputs [B, T, H], on the device.

        Args:
            index: of the layer.
            cache: what attention shall take for its cache (`past_key_values`); None for none.
        """
        for calls, hidden_BTH in zip(self.calls, self.hidden, strict=True):
            args, kwargs = calls[index]
            if cache is not None:
                kwargs = {**kwargs, "past_key_values": cache}
            out = self.layers[index](hidden_BTH.to(self.device), *args, **kwargs)
            yield out[0] if isinstance(out, tuple) else out

    def run_rest(self) -> None:
        """Run the model on each batch with the hidden states in the place of the layers' work: head and all."""
        for ids_BT, final_BTH in zip(self.batches, self.hidden, strict=True):
            self._run_model(ids_BT, lambda hidden_BTH, *_, final=final_BTH: final.to(hidden_BTH))

    def _run_model(self, ids_BT: Tensor, note: Callable[[Tensor, Any, Any], Tensor]) -> None:
        with _forwards_replaced(self.layers, note):
            self.model(input_ids=ids_BT.to(self.device), use_cache=False)


class _Notes:
    """What each layer was called with in one run of the model: called in their place, hands the hidden states on."""

    def __init__(self, layers: Sequence[str], known: list[Tensor]) -> None:
        self.layers, self.known = layers, known
        self.calls: list[_Call] = []
        self.hidden_BTH = torch.empty(0)

    def __call__(self, hidden_BTH: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not self.calls:
            self.hidden_BTH = hidden_BTH
        if hidden_BTH is not self.hidden_BTH:
            raise GraphError(
                where=self.layers[len(self.calls)],
                expected="a layer that gets what the one before returned",
                got="other hidden states, computed in between",
                do="Use qerl_compile.load with a recipe that needs no sample text.",
            )
        self.calls.append(_Call(_kept_once(args, self.known), _kept_once(kwargs, self.known)))
        return hidden_BTH


@contextmanager
def _forwards_replaced(layers: Sequence[nn.Module], note: Callable[[Tensor, Any, Any], Tensor]) -> Iterator[None]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if args:
            return note(args[0], args[1:], kwargs)
        return note(kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"})

    try:
        for layer in layers:
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _kept_once(value: Any, known: list[Tensor]) -> Any:
    """Return the value with each tensor replaced by an equal one that is kept already."""
    if isinstance(value, Tensor):
        for tensor in known:
            if tensor is value:
                return tensor
            if tensor.shape == value.shape and tensor.dtype == value.dtype and torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value
    if isinstance(value, tuple | list):
        return type(value)(_kept_once(part, known) for part in value)
    if isinstance(value, dict):
        return {key: _kept_once(part, known) for key, part in value.items()}
    return value
