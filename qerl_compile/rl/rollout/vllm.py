"""Rollouts through vLLM, an optional extra: an engine with a copy of the weights of its own.

    once           vllm.LLM(model=DIR), DIR written by qerl_compile.export(model, DIR, target="vllm")
    each generate  adapter and noisy norms are pushed, cached prefixes dropped      vllm_update.py, vllm_worker.py
                   one request per completion, seeded by (params.seed, prompt, sample)

Only vLLM's documented interface is used and nothing is patched. tests/rl/rollout/vllm_protocol.json records that
interface, as read from the source of the oldest supported version, the one we measured, and the newest.

**Log-probabilities.** vLLM computes two kinds, chosen when the engine starts (`logprobs_mode`; config/model.py,
v1/sample/sampler.py): "raw_logprobs" of the logits as they come, "processed_logprobs" after temperature, top-k, top-p
and min-p. Ours are after the temperature and before truncation (types.py), so each kind serves some settings, and the
others are refused: the normaliser that is missing cannot be recovered from one token's number.

    logprobs_mode           T = 1    other T    T = 1, truncated    other T, truncated
    "processed_logprobs"    yes      yes        no                  no
    "raw_logprobs"          yes      no         yes                 no

Up to vLLM 0.10.1 the processed ones, too, were from before the temperature (read in 0.10.1.1); hence `OLDEST`.

**Seeds.** A request's generator is its own, so a sample depends on the rest of the batch through rounding only. The
price: vLLM's first model runner draws for seeded requests one by one, a kernel launch per row and step.

What this module does not do: share the GPU's memory with the trainer (pass `gpu_memory_utilization`) or put vLLM to
sleep between rollouts. vLLM runs its engine in another process, spawned if CUDA is in use here already, so make the
sampler under `if __name__ == "__main__"`.
"""

import importlib
import math
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from qerl_compile.errors import ModelError
from qerl_compile.rl.rollout.types import Rollout, Rollouts, Sampling, not_finite
from qerl_compile.rl.rollout.vllm_update import WeightUpdate, check_base, served_rank
from qerl_compile.rl.seeds import derive_seed

OLDEST = (0, 10, 2)
LOADER = "qerl_compile.rl.rollout.vllm_worker.NormLoader"
MODES = ("processed_logprobs", "raw_logprobs")
MIN_TEMPERATURE = 0.01  # what lies between 0 and this, vLLM raises to this (sampling_params.py, _MAX_TEMP)


class VllmSampler:
    """The engine `Sampler` on top of `vllm.LLM`.

    Args:
        model: the transformed model that is being trained; its adapters and noise are read at each `generate`.
        base_dir: the checkpoint that vLLM serves: what `export(model, base_dir, target="vllm")` wrote.
        logprobs_mode: "processed_logprobs" or "raw_logprobs", see the module's essay.
        dtype: of what is not packed in vLLM, norms included; exports have bfloat16.
        work_dir: where adapters and norms are written for vLLM to read. Adapters of a 32B model have a gigabyte, so
            a directory in memory, such as /dev/shm, is worth it. None is the system's temporary directory.
        engine: further arguments of `vllm.LLM`, such as gpu_memory_utilization or tensor_parallel_size.

    Raises:
        ModelError: vLLM is missing or too old, or cannot serve these adapters.
        CheckpointError: `base_dir` does not hold the weights of `model`.
    """

    def __init__(
        self,
        model: Any,
        base_dir: str | PathLike[str],
        *,
        logprobs_mode: str = "processed_logprobs",
        dtype: str = "bfloat16",
        work_dir: str | PathLike[str] | None = None,
        **engine: Any,
    ) -> None:
        if logprobs_mode not in MODES:
            raise ModelError(
                where="VllmSampler: logprobs_mode",
                expected=f"{' or '.join(map(repr, MODES))}",
                got=repr(logprobs_mode),
                do="Leave it out, unless you truncate at temperature 1.",
            )
        self.vllm, self.logprobs_mode = _import_vllm(), logprobs_mode
        rank, base = served_rank(model), Path(base_dir)
        check_base(model, base)
        workers = int(engine.get("tensor_parallel_size", 1))
        self.update = WeightUpdate(model, base, getattr(torch, dtype), work_dir, workers)
        lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1} if rank else {}
        settings = {
            "dtype": dtype,
            "logprobs_mode": logprobs_mode,
            "worker_extension_cls": LOADER,
            "skip_tokenizer_init": True,  # tokens go in and tokens come out
            "generation_config": "vllm",  # nothing from the checkpoint's generation_config.json
            **lora,
        }
        self.llm = self.vllm.LLM(model=str(base), **{**settings, **engine})

    def generate(self, prompts: Sequence[tuple[int, ...]], group_size: int, params: Sampling) -> Rollouts:
        """Sample `group_size` completions for each prompt from the model as it is now.

        Args:
            prompts: token ids, unpadded, none empty.
            group_size: completions per prompt.
            params: how they are drawn.

        Raises:
            ModelError: log-probabilities that vLLM cannot give or that are not finite, a norm that did not arrive, or a
                completion cut short.
        """
        _check(params, self.logprobs_mode)
        rows = [(i, j) for i in range(len(prompts)) for j in range(group_size)]
        if not rows:
            return Rollouts(())
        adapter, metrics = self.update.push(self.llm)
        outputs = self.llm.generate(
            [self.vllm.TokensPrompt(prompt_token_ids=list(prompts[i])) for i, _ in rows],
            [self._request(params, derive_seed(*params.seed, params.first_prompt + i, j)) for i, j in rows],
            use_tqdm=False,
            lora_request=adapter,
        )
        pairs = zip(rows, outputs, strict=True)
        return Rollouts(tuple(_rollout(prompts[i], output, params) for (i, _), output in pairs), metrics)

    def _request(self, params: Sampling, seed: int) -> Any:
        return self.vllm.SamplingParams(
            n=1,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed,
            max_tokens=params.max_new_tokens,
            stop_token_ids=list(params.end_ids),
            ignore_eos=True,  # the checkpoint's end token ends a completion only if it is among end_ids
            logprobs=0,  # none but the sampled token's
            detokenize=False,
        )


def _check(params: Sampling, logprobs_mode: str) -> None:
    """Refuse what vLLM would do otherwise than asked."""
    if 0 < params.temperature < MIN_TEMPERATURE:
        raise ModelError(
            where="VllmSampler: temperature",
            expected=f"0 or at least {MIN_TEMPERATURE}, to which vLLM raises what lies between",
            got=str(params.temperature),
            do="Use 0 for greedy.",
        )
    served = params.temperature == 1 if logprobs_mode == "raw_logprobs" else not params.truncated
    if params.temperature > 0 and not served:
        raise ModelError(
            where="VllmSampler: log-probabilities",
            expected="those of the untruncated softmax of logits / temperature, which vLLM gives without top_k, top_p "
            "and min_p ('processed_logprobs') or at temperature 1 ('raw_logprobs')",
            got=f"logprobs_mode={logprobs_mode!r}, temperature={params.temperature}, top_k={params.top_k}, "
            f"top_p={params.top_p}, min_p={params.min_p}",
            do="Drop the truncation, sample at temperature 1, or use qerl-compile's own engine.",
        )


def _rollout(prompt: tuple[int, ...], output: Any, params: Sampling) -> Rollout:
    completion = output.outputs[0]
    tokens = tuple(completion.token_ids)
    ended = bool(tokens) and tokens[-1] in params.end_ids
    if tuple(output.prompt_token_ids) != prompt or not (ended or len(tokens) == params.max_new_tokens):
        raise ModelError(
            where="VllmSampler: completion",
            expected=f"an end token or {params.max_new_tokens} tokens after {len(prompt)} of a prompt",
            got=f"{len(tokens)} after {len(output.prompt_token_ids)}, finish_reason={completion.finish_reason!r}",
            do="Raise max_model_len to the longest prompt plus max_new_tokens.",
        )
    # By token: the entries of a position are in order of rank, and the sampled token need not be the first.
    logps = tuple(entries[token].logprob for token, entries in zip(tokens, completion.logprobs, strict=True))
    if not all(map(math.isfinite, logps)):
        raise not_finite("rollout")
    return Rollout(prompt, tokens, logps if params.temperature > 0 else (0.0,) * len(tokens), ended)


def _import_vllm() -> Any:
    try:
        vllm = importlib.import_module("vllm")
    except ModuleNotFoundError as fault:
        if fault.name != "vllm":  # it is there, but something that it needs is not
            raise
        raise ModelError(
            where="VllmSampler",
            expected="vLLM, which is an optional extra",
            got="no module named 'vllm'",
            do="Run `pip install 'qerl-compile[vllm]'`, or use qerl-compile's own engine.",
        ) from None
    if tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:3]) < OLDEST:
        raise ModelError(
            where="VllmSampler",
            expected=f"vLLM {'.'.join(map(str, OLDEST))} or newer; older log-probabilities leave the temperature out",
            got=vllm.__version__,
            do="Run `pip install --upgrade 'qerl-compile[vllm]'`.",
        )
    return vllm
