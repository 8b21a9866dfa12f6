"""Noise provably acts: on every planned norm by exactly (w + z) / w, on nothing else, and off means bitwise clean.

The oracle is an untransformed Hugging Face model whose norm weights are set to w + z by hand.
"""

import copy
import math
import operator
from collections import Counter

import pytest
import torch

from qerl_compile.exporters import export
from qerl_compile.graph import held_tensor
from qerl_compile.rl.noise_schedule import NoiseSchedule
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.rollout import PagedSampler, Sampling
from qerl_compile.rl.token_logps import token_logps
from qerl_compile.stacked_adapters import refresh_stacked_adapters
from qerl_compile.transforming import noise_off, resample_noise, transform
from tests.models import SOME_FAMILIES, tiny_model
from tests.pages import Pages

TOKENS_BT = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
DENSE, PACKED = "bf16-lora-aqn", "qerl-nvfp4-aqn"
SITES = {"llama": ("input", "post_attention"), "gemma3": ("input", "pre_feedforward")}


def sites_of(family, layers=2):
    names = SITES.get(family, SITES["llama"])
    return [f"model.layers.{i}.{name}_layernorm" for i in range(layers) for name in names]


def noisy(model, sigma, seed=1):
    return resample_noise(model, sigma, torch.Generator().manual_seed(seed))


def train_logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS_BT, use_cache=False).logits


def rollout_logits(model):
    return model(input_ids=TOKENS_BT, use_cache=False, qerl_cache=Pages(len(TOKENS_BT))).logits


def bits(model):
    """Every tensor that a model owns but its noise, as bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if not name.endswith(".noise") and tensor.stride() != (0, 0)  # ghosts
    }


def with_noise_by_hand(oracle, model, only=None):
    """A copy of `oracle` whose norms have the weights that `model` should compute with."""
    twin = copy.deepcopy(oracle)
    for path in sites_of(model.config.model_type.removesuffix("_text")) if only is None else only:
        twin.get_submodule(path).weight.data += model.get_submodule(path).noise
    return twin


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_logits_are_those_of_a_plain_model_with_w_plus_z_in_its_norms(family):
    """All planned norms and only they: a norm too many or too few would move the logits."""
    oracle = tiny_model(family)
    model = transform(copy.deepcopy(oracle), DENSE, inner="eager")
    refresh_stacked_adapters(model)
    clean = train_logits(oracle)
    sites, _ = noisy(model, 0.1)
    assert sites == len(sites_of(family)) == 4
    want = train_logits(with_noise_by_hand(oracle, model))
    assert (want - clean).abs().max() > 0.1
    assert (train_logits(model) - want).abs().max() <= 1e-5
    assert (rollout_logits(model) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_norm_alone_moves_the_logits_as_predicted(family):
    oracle = tiny_model(family)
    model = transform(copy.deepcopy(oracle), DENSE, inner="eager")
    refresh_stacked_adapters(model)
    clean, moves = train_logits(oracle), set()
    for index, path in enumerate(sites_of(family)):
        resample_noise(model, 0.0)
        model.get_submodule(path).noise.normal_(0, 0.1, generator=torch.Generator().manual_seed(index))
        want = train_logits(with_noise_by_hand(oracle, model, only=[path]))
        moves.add(round((want - clean).abs().max().item(), 5))
        assert (train_logits(model) - want).abs().max() <= 1e-5
        assert (rollout_logits(model) - want).abs().max() <= 1e-5
    assert len(moves) == 4
    assert min(moves) > 0.01


class Spy:
    """A last pass that writes down (weight operand, x̂, product) of every norm in the order in which they run."""

    def __init__(self):
        self.seen, self.labels = [], []

    def __call__(self, program):
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target not in (torch.mul, operator.mul):
                continue
            vector = [a for a in node.all_input_nodes if a.meta["example_value"].dim() == 1]
            matrix = [a for a in node.all_input_nodes if a.meta["example_value"].dim() >= 3]
            if len(vector) == len(matrix) == 1:
                label = self._norm_of(vector[0]).partition("layers.")[2].partition(".")[2]
                with program.replacing(node) as result:
                    result.append(program.graph.call_function(self._note, (node, vector[0], matrix[0], label)))

    def _norm_of(self, node):
        stack = [node]
        while stack:
            one = stack.pop()
            if one.op == "get_attr" and not str(one.target).endswith(".noise"):
                return str(one.target).rpartition(".")[0]
            stack += one.all_input_nodes
        raise AssertionError(f"{node} reads no norm")

    def _note(self, product, weight, x, label):
        self.seen.append((label, weight.clone(), x.clone(), product.clone()))
        return product

    def by_path(self):
        """{norm path: (weight operand, x̂, product)}: layers share graphs, so the n-th of a name is that of layer n."""
        count, found = Counter(), {}
        for label, *values in self.seen:
            found[f"model.layers.{count[label]}.{label}"] = values
            count[label] += 1
        self.seen.clear()
        return found


NORMS_PER_LAYER = {"llama": 2, "qwen2": 2, "qwen3": 4, "gemma3": 6}  # q/k norms, and Gemma's two on the way out


@pytest.mark.parametrize("call", [train_logits, rollout_logits], ids=["training", "rollout"])
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_every_norm_multiplies_by_exactly_w_plus_z(family, call):
    """In fp32, bit for bit: the relative effect on the output is (w + z) / w, and 1 where no noise is planned."""
    model = transform(tiny_model(family), PACKED, inner="eager")
    refresh_stacked_adapters(model)
    for layer in model.model.layers:
        _ = layer._compiled_call_impl.graphs.rollout
    spy = Spy()
    for compiler in model.qerl.compilers:
        compiler.passes = [*compiler.passes, spy]
    noisy(model, 0.1)
    call(model)
    norms = spy.by_path()
    assert len(norms) == 2 * NORMS_PER_LAYER[family]
    for path, (operand, x, product) in norms.items():
        norm = model.get_submodule(path)
        offset = 1.0 if family == "gemma3" else 0.0
        clean = offset + norm.weight
        want = offset + (norm.weight + norm.noise) if path in sites_of(family) else clean
        assert torch.equal(operand, want), path
        assert torch.equal(product, want * x), path
        effect = product.double() / (clean * x).double()
        torch.testing.assert_close(effect, (want / clean).double().expand_as(effect), rtol=5e-7, atol=0)
        assert (path in sites_of(family)) == bool((want != clean).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_rms_is_sigma_within_sampling_error(dtype):
    """The root mean square of n normal numbers is sigma with a relative deviation of 1 / sqrt(2 n)."""
    model = transform(tiny_model("llama", dtype=dtype), PACKED, inner="eager")
    numbers = 4 * model.config.hidden_size
    schedule = NoiseSchedule(10)
    for step in range(2, 11):
        sigma = schedule.sigma(step)
        sites, rms = noisy(model, sigma, seed=step)
        assert sites == 4
        assert abs(rms / sigma - 1) < 4 / math.sqrt(2 * numbers)
        drawn = torch.cat([model.get_submodule(path).noise for path in sites_of("llama")])
        assert rms == pytest.approx(drawn.square().mean().sqrt().item(), rel=1e-3)
        assert abs(drawn.mean().item()) < 4 * sigma / math.sqrt(numbers)


def test_the_last_sigma_of_the_paper_acts_on_a_bf16_model():
    """A sum in bf16 would round 5e-4 away; the logits move all the same, in both kinds of graph."""
    model = transform(tiny_model("llama", dtype=torch.bfloat16), PACKED, inner="eager")
    refresh_stacked_adapters(model)
    before = train_logits(model), rollout_logits(model)
    noisy(model, 5e-4)
    lost = 0.0
    for path in sites_of("llama"):
        norm = model.get_submodule(path)
        lost += ((norm.weight + norm.noise.bfloat16()) == norm.weight).float().mean().item() / 4
    assert lost > 0.8
    for call, clean in zip((train_logits, rollout_logits), before, strict=True):
        assert (call(model) != clean).float().mean() > 0.3


@pytest.mark.parametrize("recipe", [DENSE, PACKED])
def test_off_is_bitwise_the_clean_model_after_a_hundred_draws(recipe):
    """The released code adds in place; what is not reloaded there walks at random (design/method.md 1.4)."""
    model = transform(tiny_model("qwen3", dtype=torch.bfloat16), recipe, inner="eager")
    refresh_stacked_adapters(model)
    weights, logits = bits(model), (train_logits(model), rollout_logits(model))
    for seed in range(100):
        noisy(model, 0.1, seed)
    assert not torch.equal(train_logits(model), logits[0])
    assert bits(model) == weights
    assert resample_noise(model, 0.0) == (4, 0.0)
    assert torch.equal(train_logits(model), logits[0])
    assert torch.equal(rollout_logits(model), logits[1])


def test_noise_off_is_clean_inside_and_the_same_noise_afterwards():
    model = transform(tiny_model("llama"), PACKED, inner="eager")
    clean = train_logits(model)
    noisy(model, 0.1)
    noise, loud = [model.get_submodule(path).noise.clone() for path in sites_of("llama")], train_logits(model)
    with noise_off(model):
        assert torch.equal(train_logits(model), clean)
        with noise_off(model):
            assert torch.equal(train_logits(model), clean)
        assert torch.equal(train_logits(model), clean)
        noisy(model, 0.5, seed=9)  # what an evaluation does inside is its own affair
        resample_noise(model, 0.0)
    assert torch.equal(train_logits(model), loud)
    assert all(torch.equal(model.get_submodule(p).noise, z) for p, z in zip(sites_of("llama"), noise, strict=True))


def test_noise_off_restores_after_an_error_and_does_nothing_without_noise():
    model = transform(tiny_model("llama"), PACKED, inner="eager")
    noisy(model, 0.1)
    loud, weights = train_logits(model), bits(model)

    def fails():
        with noise_off(model):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(train_logits(model), loud)
    assert bits(model) == weights
    with noise_off(transform(tiny_model("llama", layers=1), "nvfp4-lora", inner="eager")):
        pass


def test_a_rollout_that_fails_leaves_weights_and_noise_as_they_are(monkeypatch):
    model = transform(tiny_model("llama"), PACKED, inner="eager")
    clean, weights = train_logits(model), bits(model)
    noisy(model, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.norm, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            PagedSampler(model, rows=2, page_tokens=4).generate([(5, 9)], 2, Sampling(4, (2,), 0))
    resample_noise(model, 0.0)
    assert {name: bits(model)[name] for name in weights} == weights
    assert torch.equal(train_logits(model), clean)


@pytest.mark.parametrize("target", ["vllm", "peft"])
def test_exports_are_clean_whatever_the_noise_and_change_nothing(target, tmp_path):
    model = transform(tiny_model("llama", dtype=torch.bfloat16), PACKED, inner="eager")
    export(model, tmp_path / "clean", target=target)
    noisy(model, 0.1)
    loud, weights = train_logits(model), bits(model)
    export(model, tmp_path / "noisy", target=target)
    for file in (tmp_path / "clean").iterdir():
        assert (tmp_path / "noisy" / file.name).read_bytes() == file.read_bytes()
    assert torch.equal(train_logits(model), loud)
    assert bits(model) == weights


@pytest.mark.parametrize("recipe", [DENSE, PACKED])
def test_noise_that_is_switched_off_leaves_no_trace_and_all_else_as_it_is(recipe):
    """One field: the run of a recipe that never had noise, with the same adapters, on any base."""
    from qerl_compile.recipe import Recipe

    off = transform(tiny_model("llama"), Recipe.named(recipe).with_overrides(["noise.enabled=false"]), inner="eager")
    never = transform(tiny_model("llama"), Recipe.named(recipe).with_overrides(["noise=null"]), inner="eager")
    assert off.qerl.plan == never.qerl.plan
    assert off.qerl.plan.noise == ()
    assert bits(off) == bits(never)
    assert not any(name.endswith("noise") for name, _ in off.named_buffers())
    assert resample_noise(off, 0.1) == (0, 0.0)
    assert torch.equal(train_logits(off), train_logits(never))


PROMPTS = [(5, 9, 17, 33), (7, 3)]


def logp_by_hand(oracle, rollouts):
    """Log-probabilities of the sampled tokens under a plain model."""
    values = []
    for one in rollouts:
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        with torch.no_grad():
            logp = oracle(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
        values.append(logp[len(one.prompt_ids) - 1 :].gather(1, torch.tensor(one.completion_ids)[:, None])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("in_update", [False, True])
def test_sampled_log_probs_are_noisy_and_recomputed_ones_follow_noise_in_update(in_update):
    """Through the rollout engine and the trainer's own recomputation, against the oracle with and without z."""
    oracle = tiny_model("llama")
    model = transform(copy.deepcopy(oracle), DENSE, inner="eager")
    noisy(model, 0.1)
    loud = with_noise_by_hand(oracle, model)
    rollouts = PagedSampler(model, rows=4, page_tokens=4).generate(PROMPTS, 2, Sampling(6, (2,), 0, seed=(3,)))
    sampled = torch.tensor([logp for one in rollouts for logp in one.logps])
    want, clean = logp_by_hand(loud, rollouts), logp_by_hand(oracle, rollouts)
    assert (sampled - want).abs().max() <= 1e-5
    assert (sampled - clean).abs().max() > 0.05
    if not in_update:
        resample_noise(model, 0.0)  # what the trainer does between rollout and update
    (batch,) = micro_batches(rollouts, torch.ones(4), max_tokens=10**6, pad_id=0, device=torch.device("cpu"))
    logp_BC, _ = token_logps(model, batch, 1.0)
    difference = (logp_BC.detach() - batch.sampling_logp_BC)[batch.mask_BC].abs()
    if in_update:
        assert difference.max() <= 1e-5
    else:
        assert difference.mean() == pytest.approx((clean - want).abs().mean().item(), rel=1e-3)
        assert difference.max() > 0.05


def test_no_graph_is_made_for_noise_that_comes_changes_and_goes():
    model = transform(tiny_model("llama"), PACKED, inner="eager")
    refresh_stacked_adapters(model)
    train_logits(model), rollout_logits(model)
    counts = [compiler.graphs for compiler in model.qerl.compilers]
    addresses = [held_tensor(model.get_submodule(path), "noise").data_ptr() for path in sites_of("llama")]
    for sigma in (0.1, 0.01, 0.0, 0.3):
        noisy(model, sigma)
        train_logits(model), rollout_logits(model)
        with noise_off(model):
            train_logits(model), rollout_logits(model)
    assert [compiler.graphs for compiler in model.qerl.compilers] == counts
    assert [held_tensor(model.get_submodule(path), "noise").data_ptr() for path in sites_of("llama")] == addresses
