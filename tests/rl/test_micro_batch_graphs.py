"""Micro-batches of any shape take two graphs at most: one for a row alone and one for several, padded or not."""

import pytest
import torch
from torch._dynamo.utils import counters

from qerl_compile.recipe import Recipe
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.rollout import Rollout
from qerl_compile.rl.token_logps import token_logps
from qerl_compile.transforming import transform
from tests.models import SOME_FAMILIES, tiny_model

RECIPE = Recipe.from_dict({"quantize": [{"match": ".*proj"}], "lora": [{"match": ".*proj", "rank": 4}]})
ALONE, PADDED, FULL = [(7, 9)], [(5, 3), (2, 8), (5, 8)], [(4, 4)] * 2
OTHERS = [[(1, 1)], [(1, 1)] * 4, [(20, 2)], [(3, 1), (9, 30)], [(2, 3)] * 9]


def one_batch(lengths):
    generator = torch.Generator().manual_seed(len(lengths))

    def ids(count):
        return tuple(torch.randint(3, 128, (count,), generator=generator).tolist())

    rollouts = [Rollout(ids(prompt), ids(completion), (-1.0,) * completion, True) for prompt, completion in lengths]
    given = {"max_tokens": 10_000, "pad_id": 0, "device": torch.device("cpu")}
    (batch,) = micro_batches(rollouts, torch.ones(len(rollouts)), **given)
    return batch


def trained(model, batch):
    """Log-probabilities [B, C], and the gradient of their sum as one vector."""
    model.zero_grad()
    logp_BC, _ = token_logps(model, batch, 1.0)
    logp_BC.sum().backward()
    return logp_BC.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def transformed(family="llama", recipe=RECIPE, inner="eager", **sizes):
    model = transform(tiny_model(family, **sizes), recipe, inner=inner)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("first", [ALONE, PADDED, FULL], ids=["one row first", "padded rows first", "full rows first"])
def test_only_a_row_alone_and_several_rows_are_compiled_whatever_comes_first(first):
    """Dynamo specialises a batch of one. Padding and lengths make no graph: where rows are padded there is no mask."""
    model = transformed(layers=3)
    before = counters["stats"]["unique_graphs"]
    compiled = []
    for lengths in (first, ALONE, PADDED, FULL, *OTHERS):
        trained(model, one_batch(lengths))
        compiled.append(counters["stats"]["unique_graphs"] - before)
    assert compiled[0] == 1  # of all layers
    assert compiled[3:] == [2] * len(compiled[3:])
    assert compiled[1:3] == ([1, 2] if first is ALONE else [2, 2])


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_a_row_alone_is_worth_half_of_itself_twice(family):
    model = transformed(family)
    alone = one_batch([(6, 7)])
    (row,) = [Rollout(tuple(alone.ids_BS[0, :6].tolist()), tuple(alone.ids_BS[0, 6:].tolist()), (-1.0,) * 7, True)]
    given = {"max_tokens": 10_000, "pad_id": 0, "device": torch.device("cpu")}
    (twice,) = micro_batches([row, row], torch.ones(2), **given)
    logp_1C, gradient = trained(model, alone)
    logp_2C, doubled = trained(model, twice)
    assert float(gradient.abs().max()) > 0.1
    for each_C in logp_2C:
        torch.testing.assert_close(each_C, logp_1C[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(doubled, 2 * gradient, rtol=0, atol=1e-4 * float(doubled.abs().max()))
