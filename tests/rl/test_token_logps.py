"""Log-probabilities, entropies and divergences from chunks: equal to those of whole logits, and never all logits."""

import gc
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from qerl_compile.errors import ModelError
from qerl_compile.recipe import Recipe
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.rollout import Rollout
from qerl_compile.rl.rollout.padding import last_positions, positions
from qerl_compile.rl.token_logps import token_logps, token_logps_and_kl
from qerl_compile.transforming import transform
from tests.models import SIZES, SOME_FAMILIES, tiny_model

CPU = torch.device("cpu")
LENGTHS = [(5, 9), (3, 4), (8, 1), (2, 12)]  # prompt, completion; 26 completion tokens
ONE_TOKEN, FIVE_TOKENS, ALL_TOKENS = 1, 5 * 128 * 4, 2**20  # bytes of float32 logits over a vocabulary of 128


def rollouts(lengths=LENGTHS, vocabulary=128):
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    return [Rollout(ids(prompt), ids(completion), (-1.0,) * completion, True) for prompt, completion in lengths]


def one_batch(taken=None):
    taken = rollouts() if taken is None else taken
    (batch,) = micro_batches(taken, torch.ones(len(taken)), max_tokens=10_000, pad_id=0, device=CPU)
    return batch


def whole_log_softmax(model, batch, temperature):
    logits_BCV = model(
        input_ids=batch.ids_BS,
        attention_mask=batch.attention_BS,
        position_ids=positions(batch.attention_BS),
        use_cache=False,
        logits_to_keep=last_positions(batch.ids_BS, batch.mask_BC.shape[1] + 1),
    ).logits
    return torch.log_softmax(logits_BCV[:, :-1].float() / temperature, dim=-1)


def whole(model, batch, temperature):
    """The two numbers from logits [B, C, V], 0 outside the mask; padding under a mask, so rounded otherwise."""
    logp_BCV = whole_log_softmax(model, batch, temperature)
    logp_BC = logp_BCV.gather(2, batch.ids_BS[:, -batch.mask_BC.shape[1] :, None]).squeeze(2)
    entropy_BC = torch.distributions.Categorical(logits=logp_BCV.detach()).entropy()
    return tuple(torch.where(batch.mask_BC, values_BC, 0.0) for values_BC in (logp_BC, entropy_BC))


def gradients(model, values_BC):
    """Gradients of a sum in which every token has another weight."""
    model.zero_grad()
    weights_BC = torch.randn(values_BC.shape, generator=torch.Generator().manual_seed(1))
    (values_BC * weights_BC).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_whole_logits(model, batch, chunk_bytes, gradient_tolerance):
    want_BC, want_entropy_BC = whole(model, batch, 0.7)
    want = gradients(model, want_BC)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*known function.*")
        got_BC, entropy_BC = token_logps(model, batch, 0.7, chunk_bytes=chunk_bytes)
    assert got_BC.dtype == entropy_BC.dtype == torch.float32
    torch.testing.assert_close(got_BC, want_BC, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(entropy_BC, want_entropy_BC, rtol=0, atol=5e-6)
    got = gradients(model, got_BC)
    assert got.keys() == want.keys()
    assert max(float(gradient.abs().max()) for gradient in want.values()) > 0.1
    for name, gradient in want.items():
        bound = gradient_tolerance * float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=bound, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("chunk_bytes", [ONE_TOKEN, FIVE_TOKENS, ALL_TOKENS])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_chunks_give_values_and_gradients_of_whole_logits(family, chunk_bytes):
    assert_equals_whole_logits(tiny_model(family), one_batch(), chunk_bytes, 5e-6)


def test_a_sliding_window_is_as_wide_without_a_mask():
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    model, wide = (tiny_model("gemma3", sliding_window=width, **kinds) for width in (4, 64))
    assert not torch.allclose(*(whole(each, one_batch(), 0.7)[0] for each in (model, wide)), atol=0.01)
    assert_equals_whole_logits(model, one_batch(), FIVE_TOKENS, 5e-6)


@pytest.mark.parametrize("chunk_bytes", [FIVE_TOKENS, ALL_TOKENS])
def test_bfloat16_logits_are_rounded_where_the_model_rounds_them(chunk_bytes):
    model = tiny_model("llama", dtype=torch.bfloat16)
    batch = one_batch(rollouts([(5, 9)] * 3))  # without padding, or the oracle's mask would round attention otherwise
    assert_equals_whole_logits(model, batch, chunk_bytes, 2**-6)


HEADS = {
    "packed": {"quantize": [{"match": ".*proj|lm_head"}], "lora": [{"match": ".*proj", "rank": 4}]},
    "adapted": {"quantize": [{"match": ".*proj"}], "lora": [{"match": ".*proj|lm_head", "rank": 4}]},
    "packed and adapted": {"quantize": [{"match": ".*proj|lm_head"}], "lora": [{"match": ".*proj|lm_head", "rank": 4}]},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_a_site_is_called_through_its_graph(kind):
    model = transform(tiny_model("llama", layers=1), Recipe.from_dict(HEADS[kind]), inner="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.05)
    assert_equals_whole_logits(model, one_batch(), FIVE_TOKENS, 5e-6)
    adapted = {name for name, p in model.named_parameters() if name.startswith("lm_head.lora") and p.grad is not None}
    assert len(adapted) == (2 if "adapted" in kind else 0)


def made(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    return model


def family(name, **numbers):
    sizes = {**SIZES, "num_hidden_layers": 1, **numbers}
    return made(getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**sizes))


AFTER_THE_HEAD = {
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 3.0},
    "HyperCLOVAX": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("name, numbers", AFTER_THE_HEAD.items())
def test_what_families_do_after_the_head_is_found_out(name, numbers):
    model, batch = family(name, **numbers), one_batch()
    hidden = model.get_decoder()(input_ids=batch.ids_BS)[0]
    assert not torch.allclose(model.lm_head(hidden), model(input_ids=batch.ids_BS).logits, rtol=0.2)
    assert_equals_whole_logits(model, batch, FIVE_TOKENS, 5e-6)


def test_a_model_whose_layers_lie_elsewhere_is_found_out():
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    assert_equals_whole_logits(made(transformers.GPT2LMHeadModel, config), one_batch(), FIVE_TOKENS, 5e-6)


class Shifted(transformers.LlamaForCausalLM):
    """Adds something to its logits that no config knows of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-1, 1, 128)
        return output


def shifted():
    return made(Shifted, transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))


def test_an_unknown_step_after_the_head_takes_whole_logits_and_warns_once():
    model, batch = shifted(), one_batch()
    want_BC, want_entropy_BC = whole(model, batch, 0.7)
    with pytest.warns(UserWarning, match=r"Shifted: its logits are no known function of its head's output") as caught:
        got_BC, entropy_BC = token_logps(model, batch, 0.7, chunk_bytes=FIVE_TOKENS)
    assert [warning.filename for warning in caught if "Shifted" in str(warning.message)] == [__file__]
    torch.testing.assert_close(got_BC, want_BC, rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy_BC, want_entropy_BC, rtol=0, atol=5e-6)
    want, got = gradients(model, want_BC), gradients(model, got_BC)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_logps(model, batch, 0.7)


def test_a_number_that_is_changed_after_the_first_batch_is_noticed():
    model, batch = family("Granite", logits_scaling=3.0), one_batch()
    token_logps(model, batch, 0.7)
    model.config.logits_scaling = 2.0
    assert_equals_whole_logits(model, batch, FIVE_TOKENS, 5e-6)


@pytest.mark.parametrize("spoilt", [math.nan, 0.0])
def test_logits_that_say_nothing_decide_nothing(spoilt):
    model, batch = tiny_model("llama", layers=1), one_batch()
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.fill_(spoilt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logp_BC, _ = token_logps(model, batch, 0.7)
    want = -math.log(128) if spoilt == 0 else math.nan
    assert logp_BC[batch.mask_BC].tolist() == pytest.approx([want] * 26, nan_ok=True)
    model.lm_head.weight.data.copy_(head)
    assert_equals_whole_logits(model, batch, FIVE_TOKENS, 5e-6)


def test_what_was_decided_does_not_keep_a_model_alive():
    model = tiny_model("llama", layers=1)
    token_logps(model, one_batch(), 1.0)[0].sum().backward()
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


class LargestTensor(TorchDispatchMode):
    """Watches the results of every operator, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def largest_tensor(run):
    with LargestTensor() as watched:
        run().backward()
    return watched.numel


LARGE = {"layers": 1, "vocab_size": 4096, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
LONG = [(4, 60), (3, 50), (6, 64), (2, 1)]


@pytest.mark.parametrize("rows", [1, 20])
def test_no_tensor_in_forward_or_backward_is_larger_than_a_chunk_of_logits_or_the_head(rows):
    model, teacher = (tiny_model("llama", seed=seed, **LARGE).requires_grad_(False) for seed in (0, 1))
    model.get_submodule("model.norm").weight.requires_grad_(True)
    batch = one_batch(rollouts(LONG, 4096))
    with torch.no_grad():
        for each in (model, teacher):
            token_logps(each, batch, 1.0)  # the trial has a few logits of its own
    assert largest_tensor(lambda: whole(model, batch, 1.0)[0].sum()) == 4 * 65 * 4096
    bound = max(rows * 4096, model.lm_head.weight.numel())  # 65536: the head is 16 rows of logits
    given = {"chunk_bytes": rows * 4096 * 4}
    assert largest_tensor(lambda: token_logps(model, batch, 1.0, **given)[0].sum()) == bound
    assert largest_tensor(lambda: token_logps_and_kl(model, teacher, batch, 1.0, **given)[2].sum()) == bound


class CountEntropies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.special_entr.default
        return func(*args, **(kwargs or {}))


def test_backward_makes_logits_again_but_not_entropies():
    model, batch = tiny_model("llama", layers=1), one_batch()
    token_logps(model, batch, 1.0)
    heads = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    with CountEntropies() as counted:
        logp_BC, _ = token_logps(model, batch, 1.0, chunk_bytes=10 * 128 * 4)
        forward = len(heads)
        logp_BC.sum().backward()
    assert (forward, len(heads), counted.count) == (3, 6, 3)


def test_padding_does_not_go_through_the_head():
    model, batch = tiny_model("llama", layers=1), one_batch()
    token_logps(model, batch, 1.0)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    with torch.no_grad():
        logp_BC, entropy_BC = token_logps(model, batch, 1.0, chunk_bytes=10 * 128 * 4)
    hook.remove()
    assert [tuple(shape) for shape in seen] == [(1, 10, 128), (1, 10, 128), (1, 6, 128)]
    assert batch.mask_BC.sum() == 26 < batch.mask_BC.numel()
    assert logp_BC[~batch.mask_BC].tolist() == entropy_BC[~batch.mask_BC].tolist() == [0.0] * 22


def test_the_model_gets_each_row_from_its_first_token_on_without_a_mask_and_without_columns_of_padding():
    model, batch = tiny_model("llama", layers=1), one_batch(rollouts([(4, 3), (1, 5)]))
    token_logps(model, batch, 1.0)
    assert batch.ids_BS.shape == (2, 4 + 5)
    seen = []
    hook = model.model.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    token_logps(model, batch, 1.0)
    hook.remove()
    assert len(seen) == 1
    assert seen[0].get("attention_mask") is None
    assert seen[0]["position_ids"].tolist() == [list(range(7))] * 2
    rows = [[*r.prompt_ids, *r.completion_ids] for r in (rollouts([(4, 3), (1, 5)])[i] for i in batch.rows)]
    assert [ids[: len(row)] for ids, row in zip(seen[0]["input_ids"].tolist(), rows, strict=True)] == rows


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_what_lies_behind_a_row_is_never_seen(family):
    model, batch = tiny_model(family), one_batch()
    want = token_logps(model, batch, 1.0)
    real_BS = batch.attention_BS.bool()
    for token in (1, 77):
        other = replace(batch, ids_BS=torch.where(real_BS, batch.ids_BS, token))
        for one, two in zip(want, token_logps(model, other, 1.0), strict=True):
            assert torch.equal(one, two)


def test_a_batch_without_completion_tokens_gives_zeros_and_zero_gradients():
    model, batch = tiny_model("llama", layers=1), one_batch()
    token_logps(model, batch, 1.0)
    batch.mask_BC.fill_(False)
    logp_BC, entropy_BC = token_logps(model, batch, 1.0)
    assert logp_BC.count_nonzero() == entropy_BC.count_nonzero() == 0
    logp_BC.sum().backward()
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in model.parameters())


def stub(logits):
    """Something without a head, which answers every position with the same logits."""
    return lambda **_: SimpleNamespace(logits=torch.tensor(logits).expand(1, 2, len(logits)))


def single():
    return one_batch([Rollout((1,), (0,), (0.0,), True)])


@pytest.mark.filterwarnings("ignore:function. its logits")
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
    logp_BC, entropy_BC = token_logps(stub(logits), single(), temperature)
    assert entropy_BC.tolist() == [[pytest.approx(entropy, abs=1e-6)]]
    assert not entropy_BC.requires_grad
    assert logp_BC.tolist() == [[pytest.approx(torch.tensor(logits).div(temperature).log_softmax(0)[0].item())]]


@pytest.mark.filterwarnings("ignore:function. its logits")
@pytest.mark.parametrize(
    "student, teacher, divergence",
    [
        ([math.log(3), 0.0], [0.0, 0.0], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([0.0, 0.0], [math.log(3), 0.0], 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),  # not symmetric
        ([0.0, 0.0, -math.inf], [0.0, 0.0, -math.inf], 0.0),
        ([0.0, -math.inf], [0.0, 0.0], math.log(2)),
        ([0.0, 0.0], [0.0, -math.inf], math.inf),
    ],
)
def test_divergence_is_that_of_the_student_from_the_teacher(student, teacher, divergence):
    kl_BC = token_logps_and_kl(stub(student), stub(teacher), single(), 1.0)[2]
    assert kl_BC.tolist() == [[pytest.approx(divergence, abs=1e-6)]]
    tempered_BC = token_logps_and_kl(stub([2 * x for x in student]), stub([2 * x for x in teacher]), single(), 2.0)[2]
    assert tempered_BC.tolist() == kl_BC.tolist()


@pytest.mark.parametrize("chunk_bytes", [ONE_TOKEN, FIVE_TOKENS, ALL_TOKENS])
def test_divergence_and_its_gradient_are_those_of_whole_logits(chunk_bytes):
    model, teacher, batch = tiny_model("llama"), tiny_model("qwen3", seed=1), one_batch()
    want_logp_BC, want_entropy_BC = whole(model, batch, 0.7)
    logp_BCV = whole_log_softmax(model, batch, 0.7)
    kl_BC = torch.nn.functional.kl_div(
        whole_log_softmax(teacher, batch, 0.7).detach(), logp_BCV, reduction="none", log_target=True
    ).sum(-1)
    want = gradients(model, torch.where(batch.mask_BC, kl_BC, 0.0) + want_logp_BC)
    got_logp_BC, got_entropy_BC, got_kl_BC = token_logps_and_kl(model, teacher, batch, 0.7, chunk_bytes=chunk_bytes)
    got = gradients(model, got_kl_BC + got_logp_BC)
    assert float(kl_BC.detach()[batch.mask_BC].min()) > 0.01
    torch.testing.assert_close(got_kl_BC, torch.where(batch.mask_BC, kl_BC, 0.0), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(got_logp_BC, want_logp_BC, rtol=0, atol=1e-6)
    torch.testing.assert_close(got_entropy_BC, want_entropy_BC, rtol=0, atol=5e-6)
    for name, gradient in want.items():
        bound = 5e-6 * float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=bound)
    assert all(p.grad is None for p in teacher.parameters())


def test_log_probabilities_and_divergence_share_one_forward_of_the_student():
    model, teacher, batch = tiny_model("llama"), tiny_model("qwen3"), one_batch()
    token_logps_and_kl(model, teacher, batch, 1.0)
    calls = {"student": 0, "teacher": 0}

    def count(name):
        calls[name] += 1

    model.model.register_forward_hook(lambda *_: count("student"))
    teacher.model.register_forward_hook(lambda *_: count("teacher"))
    sum(values_BC.sum() for values_BC in token_logps_and_kl(model, teacher, batch, 1.0)).backward()
    assert calls == {"student": 1, "teacher": 1}


def test_a_minus_infinite_logit_spoils_no_gradient_of_the_divergence():
    logits = torch.tensor([0.5, 0.0, -math.inf], requires_grad=True)

    def student(**_):
        return SimpleNamespace(logits=logits.expand(1, 2, 3))

    with pytest.warns(UserWarning, match="known function"):
        kl_BC = token_logps_and_kl(student, stub([0.0, 0.0, 0.0]), single(), 1.0)[2]
    kl_BC.sum().backward()
    p = math.exp(0.5) / (math.exp(0.5) + 1)
    want = p * (1 - p) * 0.5  # p_0 (log p_0 - log q_0 - KL), where log p_0 - log p_1 = 0.5
    assert logits.grad.tolist() == pytest.approx([want, -want, 0.0], abs=1e-6)


def test_a_teacher_with_another_vocabulary_is_refused():
    model, teacher = tiny_model("llama", layers=1), tiny_model("llama", layers=1, vocab_size=130)
    with pytest.raises(ModelError, match=r"teacher: expected a vocabulary of 128 tokens.*got 130\. Choose a teacher"):
        token_logps_and_kl(model, teacher, one_batch(), 1.0)
