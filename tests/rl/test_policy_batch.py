"""Rows as tensors, and that neither cutting them nor leaving rows without signal out changes loss or gradient."""

import math
from types import SimpleNamespace

import pytest
import torch

from qerl_compile.rl.losses import dapo_loss
from qerl_compile.rl.policy_batch import MicroBatch, micro_batches, token_logps
from qerl_compile.rl.rollout import Rollout
from tests.models import tiny_model

CPU = torch.device("cpu")
ROLLOUTS = [
    Rollout((5, 6, 7, 8), (30, 31, 2), (-1.0, -2.0, -3.0), True),
    Rollout((5, 6, 7, 8), (40,), (-0.5,), False),
    Rollout((9,), (50, 51, 52, 53, 54), (-0.1, -0.2, -0.3, -0.4, -0.5), False),
    Rollout((9,), (2,), (-4.0,), True),
    Rollout((10, 11), (60, 61), (-0.6, -0.7), False),
    Rollout((10, 11), (62, 2), (-0.8, -0.9), True),
]
ADVANTAGES_N = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.7, -0.7])
STEP_TOKENS = sum(len(rollout.completion_ids) for rollout in ROLLOUTS)


def cut(max_tokens, rollouts=ROLLOUTS, advantages_N=ADVANTAGES_N):
    return list(micro_batches(rollouts, advantages_N, max_tokens=max_tokens, pad_id=0, device=CPU))


def rows_of(batch):
    """(prompt, completion, log-probs, advantage) of each row, read back through the masks."""
    columns = batch.mask_BC.shape[1]
    for row in range(len(batch.ids_BS)):
        prompt = batch.ids_BS[row, :-columns][batch.attention_BS[row, :-columns].bool()]
        completion = batch.ids_BS[row, -columns:][batch.mask_BC[row]]
        logps = batch.sampling_logp_BC[row][batch.mask_BC[row]]
        yield tuple(prompt.tolist()), tuple(completion.tolist()), tuple(logps.tolist()), batch.advantages_B[row].item()


def test_prompts_are_padded_on_the_left_and_completions_on_the_right():
    (batch,) = cut(1000, ROLLOUTS[:3], torch.tensor([1.0, -1.0, 0.5]))
    assert batch.ids_BS.tolist() == [
        [0, 0, 0, 9, 50, 51, 52, 53, 54],
        [5, 6, 7, 8, 40, 0, 0, 0, 0],
        [5, 6, 7, 8, 30, 31, 2, 0, 0],
    ]
    assert batch.attention_BS.tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.mask_BC.tolist() == [[True] * 5, [True] + [False] * 4, [True] * 3 + [False] * 2]
    assert batch.sampling_logp_BC[1].tolist() == [-0.5, 0.0, 0.0, 0.0, 0.0]
    assert batch.advantages_B.tolist() == [0.5, -1.0, 1.0]


@pytest.mark.parametrize("max_tokens", [1, 7, 12, 15, 30, 10_000])
def test_every_row_with_signal_is_in_one_batch_and_batches_keep_to_the_budget(max_tokens):
    batches = cut(max_tokens)
    rows = [row for batch in batches for row in rows_of(batch)]
    want = [
        (r.prompt_ids, r.completion_ids, tuple(torch.tensor(r.logps).tolist()), a)
        for r, a in zip(ROLLOUTS, ADVANTAGES_N.tolist(), strict=True)
        if a != 0
    ]
    assert sorted(rows) == sorted(want)
    assert all(batch.ids_BS.numel() <= max_tokens or len(batch.ids_BS) == 1 for batch in batches)


def test_a_larger_budget_makes_fewer_batches():
    assert [len(cut(max_tokens)) for max_tokens in (1, 14, 10_000)] == [4, 2, 1]


def test_no_signal_makes_no_batch():
    assert cut(100, advantages_N=torch.zeros(6)) == []


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=1)


def loss_and_gradient(model, batches):
    """The summed loss of a step and the gradient of every parameter, as the trainer makes them."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logp_BC, _ = token_logps(model, batch, 0.9)
        part = dapo_loss(logp_BC, None, batch.advantages_B, batch.mask_BC, STEP_TOKENS)
        part.loss.backward()
        total += part.loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("max_tokens", [1, 14, 25])
def test_loss_and_gradient_do_not_depend_on_the_cut(model, max_tokens):
    loss, gradient = loss_and_gradient(model, cut(10_000))
    cut_loss, cut_gradient = loss_and_gradient(model, cut(max_tokens))
    assert cut_loss == pytest.approx(loss, abs=1e-6)
    assert float(gradient.norm()) > 0.1
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_leaving_rows_without_signal_out_changes_neither_loss_nor_gradient(model):
    few = cut(10_000)
    (everything,) = cut(10_000, advantages_N=torch.where(ADVANTAGES_N == 0, 1e-30, ADVANTAGES_N))
    advantages_B = torch.where(everything.advantages_B.abs() < 1e-20, 0.0, everything.advantages_B)
    everything = MicroBatch(**{**vars(everything), "advantages_B": advantages_B})
    assert (sum(len(batch.ids_BS) for batch in few), len(everything.ids_BS)) == (4, 6)
    assert int((advantages_B == 0).sum()) == 2
    loss, gradient = loss_and_gradient(model, few)
    full_loss, full_gradient = loss_and_gradient(model, [everything])
    assert full_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(full_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_log_probabilities_equal_those_of_full_logits_of_each_row_alone(model):
    (batch,) = cut(10_000)
    with torch.no_grad():
        logp_BC, entropy_BC = token_logps(model, batch, 0.7)
    for row, (prompt, completion, _, _) in enumerate(rows_of(batch)):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        want = torch.log_softmax(logits / 0.7, -1)
        mine = want.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        torch.testing.assert_close(logp_BC[row][batch.mask_BC[row]], mine, rtol=0, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=want).entropy()
        torch.testing.assert_close(entropy_BC[row][batch.mask_BC[row]], entropy, rtol=0, atol=1e-5)


def test_only_the_logits_of_completions_are_asked_for(model):
    (batch,) = cut(10_000)
    seen = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(tuple(output.logits.shape)))
    with torch.no_grad():
        token_logps(model, batch, 1.0)
    hook.remove()
    rows, columns = batch.mask_BC.shape
    assert seen == [(rows, columns + 1, 128)]


@pytest.mark.parametrize(
    "logits, temperature, entropy",
    [
        ([0.0, 0.0, 0.0, 0.0], 1.0, math.log(4)),
        ([math.log(2), 0.0, 0.0, -math.inf], 1.0, 1.5 * math.log(2)),  # probabilities 1/2, 1/4, 1/4, 0
        ([2 * math.log(2), 0.0, 0.0, -math.inf], 2.0, 1.5 * math.log(2)),
        ([0.0, -math.inf, -math.inf, -math.inf], 1.0, 0.0),
    ],
)
def test_entropy_is_that_of_the_tempered_distribution_in_nats(logits, temperature, entropy):
    batch = next(micro_batches([Rollout((1,), (0,), (0.0,), True)], torch.ones(1), max_tokens=9, pad_id=0, device=CPU))
    output = SimpleNamespace(logits=torch.tensor(logits).expand(1, 2, 4))
    logp_BC, entropy_BC = token_logps(lambda **_: output, batch, temperature)
    assert entropy_BC.tolist() == [[pytest.approx(entropy, abs=1e-6)]]
    assert not entropy_BC.requires_grad
    assert logp_BC.tolist() == [[pytest.approx(torch.tensor(logits).div(temperature).log_softmax(0)[0].item())]]


def test_positions_given_to_the_model_are_those_of_each_row_alone(model):
    (batch,) = cut(10_000, ROLLOUTS[:3], torch.tensor([1.0, -1.0, 0.5]))
    seen = []
    hook = model.register_forward_pre_hook(lambda _, __, given: seen.append(given["position_ids"]), with_kwargs=True)
    with torch.no_grad():
        token_logps(model, batch, 1.0)
    hook.remove()
    assert seen[0][batch.attention_BS.bool()].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
