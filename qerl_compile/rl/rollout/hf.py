"""Rollouts through Hugging Face's own `generate`: the reference that the other engines are tested against.

Simple and obviously right, at the price of speed: prompts are padded on the left into rectangles of `batch` rows, rows
that have ended stay until the longest one ends, and the logits of all steps are kept until the batch is done, which is
steps · rows · vocabulary · 4 bytes.

**Nothing is inherited.** `generate` fills every setting that its caller left at None from the checkpoint's
generation_config.json, and what is None there from its own defaults (top_k = 50). A repetition penalty, suppressed
tokens or a second end token from that file would then change the distribution and leave no trace in the
log-probabilities. None cannot be passed for None, so the model has an empty `generation_config` for the time of a call.

**Log-probabilities** come from `output_logits`, which `generate` takes before any processor, and not from
`output_scores`, which are -inf where top-k and its like have cut.

**Randomness is not the sequence's own here.** `generate` draws from torch's global generator, all rows of a batch from
one stream. A fork of it is seeded from `params.seed`, so equal calls give equal samples and the caller's generator is
left alone; but a sample depends on the other prompts, on `group_size` and on `batch`. Greedy depends on none of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qerl_compile.rl.rollout.padding import left_padded
from qerl_compile.rl.rollout.types import Rollout, Rollouts, Sampling, not_finite
from qerl_compile.rl.seeds import derive_seed

# Shapes: B rows (one per completion), T columns of the prompts, C of the completions, V tokens of the vocabulary.


@dataclass(frozen=True)
class HuggingFaceSampler:
    """The engine `Sampler` on top of `model.generate`.

    Args:
        model: a causal LM in eval mode, transformed or not.
        batch: most rows that are generated together.
    """

    model: Any
    batch: int = 16

    def generate(self, prompts: Sequence[tuple[int, ...]], group_size: int, params: Sampling) -> Rollouts:
        """Sample `group_size` completions for each prompt.

        Args:
            prompts: token ids, unpadded, none empty.
            group_size: completions per prompt.
            params: how they are drawn.

        Raises:
            ModelError: logits that tokens are to be drawn from are not finite.
        """
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        device = self.model.get_input_embeddings().weight.device
        rollouts: list[Rollout] = []
        steps = 0
        with _own_generator(params, device), _nothing_inherited(self.model):
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                tokens_BC, logps_BC = self._generate_batch(part, params, device)
                rollouts += _unpack(part, tokens_BC, logps_BC, params.end_ids)
                steps += tokens_BC.shape[1]
        return Rollouts(tuple(rollouts), {"rollout/decode_steps": float(steps)})

    def _generate_batch(
        self, rows: Sequence[tuple[int, ...]], params: Sampling, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        ids_BT, mask_BT = left_padded(rows, params.pad_id, device)
        output = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=_config(params),
            logits_processor=[_refuse_not_finite],
        )
        tokens_BC = output.sequences[:, ids_BT.shape[1] :]
        if params.temperature == 0:
            return tokens_BC, torch.zeros_like(tokens_BC, dtype=torch.float32)
        logps = [
            torch.log_softmax(logits_BV.float() / params.temperature, -1).gather(1, token_B[:, None])
            for logits_BV, token_B in zip(output.logits, tokens_BC.unbind(1), strict=True)
        ]
        return tokens_BC, torch.cat(logps, 1)


def _config(params: Sampling) -> Any:
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if params.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": params.temperature,
            "top_k": params.top_k,  # 0 is all here too; None would be 50
            "top_p": params.top_p,
            "min_p": params.min_p or None,
        }
    return GenerationConfig(
        **sampling,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=list(params.end_ids) or None,
        pad_token_id=params.pad_id,
        num_beams=1,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )


@contextmanager
def _nothing_inherited(model: Any) -> Iterator[None]:
    from transformers import GenerationConfig

    inherited = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = inherited


@contextmanager
def _own_generator(params: Sampling, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(*params.seed))
        yield


def _refuse_not_finite(ids_BS: Tensor, logits_BV: Tensor) -> Tensor:
    """A logits processor that changes nothing. It comes before the draw, which on CUDA would end the process."""
    del ids_BS
    if not bool(torch.logsumexp(logits_BV, -1).isfinite().all()):  # -inf is a number here: a token that never comes
        raise not_finite("rollout")
    return logits_BV


def _unpack(
    rows: Sequence[tuple[int, ...]], tokens_BC: Tensor, logps_BC: Tensor, end_ids: Sequence[int]
) -> Iterator[Rollout]:
    for prompt, tokens, logps in zip(rows, tokens_BC.tolist(), logps_BC.tolist(), strict=True):
        end = next((column for column, token in enumerate(tokens) if token in end_ids), None)
        length = len(tokens) if end is None else end + 1  # what follows an end is padding
        yield Rollout(prompt, tuple(tokens[:length]), tuple(logps[:length]), ended=end is not None)
