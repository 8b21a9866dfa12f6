"""VllmSampler against recordings of vLLM's interface (fake_vllm.py), oldest, measured and newest version."""

import copy
import gc
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qerl_compile
from qerl_compile.adapter_files import adapters_of
from qerl_compile.errors import CheckpointError, ModelError
from qerl_compile.rl.rollout.types import Sampling
from qerl_compile.rl.rollout.vllm import VllmSampler
from qerl_compile.rl.rollout.vllm_update import served_rank
from qerl_compile.rl.rollout.vllm_worker import NormLoader
from qerl_compile.rl.seeds import derive_seed
from qerl_compile.transforming import resample_noise, transform
from tests.models import tiny_model
from tests.rl.rollout.engines import PROMPTS, make_world, reset, vllm_sampler
from tests.rl.rollout.fake_vllm import PROTOCOL, VERSIONS, fake_modules

SAMPLED = Sampling(4, (2, 50), 0, seed=(1, "rollout", 3))


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture
def world(shared_world):
    yield shared_world
    reset(shared_world)


# What is asked of vLLM


@pytest.mark.parametrize("version", VERSIONS)
def test_every_recorded_version_accepts_what_we_ask_of_it(world, version):
    sampler = vllm_sampler(world, version)
    rollouts = sampler.generate(PROMPTS, 2, SAMPLED)
    assert len(rollouts) == 8
    assert vllm_sampler(world, "0.24.0").generate(PROMPTS, 2, SAMPLED).rollouts == rollouts.rollouts


def test_the_engine_is_started_with_what_the_sampler_relies_on(world):
    sampler = vllm_sampler(world, gpu_memory_utilization=0.4, enforce_eager=True)
    assert sampler.llm.settings == {
        "model": str(world.base_dir),
        "dtype": "float32",
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "qerl_compile.rl.rollout.vllm_worker.NormLoader",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_lora": True,
        "max_lora_rank": 32,
        "max_loras": 1,
        "gpu_memory_utilization": 0.4,
        "enforce_eager": True,
    }


def test_each_completion_is_one_request_with_its_own_seed(world):
    sampler = vllm_sampler(world)
    sampler.generate(PROMPTS[:2], 2, SAMPLED)
    assert [prompt.prompt_token_ids for prompt, _, _ in sampler.llm.requests] == [[5, 9, 17, 33]] * 2 + [[7]] * 2
    seeds = [params.seed for _, params, _ in sampler.llm.requests]
    assert seeds == [derive_seed(1, "rollout", 3, i, j) for i in range(2) for j in range(2)]


def test_sampling_becomes_sampling_params_field_by_field(world):
    sampler = vllm_sampler(world, logprobs_mode="raw_logprobs")
    sampler.generate(PROMPTS[:1], 1, Sampling(4, (2, 50), 77, 1.0, top_k=5, seed=(8,)))
    (_, params, _) = sampler.llm.requests[0]
    asked = {
        "n": 1,
        "temperature": 1.0,
        "top_k": 5,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": derive_seed(8, 0, 0),
        "max_tokens": 4,
        "stop_token_ids": [2, 50],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    assert {key: value for key, value in vars(params).items() if key in asked} == asked
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
    assert {key: vars(params)[key] for key in neutral} == neutral


@pytest.mark.parametrize(
    "table, name",
    [
        ("SamplingParams", "min_p"),
        ("SamplingParams", "ignore_eos"),
        ("EngineArgs", "worker_extension_cls"),
        ("EngineArgs", "logprobs_mode"),
        ("EngineArgs", "max_lora_rank"),
        ("LoRARequest", "lora_int_id"),
        ("TokensPrompt", "prompt_token_ids"),
        ("LLM.generate", "lora_request"),
        ("LLM.collective_rpc", "args"),
    ],
)
def test_an_argument_that_a_version_lacks_is_an_error(world, table, name):
    recorded = copy.deepcopy(PROTOCOL["0.24.0"])
    entries = recorded[table]
    if isinstance(entries, dict):
        del entries[name]
    else:
        entries[:] = [entry for entry in entries if entry not in (name,) and entry[0] != name]
    for each, module in fake_modules("0.24.0", world.oracle, recorded).items():
        world.patch.setitem(sys.modules, each, module)
    with pytest.raises(TypeError, match=f"(unexpected keyword argument|too many positional).*'?{name}"):
        VllmSampler(world.model, world.base_dir, dtype="float32").generate(PROMPTS, 1, SAMPLED)


@pytest.mark.parametrize("result, name", [("CompletionOutput", "finish_reason"), ("RequestOutput", "outputs")])
def test_a_result_without_what_we_read_is_an_error(world, result, name):
    recorded = copy.deepcopy(PROTOCOL["0.24.0"])
    recorded[result].remove(name)
    for each, module in fake_modules("0.24.0", world.oracle, recorded).items():
        world.patch.setitem(sys.modules, each, module)
    with pytest.raises((AssertionError, AttributeError)):
        VllmSampler(world.model, world.base_dir, dtype="float32").generate(PROMPTS, 1, SAMPLED)


# Norms


def test_all_planned_norms_arrive_rounded_to_what_vllm_holds_and_the_rounding_is_reported(world):
    sampler = vllm_sampler(world, dtype="bfloat16")
    for sigma in (0.1, 1e-4):
        _, rms = resample_noise(world.model, sigma, torch.Generator().manual_seed(3))
        metrics = sampler.generate([], 1, SAMPLED).metrics
        assert metrics == {}
        _, metrics = sampler.update.push(sampler.llm)
        assert metrics["rollout/norms"] == 4.0 == 2 * world.model.config.num_hidden_layers
        moved = 0.0
        for path in world.model.qerl.plan.noise:
            norm = world.model.get_submodule(path)
            held = sampler.llm.model.get_parameter(f"{path}.weight")
            assert held.dtype == torch.bfloat16
            assert torch.equal(held, (norm.weight + norm.noise).bfloat16())
            moved += (held.double() - norm.weight.bfloat16().double()).square().sum().item()
        assert metrics["noise/rms_served"] == pytest.approx(math.sqrt(moved / 256))
        if sigma == 0.1:
            assert metrics["noise/rms_served"] == pytest.approx(rms, rel=0.05)
        else:  # nearly every element rounds back to the clean weight; the few that do not jump by 2⁻⁸
            assert metrics["noise/rms_served"] != pytest.approx(rms, rel=0.5)


def test_silence_brings_the_clean_norms_back_bit_for_bit(world):
    sampler = vllm_sampler(world, dtype="bfloat16")
    clean = {path: sampler.llm.model.get_parameter(f"{path}.weight").clone() for path in world.model.qerl.plan.noise}
    resample_noise(world.model, 0.2, torch.Generator().manual_seed(3))
    sampler.update.push(sampler.llm)
    assert not any(torch.equal(sampler.llm.model.get_parameter(f"{path}.weight"), clean[path]) for path in clean)
    resample_noise(world.model, 0.0)
    _, metrics = sampler.update.push(sampler.llm)
    assert all(torch.equal(sampler.llm.model.get_parameter(f"{path}.weight"), clean[path]) for path in clean)
    assert metrics["noise/rms_served"] == 0.0


def test_norms_are_written_in_place_where_cuda_graphs_read_them(world):
    sampler = vllm_sampler(world)
    name = f"{world.model.qerl.plan.noise[0]}.weight"
    address = sampler.llm.model.get_parameter(name).data_ptr()
    sampler.generate(PROMPTS, 1, SAMPLED)
    assert sampler.llm.model.get_parameter(name).data_ptr() == address


class Deaf:
    """A model like those of vLLM that pass over names they do not know."""

    def __init__(self, parameters, forget=()):
        self.parameters, self.forget = parameters, forget

    def load_weights(self, weights):
        return {name for name, weight in weights if name in self.parameters and self._load(name, weight)}

    def _load(self, name, weight):
        if name not in self.forget:
            self.parameters[name].data.copy_(weight)
        return True

    def get_parameter(self, name):
        return self.parameters[name]


def norm_file(path, **weights):
    save_file({name: torch.tensor(values, dtype=torch.bfloat16) for name, values in weights.items()}, path)
    return str(path)


@pytest.mark.parametrize(
    "dtype, forget, want",
    [
        (torch.bfloat16, (), ["a"]),  # b is not in the model
        (torch.bfloat16, ("a",), []),  # said to be loaded, and not there
        (torch.float32, (), []),  # another dtype than was rounded to
    ],
)
def test_a_norm_counts_only_when_it_is_read_back(tmp_path, dtype, forget, want):
    class Worker(NormLoader):
        def get_model(self):
            return Deaf({"a": torch.nn.Parameter(torch.ones(2, dtype=dtype))}, forget)

    assert Worker().qerl_load_norms(norm_file(tmp_path / "n", a=[0.5, 2.0], b=[1.0, 1.0])) == want


def test_a_model_that_returns_nothing_from_load_weights_counts_as_none(tmp_path):
    class Worker(NormLoader):
        def get_model(self):
            return type("Silent", (), {"load_weights": lambda *_: None})()

    assert Worker().qerl_load_norms(norm_file(tmp_path / "n", a=[1.0])) == []


def test_a_norm_that_did_not_arrive_stops_the_rollout_before_a_token_is_sampled(world):
    sampler = vllm_sampler(world)
    lost = world.model.qerl.plan.noise[1]
    honest = sampler.llm.model.load_weights
    sampler.llm.model.load_weights = lambda weights: honest([each for each in weights if lost not in each[0]])
    with pytest.raises(ModelError, match=f"expected 4 norms in vLLM's model.*got 3, without {lost}.weight"):
        sampler.generate(PROMPTS, 1, SAMPLED)
    assert sampler.llm.requests == []


def test_with_tensor_parallelism_each_worker_must_answer(world):
    sampler = vllm_sampler(world, tensor_parallel_size=2)
    sampler.generate(PROMPTS, 1, SAMPLED)
    sampler.llm.workers[1].qerl_load_norms = lambda path: []
    with pytest.raises(ModelError, match=r"on 2 worker\(s\) each; got 0"):
        sampler.generate(PROMPTS, 1, SAMPLED)


# Adapters and prefixes


def test_each_generate_has_a_fresh_adapter_and_the_files_before_it_are_gone(world):
    sampler = vllm_sampler(world)
    for _ in range(3):
        sampler.generate(PROMPTS[:1], 1, SAMPLED)
    requests = [adapter for _, _, adapter in sampler.llm.requests]
    assert [request.lora_int_id for request in requests] == [1, 2, 3]
    assert len({request.lora_name for request in requests}) == 3
    assert [Path(request.lora_path).exists() for request in requests] == [False, False, True]


def test_the_files_lie_in_work_dir_and_go_with_the_sampler(world, tmp_path):
    sampler = vllm_sampler(world, work_dir=tmp_path)
    sampler.generate(PROMPTS[:1], 1, SAMPLED)
    assert {path.name for path in tmp_path.glob("*/*")} == {"norms.safetensors", "adapter-1"}
    del sampler
    world.patch.undo()  # the fake keeps a list of the engines it started
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_an_update_of_the_adapter_reaches_vllm(world):
    sampler, greedy = vllm_sampler(world), Sampling(6, (), 0, 0.0)
    before = sampler.generate(PROMPTS, 1, greedy)
    adapter = next(iter(adapters_of(world.model).values()))
    kept = adapter.b_NR.data.clone()
    adapter.b_NR.data.neg_().mul_(3)
    after = sampler.generate(PROMPTS, 1, greedy)
    adapter.b_NR.data.copy_(kept)
    assert after.rollouts != before.rollouts
    assert sampler.generate(PROMPTS, 1, greedy).rollouts == before.rollouts


def test_a_model_without_adapters_is_served_without_lora(world, tmp_path):
    plain = transform(tiny_model("llama", seed=9), {"quantize": [{"match": ".*_proj"}]}, inner="eager")
    qerl_compile.export(plain, tmp_path / "base", target="vllm")
    vllm_sampler(world)
    sampler = VllmSampler(plain, tmp_path / "base", dtype="float32")
    rollouts = sampler.generate(PROMPTS, 1, SAMPLED)
    assert not {"enable_lora", "max_lora_rank", "max_loras"} & set(sampler.llm.settings)
    assert {adapter for _, _, adapter in sampler.llm.requests} == {None}
    assert rollouts.metrics == {}  # and without noise, no norms are pushed


def test_prefixes_are_forgotten_when_only_the_noise_has_changed(world, tmp_path):
    """Without adapters, prefixes are found under one name for ever; the fake refuses to use those of older norms."""
    recipe = {"quantize": [{"match": ".*_proj"}], "noise": {"sigma_start": 0.1, "sigma_end": 0.01}}
    noisy = transform(tiny_model("llama", seed=9), recipe, inner="eager")
    qerl_compile.export(noisy, tmp_path / "base", target="vllm")
    vllm_sampler(world)
    sampler = VllmSampler(noisy, tmp_path / "base", dtype="float32")
    for _ in range(2):
        assert len(sampler.generate(PROMPTS, 1, SAMPLED)) == len(PROMPTS)
    sampler.llm.reset_prefix_cache = lambda: True
    with pytest.raises(AssertionError, match="a prefix of older weights"):
        sampler.generate(PROMPTS, 1, SAMPLED)


def test_a_busy_engine_is_refused_since_its_prefixes_stay(world):
    sampler = vllm_sampler(world)
    sampler.llm.busy = True
    with pytest.raises(ModelError, match="prefix cache: expected an idle engine"):
        sampler.generate(PROMPTS, 1, SAMPLED)


@pytest.mark.parametrize("rank, want", [(1, 8), (8, 8), (9, 16), (48, 64), (200, 256), (257, 320), (512, 512)])
def test_the_rank_reserved_is_the_least_that_vllm_offers(rank, want):
    assert served_rank(adapted({"a": (rank, 1.0), "b": (1, 1 / rank)})) == want


@pytest.mark.parametrize(
    "sites, message",
    [
        ({"a": (8, 16.0), "b": (16, 16.0)}, "expected one alpha / rank.*got 1, 2"),
        ({"a": (513, 1.0)}, "expected ranks up to 512; got 513"),
    ],
)
def test_adapters_that_vllm_would_compute_wrongly_are_refused(sites, message):
    with pytest.raises(ModelError, match=message):
        served_rank(adapted(sites))


def adapted(sites):
    model = torch.nn.Module()
    for name, (rank, alpha) in sites.items():
        module = torch.nn.Module()
        module.lora_A, module.lora_B = (torch.nn.Parameter(torch.zeros(1, 1)) for _ in range(2))
        module.lora_rank, module.lora_alpha = rank, alpha
        model.add_module(name, module)
    return model


# Log-probabilities


TRUNCATIONS = [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}]


@pytest.mark.parametrize(
    "mode, temperature, truncation, served",
    [
        *[("processed_logprobs", temperature, {}, True) for temperature in (0.0, 0.01, 0.7, 1.0, 1.5)],
        *[("processed_logprobs", temperature, cut, False) for temperature in (0.7, 1.0) for cut in TRUNCATIONS],
        *[
            ("raw_logprobs", temperature, {}, served)
            for temperature, served in ((0.0, True), (0.7, False), (1.0, True))
        ],
        *[("raw_logprobs", 0.7, cut, False) for cut in TRUNCATIONS],
        ("raw_logprobs", 1.0, {"top_k": 3}, True),
        ("processed_logprobs", 0.0, {"top_k": 3}, True),  # greedy is never truncated, and records 0
    ],
)
def test_settings_whose_log_probabilities_vllm_cannot_give_are_refused(world, mode, temperature, truncation, served):
    sampler = vllm_sampler(world, logprobs_mode=mode)
    params = Sampling(3, (2,), 0, temperature, **truncation)
    if served:
        assert len(sampler.generate(PROMPTS, 1, params)) == len(PROMPTS)
    else:
        with pytest.raises(ModelError, match=f"untruncated softmax.*got logprobs_mode='{mode}'"):
            sampler.generate(PROMPTS, 1, params)
        assert sampler.llm.requests == []


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_processed_log_probabilities_are_those_at_the_temperature(world, temperature):
    sampler = vllm_sampler(world)
    for rollout in sampler.generate(PROMPTS, 2, Sampling(4, (), 0, temperature, seed=(5,))):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = world.model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
        want = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, len(rollout.prompt_ids) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logps), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1e-6, 0.005])
def test_temperatures_that_vllm_would_raise_are_refused(world, temperature):
    with pytest.raises(ModelError, match=r"0 or at least 0\.01"):
        vllm_sampler(world).generate(PROMPTS, 1, Sampling(3, (2,), 0, temperature))


def test_an_unknown_logprobs_mode_is_refused(world):
    with pytest.raises(ModelError, match="'processed_logprobs' or 'raw_logprobs'; got 'raw_logits'"):
        vllm_sampler(world, logprobs_mode="raw_logits")


def test_the_sampled_token_is_found_by_its_number_and_not_by_its_place():
    """With log-probabilities of the likeliest tokens too, those come in order of rank."""
    from types import SimpleNamespace as Of

    from qerl_compile.rl.rollout.vllm import _rollout

    logprobs = [{9: Of(logprob=-0.1), 4: Of(logprob=-2.0)}, {2: Of(logprob=-0.5)}]
    completion = Of(token_ids=[4, 2], logprobs=logprobs, finish_reason="stop")
    output = Of(prompt_token_ids=[1, 3], outputs=[completion])
    assert _rollout((1, 3), output, Sampling(5, (2,), 0)).logps == (-2.0, -0.5)


# What can go wrong


def test_a_completion_cut_short_by_the_models_length_is_an_error_and_no_sample(world):
    sampler = vllm_sampler(world, max_model_len=13)
    sampler.generate(PROMPTS[:2], 1, Sampling(5, (), 0))
    with pytest.raises(ModelError, match=r"2 after 11, finish_reason='length'\. Raise max_model_len"):
        sampler.generate(PROMPTS, 1, Sampling(5, (), 0))


def test_answers_in_another_order_are_an_error(world):
    sampler = vllm_sampler(world)
    honest = sampler.llm.generate
    sampler.llm.generate = lambda *args, **kwargs: honest(*args, **kwargs)[::-1]
    with pytest.raises(ModelError, match="VllmSampler: completion"):
        sampler.generate(PROMPTS, 1, SAMPLED)


@pytest.mark.parametrize(
    "name", ["model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight_packed"]
)
@pytest.mark.parametrize("fault, message", [("other", "got other numbers"), ("missing", "got no such tensor")])
def test_a_base_that_is_not_the_models_own_is_refused(world, tmp_path, name, fault, message):
    tensors = load_file(world.base_dir / "model.safetensors")
    assert name in tensors
    if fault == "other":
        tensors[name] = tensors[name] + 1
    else:
        tensors[f"{name}s"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((world.base_dir / "config.json").read_text())
    world.base_dir, right = tmp_path, world.base_dir
    try:
        with pytest.raises(CheckpointError, match=message):
            vllm_sampler(world)
    finally:
        world.base_dir = right


def test_without_vllm_the_error_names_the_extra(world):
    vllm_sampler(world)
    world.patch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"no module named 'vllm'.*qerl-compile\[vllm\]"):
        VllmSampler(world.model, world.base_dir)


def test_a_vllm_that_lacks_something_itself_keeps_its_own_error(world, tmp_path):
    (tmp_path / "vllm.py").write_text("import something_that_vllm_needs")
    world.patch.syspath_prepend(tmp_path)
    world.patch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="something_that_vllm_needs"):
        VllmSampler(world.model, world.base_dir)


@pytest.mark.parametrize(
    "version, accepted",
    [("0.10.1.1", False), ("0.9.2", False), ("0.10.2", True), ("0.25.0rc1", True), ("1.0.dev7+g1", True)],
)
def test_versions_whose_log_probabilities_leave_the_temperature_out_are_refused(world, version, accepted):
    vllm_sampler(world)
    sys.modules["vllm"].__version__ = version
    if accepted:
        VllmSampler(world.model, world.base_dir)
    else:
        with pytest.raises(ModelError, match=f"vLLM 0.10.2 or newer.*got {version}"):
            VllmSampler(world.model, world.base_dir)


def test_importing_the_engines_imports_neither_vllm_nor_transformers():
    code = "import sys, qerl_compile.rl.rollout.vllm_worker; print({'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
