"""TRL's own loss, advantage and correction code, run on our tensors.

`GRPOTrainer._compute_loss` and `_generate_and_score_completions` are called unchanged, on an object made without
`__init__`: it has just the attributes they read, and stubs for what is not arithmetic (model forward, generation,
reward functions, processes). An attribute that a later TRL reads and we do not give is an AttributeError here, never a
silently different number.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from trl import GRPOTrainer

PAD, END = 0, 1


@dataclass
class OneProcess:
    """The accelerator of a run with one process: collectives give back what they get."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_processes: int = 1
    process_index: int = 0
    sync_gradients: bool = True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def bare_trainer(**attributes: Any) -> Any:
    trainer = object.__new__(GRPOTrainer)
    trainer.accelerator = OneProcess()
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer._metrics = {"train": defaultdict(list)}
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def trl_loss(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor | None,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    loss_type: str,
    level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.28,
    delta: float | None = None,
    beta: float = 0.0,
    kl_unbiased: bool = True,
    reference_logp_BT: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    step_tokens: int,
    micro_batches: int = 1,
    max_new_tokens: int = 32,
) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's loss of one micro-batch and the metrics it logged; `weight` is its importance_sampling_ratio."""
    trainer = bare_trainer(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=kl_unbiased, steps_per_generation=micro_batches),
        current_gradient_accumulation_steps=micro_batches,
        max_completion_length=max_new_tokens,
        use_vllm=weight is not None,
        vllm_importance_sampling_correction=weight is not None,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp_BT, torch.zeros_like(logp_BT), None)
    ids_BT = torch.zeros(mask_BT.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": ids_BT[:, :1] + 1,
        "completion_ids": ids_BT,
        "completion_mask": mask_BT.int(),
        "advantages": advantages_B,
        "num_items_in_batch": torch.tensor(step_tokens),
        "old_per_token_logps": old_logp_BT,
        "ref_per_token_logps": reference_logp_BT,
        "importance_sampling_ratio": weight,
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_batch(
    rewards_NF: torch.Tensor,
    group_size: int,
    *,
    scale: str = "group",
    lengths: list[int] | None = None,
    truncated: list[bool] | None = None,
    logp_NT: torch.Tensor | None = None,
    sampling_logps: list[list[float | None]] | None = None,
    mode: str = "token_truncate",
    cap: float = 3.0,
    floor: float | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What TRL makes of scored rollouts (advantages, importance ratios, masks), and the metrics it logged.

    Args:
        rewards_NF: rewards of each completion by each function.
        group_size: completions per prompt.
        scale: `scale_rewards`.
        lengths: completion lengths; 3 each by default.
        truncated: completions without an end token, which TRL then masks out.
        logp_NT: the trainer's log-probabilities; with `sampling_logps` it turns the vLLM correction on.
        sampling_logps: the sampler's, None where vLLM gave NaN.
        mode: `vllm_importance_sampling_mode`.
        cap: `vllm_importance_sampling_clip_max`.
        floor: `vllm_importance_sampling_clip_min`.
    """
    count, functions = rewards_NF.shape
    lengths = lengths or [3] * count
    truncated = truncated or [False] * count
    completions = [[7] * (n - 1) + [7 if cut else END] for n, cut in zip(lengths, truncated, strict=True)]
    PartialState()  # accelerate's gather_object asks it for the number of processes
    names = [f"f{index}" for index in range(functions)]
    trainer = bare_trainer(
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        eos_token_ids=[END],
        pad_to_multiple_of=None,
        environment_factories=None,
        environments=None,
        tools=[],
        mask_truncated_completions=True,
        args=SimpleNamespace(
            per_device_train_batch_size=count, steps_per_generation=1, gradient_checkpointing_kwargs=None,
            gradient_accumulation_steps=1,
        ),
        num_iterations=1,
        use_vllm=logp_NT is not None,
        vllm_importance_sampling_correction=logp_NT is not None,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=cap,
        vllm_importance_sampling_clip_min=floor,
        beta=0.0,
        num_generations=group_size,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_weights=torch.ones(functions, dtype=rewards_NF.dtype),
        reward_func_names=names,
        log_multimodal=False,
        _pending_extra_logs={},
        _pending_metrics={},
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list), "extra": {}},
    )  # fmt: skip
    generated = ([[5]] * count, completions, None, ["text"] * count, sampling_logps, {}, None, [])
    trainer._generate = lambda prompts: generated
    trainer._calculate_rewards = lambda *_: rewards_NF
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp_NT, None, None)
    output = trainer._generate_and_score_completions([{"prompt": "question"}] * count)
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}
