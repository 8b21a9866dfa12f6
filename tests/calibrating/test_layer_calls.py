"""Layers called one at a time compute what the model computes."""

import pytest
import torch

from qerl_compile.calibrating import layer_calls
from qerl_compile.calibrating.layer_calls import LayerCalls
from qerl_compile.errors import GraphError
from qerl_compile.regions import decoder_layers
from tests.models import SOME_FAMILIES, tiny_model


def rows(samples=3, tokens=24):
    return torch.randint(3, 128, (samples, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", SOME_FAMILIES)
@torch.no_grad()
def test_all_layers_in_turn_are_the_model(family, monkeypatch):
    monkeypatch.setattr(layer_calls, "TOKENS_AT_ONCE", 48)  # two batches, the second of one row
    changes = {"sliding_window": 8} if family == "gemma3" else {}
    model, ids = tiny_model(family, layers=3, **changes), rows()
    calls = LayerCalls(model, tuple(decoder_layers(model)), ids)
    for index in range(3):
        calls.hidden = list(calls.outputs(index))
    heads = []
    hook = model.lm_head.register_forward_hook(lambda *args: heads.append(args[2]))
    calls.run_rest()
    hook.remove()
    torch.testing.assert_close(torch.cat(heads), model(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_model_is_as_before_also_after_a_failure():
    model, ids = tiny_model("llama"), rows()
    before = model(ids).logits
    calls = LayerCalls(model, tuple(decoder_layers(model)), ids)
    with pytest.raises(RuntimeError):
        calls._run_model(ids, lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_arguments_that_are_equal_are_kept_once():
    model, ids = tiny_model("llama", layers=2), rows(samples=400)
    calls = LayerCalls(model, tuple(decoder_layers(model)), ids)
    assert len(calls.calls) == 3
    tables = {id(call[layer].kwargs["position_embeddings"][0]) for call in calls.calls for layer in (0, 1)}
    assert len(tables) == 1


@torch.no_grad()
def test_a_model_that_computes_between_layers_is_refused():
    model, ids = tiny_model("llama"), rows()
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    with pytest.raises(GraphError, match=r"model\.layers\.1: expected a layer that gets what the one before returned"):
        LayerCalls(model, tuple(decoder_layers(model)), ids)
