"""Rows as tensors, and that neither cutting them nor leaving rows without signal out changes loss or gradient."""

from dataclasses import replace

import pytest
import torch

from qerl_compile.errors import ModelError
from qerl_compile.rl.losses import LOSSES, LossInputs, LossOptions, StepTotals
from qerl_compile.rl.policy_batch import micro_batches, split
from qerl_compile.rl.rollout import Rollout
from qerl_compile.rl.token_logps import token_logps
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


def cut(max_tokens, rollouts=ROLLOUTS, advantages_N=ADVANTAGES_N, **options):
    return list(micro_batches(rollouts, advantages_N, max_tokens=max_tokens, pad_id=0, device=CPU, **options))


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
    assert batch.rows == (2, 1, 0)
    assert batch.old_logp_BC is batch.reference_logp_BC is None


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


@pytest.mark.parametrize(("count", "sizes"), [(4, [2, 2]), (7, [3, 2, 2]), (6, [3, 3]), (5, [3, 2]), (1, [1])])
def test_a_batch_of_one_row_is_made_only_where_there_is_one_row(count, sizes):
    alike = [Rollout((5, 6, 7), (8, 9), (-1.0, -1.0), True)] * count
    assert [len(batch.rows) for batch in cut(15, alike, torch.ones(count))] == sizes


def test_no_signal_makes_no_batch():
    assert cut(100, advantages_N=torch.zeros(6)) == []


@pytest.mark.parametrize("max_tokens", [1, 12, 10_000])
@pytest.mark.parametrize("every_row, want", [(False, [0, 1, 4, 5]), (True, [0, 1, 2, 3, 4, 5])])
def test_rows_say_which_rollouts_a_batch_holds(max_tokens, every_row, want):
    batches = cut(max_tokens, every_row=every_row)
    for batch in batches:
        for row, (prompt, completion, _, advantage) in zip(batch.rows, rows_of(batch), strict=True):
            assert (prompt, completion) == (ROLLOUTS[row].prompt_ids, ROLLOUTS[row].completion_ids)
            assert advantage == ADVANTAGES_N[row].item()
    assert sorted(row for batch in batches for row in batch.rows) == want


def test_halves_hold_every_row_once_with_all_that_was_kept_of_it():
    (batch,) = cut(10_000, advantages_N=torch.tensor([1.0, -1.0, 0.5, 0.2, 0.7, 0.0]))
    batch = replace(batch, old_logp_BC=batch.sampling_logp_BC * 2, reference_logp_BC=batch.sampling_logp_BC * 3)
    halves = split(batch)
    assert [len(half.ids_BS) for half in halves] == [3, 2]
    assert [row for half in halves for row in rows_of(half)] == list(rows_of(batch))
    assert halves[0].rows + halves[1].rows == batch.rows
    for half in halves:
        assert torch.equal(half.old_logp_BC, half.sampling_logp_BC * 2)
        assert torch.equal(half.reference_logp_BC, half.sampling_logp_BC * 3)
        assert half.old_logp_BC.data_ptr() in {batch.old_logp_BC.data_ptr(), batch.old_logp_BC[3:].data_ptr()}


def test_what_nobody_asked_for_stays_out_of_halves():
    assert [half.old_logp_BC for half in split(cut(10_000)[0])] == [None, None]


def test_a_single_row_cannot_be_halved():
    (batch,) = cut(10_000, advantages_N=torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ModelError, match=r"rollout 2: expected at least two rows.*got one row of 6 tokens\. Set"):
        split(batch)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=1)


def loss_and_gradient(model, batches):
    """The summed loss of a step and the gradient of every parameter, as the trainer makes them."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logp_BC, _ = token_logps(model, batch, 0.9)
        inputs = LossInputs(logp_BC, None, batch.advantages_B, batch.mask_BC)
        part = LOSSES["dapo"](inputs, StepTotals(STEP_TOKENS, 1, 1, 1), LossOptions())
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


def test_halves_give_loss_and_gradient_of_the_whole(model):
    (batch,) = cut(10_000)
    loss, gradient = loss_and_gradient(model, [batch])
    half_loss, half_gradient = loss_and_gradient(model, split(batch))
    assert half_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(half_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_leaving_rows_without_signal_out_changes_neither_loss_nor_gradient(model):
    few, everything = cut(10_000), cut(10_000, every_row=True)
    assert [sum(len(batch.ids_BS) for batch in batches) for batches in (few, everything)] == [4, 6]
    loss, gradient = loss_and_gradient(model, few)
    full_loss, full_gradient = loss_and_gradient(model, everything)
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
