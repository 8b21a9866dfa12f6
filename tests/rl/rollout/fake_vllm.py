"""A `vllm` that is built from vllm_protocol.json and refuses what the recorded version would not accept.

    modules = fake_modules("0.24.0", oracle)      for monkeypatch.setitem(sys.modules, name, module)

Signatures come from the recording: a keyword that the version lacks is a TypeError, and results have the recorded
attributes and no others. Behind them stands a plain Hugging Face model, `oracle`, in the part of vLLM's copy of the
weights; it obeys the rules that VllmSampler has to live with:

* an RPC carries a method's name and plain values, no function and no tensor (msgpack without insecure serialization);
* `load_weights` passes over unknown names in silence and copies in place;
* an adapter is read once per `lora_int_id`, from files that must be there at that moment;
* prefixes stay cached until they are reset, and are found by the adapter's name;
* the two kinds of log-probabilities are from before and from after temperature and truncation.
"""

import ast
import copy
import importlib
import inspect
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PROTOCOL = json.loads(Path(__file__).with_name("vllm_protocol.json").read_text(encoding="utf-8"))
VERSIONS = tuple(PROTOCOL)


def fake_modules(version: str, oracle: Any, protocol: dict[str, Any] | None = None) -> dict[str, ModuleType]:
    """Modules by name. `vllm.started` lists the LLMs that were made."""
    recorded = protocol or PROTOCOL[version]
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    started: list[Any] = []

    class LLM(FakeLLM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(recorded, copy.deepcopy(oracle), bound(recorded["LLM.__init__"], args, kwargs))
            started.append(self)

    public = {
        "LLM": LLM,
        "SamplingParams": record("SamplingParams", recorded["SamplingParams"]),
        "TokensPrompt": record("TokensPrompt", dict.fromkeys(recorded["TokensPrompt"], "None")),
    }
    for name, value in public.items():
        if name in recorded["vllm"]:
            setattr(modules["vllm"], name, value)
    vars(modules["vllm"]).update(__version__=version, started=started)
    vars(modules["vllm.lora.request"]).update(LoRARequest=record("LoRARequest", recorded["LoRARequest"]))
    return modules


def record(name: str, defaults: dict[str, str | None]) -> type:
    """A class whose constructor takes these fields and keeps them; defaults are the recorded texts, where literal."""
    signature = inspect.Signature(
        inspect.Parameter(
            field,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if default is None else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is None else value_of(default),
        )
        for field, default in defaults.items()
    )

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        vars(self).update(arguments.arguments)

    return type(name, (), {"__init__": init})


def value_of(text: str) -> Any:
    """A default from its text; what is no literal (a factory, an enumeration) is not played back."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return None


def bound(recorded: list[list[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, or TypeError where the recorded signature does not allow it."""
    signature = inspect.Signature(
        inspect.Parameter(
            name,
            inspect._ParameterKind[kind],
            default=inspect.Parameter.empty if default is None else default,
        )
        for name, kind, default in recorded
    )
    arguments = signature.bind(*args, **kwargs).arguments
    return {**arguments.pop("kwargs", {}), **arguments} if recorded[-1][1] == "VAR_KEYWORD" else arguments


class FakeLLM:
    def __init__(self, recorded: dict[str, Any], served: Any, settings: dict[str, Any]) -> None:
        self.recorded, self.settings = recorded, settings
        known = {name for name, *_ in recorded["LLM.__init__"]} | set(recorded["EngineArgs"])
        unknown = set(self.settings) - known
        if unknown:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {unknown.pop()!r}")
        assert self.settings["logprobs_mode"] in recorded["LogprobsMode"]
        assert Path(self.settings["model"], "config.json").exists()
        assert self.settings.get("max_lora_rank", 16) in recorded["max_lora_rank"]
        self.model = Served(served, getattr(torch, self.settings["dtype"]))
        self.workers = [self._worker() for _ in range(self.settings.get("tensor_parallel_size", 1))]
        self.adapters: dict[int, dict[str, torch.Tensor]] = {}
        self.requests: list[tuple[Any, Any, Any]] = []  # (prompt, SamplingParams, LoRARequest) as they came
        self.prefixes: set[tuple[str | None, int]] = set()  # adapter's name and generation of the weights
        self.generation = 0
        self.busy = False

    def _worker(self) -> Any:
        """As vLLM does it: the extension must bring no attribute that the worker has."""
        module, _, name = self.settings["worker_extension_cls"].rpartition(".")
        extension = getattr(importlib.import_module(module), name)
        methods = dict.fromkeys(self.recorded["Worker"], refuse_unrecorded)
        clash = [each for each in dir(extension) if not each.startswith("__") and each in methods]
        assert not clash, clash
        assert "get_model" in methods
        worker = type("Worker", (extension,), {**methods, "__init__": object.__init__})()
        worker.get_model = lambda: self.model
        return worker

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        call = bound(self.recorded["LLM.collective_rpc"], args, kwargs)
        assert isinstance(call["method"], str), "a function needs VLLM_ALLOW_INSECURE_SERIALIZATION=1"
        sent = json.loads(json.dumps([call.get("args", ()), call.get("kwargs") or {}]))
        self.generation += 1
        answers = [getattr(worker, call["method"])(*sent[0], **sent[1]) for worker in self.workers]
        return json.loads(json.dumps(answers))

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        bound(self.recorded["LLM.reset_prefix_cache"], args, kwargs)
        if not self.busy:
            self.prefixes.clear()
        return not self.busy

    def generate(self, *args: Any, **kwargs: Any) -> list[SimpleNamespace]:
        call = bound(self.recorded["LLM.generate"], args, kwargs)
        prompts, params, adapter = call["prompts"], call["sampling_params"], call.get("lora_request")
        assert len(prompts) == len(params)
        self.requests += [(prompt, each, adapter) for prompt, each in zip(prompts, params, strict=True)]
        found = {each for each in self.prefixes if each[0] == (adapter and adapter.lora_name)}
        assert all(generation == self.generation for _, generation in found), "a prefix of older weights is used"
        self.prefixes.add((adapter and adapter.lora_name, self.generation))
        with self.model.adapted(self._adapter(adapter)):
            return [
                self._complete(vars(prompt)["prompt_token_ids"], each)
                for prompt, each in zip(prompts, params, strict=True)
            ]

    def _adapter(self, request: Any) -> dict[str, torch.Tensor]:
        if request is None:
            return {}
        assert self.settings["enable_lora"]
        if request.lora_int_id not in self.adapters:
            self.adapters[request.lora_int_id] = read_adapter(Path(request.lora_path), self.settings["max_lora_rank"])
        return self.adapters[request.lora_int_id]

    def _complete(self, prompt: list[int], params: Any) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(params.seed)
        tokens: list[int] = []
        logprobs: list[dict[int, SimpleNamespace]] = []
        reason = "length"
        while len(tokens) < params.max_tokens and len(prompt) + len(tokens) < self.settings.get("max_model_len", 10**6):
            token, logprob = self._draw(self.model.logits([*prompt, *tokens]), params, generator)
            tokens.append(token)
            logprobs.append({token: self._result("Logprob", logprob=logprob)})
            ends = params.stop_token_ids + ([] if params.ignore_eos else [self.model.model.config.eos_token_id])
            if token in ends:
                reason = "stop"
                break
        completion = self._result("CompletionOutput", token_ids=tokens, logprobs=logprobs, finish_reason=reason)
        return self._result("RequestOutput", prompt_token_ids=prompt, outputs=[completion])

    def _draw(self, logits_V: torch.Tensor, params: Any, generator: torch.Generator) -> tuple[int, float]:
        raw_V = torch.log_softmax(logits_V, -1)
        if params.temperature == 0:
            return int(logits_V.argmax()), float(raw_V.max())
        processed_V = torch.log_softmax(logits_V / params.temperature, -1)
        if params.top_k > 0:
            processed_V[processed_V < processed_V.topk(params.top_k).values[-1]] = -torch.inf
        assert (params.top_p, params.min_p) == (1.0, 0.0), "not played back"
        processed_V = torch.log_softmax(processed_V, -1)
        race_V = torch.empty_like(processed_V).exponential_(generator=generator)
        token = int((processed_V.exp() / race_V).argmax())  # as v1/sample/ops/topk_topp_sampler.py; NaN wins
        chosen_V = processed_V if self.settings["logprobs_mode"] == "processed_logprobs" else raw_V
        return token, float(chosen_V[token])

    def _result(self, name: str, **values: Any) -> SimpleNamespace:
        assert set(values) <= set(self.recorded[name])
        return SimpleNamespace(**{**dict.fromkeys(self.recorded[name]), **values})


class Served:
    """vLLM's copy of the model: names of the checkpoint, norms in `dtype`, loading as models/qwen2.py does it."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model = model
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.data = parameter.data.to(dtype)

    def load_weights(self, weights: Any) -> set[str]:
        parameters = dict(self.model.named_parameters())
        loaded = {name: weight for name, weight in weights if name in parameters}
        for name, weight in loaded.items():
            parameters[name].data.copy_(weight)
        return set(loaded)

    def get_parameter(self, name: str) -> torch.nn.Parameter:
        return self.model.get_parameter(name)

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()

    def adapted(self, deltas: dict[str, torch.Tensor]) -> "Adapted":
        return Adapted(self.model, deltas)


class Adapted:
    """The model with B·A · alpha / rank added to its linears, for the time of a block."""

    def __init__(self, model: Any, deltas: dict[str, torch.Tensor]) -> None:
        self.model, self.deltas = model, deltas

    def __enter__(self) -> None:
        self.before = {path: self.model.get_parameter(f"{path}.weight").data for path in self.deltas}
        for path, delta in self.deltas.items():
            self.model.get_parameter(f"{path}.weight").data = self.before[path] + delta

    def __exit__(self, *_: object) -> None:
        for path, weight in self.before.items():
            self.model.get_parameter(f"{path}.weight").data = weight


def read_adapter(path: Path, max_rank: int) -> dict[str, torch.Tensor]:
    """As lora/peft_helper.py: r and lora_alpha of the config for all modules; the patterns are not read."""
    from safetensors.torch import load_file

    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] <= max_rank
    tensors = load_file(path / "adapter_model.safetensors")
    paths = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    scaling = config["lora_alpha"] / config["r"]
    return {
        each: tensors[f"base_model.model.{each}.lora_B.weight"]
        @ tensors[f"base_model.model.{each}.lora_A.weight"]
        * scaling
        for each in paths
    }


def refuse_unrecorded(*_: Any, **__: Any) -> None:
    raise AssertionError("a method of the worker that is recorded but not played back")
