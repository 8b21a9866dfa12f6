"""The parts of a recipe: rules that select modules, the noise, the training settings.

A recipe says *which* modules are treated *how*. Selection is by full-path regular expression over module paths
(`re.fullmatch`, so `q_proj` alone matches nothing but a module called exactly that), and within a list the first
match wins. Families of models are never named here: a rule knows only paths, and everything else about a site (which
linears share an input, which norm feeds them) is a fact of the captured graph.

Every class is frozen and forbids unknown keys: a typo must be an error, because a silently ignored `sigma_strat` is a
run without noise that looks like a run with it. Numbers are strict: `"32"` and `true` are not integers. Defaults are
those of the paper (QeRL, arXiv 2510.11696, Table 4) where it states one and of the authors' scripts otherwise; where
ours differ, the field says so and why.

What this module does not do: read files (recipe.py, recipe_yaml.py), phrase errors (recipe_errors.py), or know whether
a rule matches anything in a model (plan.py).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qerl_compile.recipe_errors import recipe_error
from qerl_compile.recipe_pattern import checked_pattern

Pattern = Annotated[str, AfterValidator(checked_pattern)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=10_000_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
OpenFraction = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]


class Part(BaseModel):
    """Base of every part of a recipe: frozen, no unknown keys, field docstrings become schema descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="wrap")
    @classmethod
    def _phrase(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Raise a RecipeError where pydantic would raise its own error, as in `QuantizeRule(match="(")`.

        `Recipe.from_dict` passes a context; it then does the phrasing itself, for it knows the whole path of the key.
        """
        try:
            return handler(data)
        except ValidationError as fault:
            if info.context is not None:
                raise
            raise recipe_error(fault, cls, cls.__name__) from None


class QuantizeRule(Part):
    """How the weights of the matching linear modules are stored."""

    match: Pattern
    """Full-path regular expression over module paths, e.g. `model\\.layers\\.\\d+\\.mlp\\.\\w+_proj`."""

    format: Literal["nvfp4", "none"] = "nvfp4"
    """Number format of the packed weight. `none` leaves the module dense (and stops the search: first match wins)."""

    scales: Literal["amax", "mse", "four_over_six"] = "amax"
    """How block scales are chosen: `amax` from the block's largest weight (the bytes of compressed-tensors), `mse` by
    the least squared error over all scales that E4M3 has, `four_over_six` by letting the largest weight land on 4 or
    on 6. The last two are made for calibration text, which says how much a column's error matters."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """`gptq` rounds column by column and lets later columns make up for the error; it needs calibration data."""

    weights: Literal["packed", "trained"] = "packed"
    """`trained` keeps the full-precision weight, trains it, and rounds it in every forward (quantization-aware
    training, straight-through gradients); nothing is packed and no memory saved until the model is exported."""

    @model_validator(mode="after")
    def _trained_weights_round_plainly(self) -> Self:
        plain = (self.format, self.scales, self.rounding) == ("nvfp4", "amax", "nearest")
        if self.weights == "trained" and not plain:
            raise ValueError(
                "format nvfp4, scales amax and rounding nearest where weights are trained, as every step rounds; "
                f"{self.format}, {self.scales} and {self.rounding}"
            )
        return self


class SparsityRule(Part):
    """Which linear modules lose two of every four weights along the input (2:4), before they are quantized."""

    match: Pattern
    """Full-path regular expression over module paths."""

    score: Literal["magnitude", "wanda", "none"] = "magnitude"
    """What decides which two stay: |w|, or |w| times the norm of the input channel (Wanda, arXiv 2306.11695), which
    needs calibration data. `none` leaves the module dense (and stops the search: first match wins)."""


class CalibrationConfig(Part):
    """What is measured on sample text while a model is quantized layer by layer; the text is no part of a recipe."""

    samples: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 128
    """How many samples of the text are read."""

    tokens: Annotated[int, Field(strict=True, ge=16, le=1_000_000)] = 512
    """Tokens in each sample."""

    channel_scaling: Literal["none", "awq"] = "none"
    """`awq` moves a factor per input channel from the activations into the weights before these are rounded, where a
    norm feeds them that can take its reciprocal (arXiv 2306.00978)."""

    activations: Flag = False
    """Measure the largest input of every packed linear: the input scales that a W4A4 export needs."""

    kv_cache: Literal["none", "fp8"] = "none"
    """`fp8` measures the largest keys and values: scales of an FP8 cache in the export."""


class LoraRule(Part):
    """Which linear modules get a trainable low-rank branch `y += (alpha / rank) * B A x`."""

    match: Pattern
    """Full-path regular expression over module paths."""

    rank: Annotated[int, Field(strict=True, ge=0, le=4096)] = 32
    """Rows of A and columns of B. 0 leaves the module without a branch (and stops the search: first match wins)."""

    alpha: Positive = 32.0
    """Numerator of the branch's factor `alpha / rank`. Unitless."""


class NoiseConfig(Part):
    """Adaptive quantization noise: Gaussian noise added to norm weights during rollouts, in stages that decay.

    Stage of step s (1-based) of M steps with K stages: `k = min(K - 1, (s - 1) * K // M)`. Stage 0 has sigma 0 (only
    quantization noise); stages 1 .. K-1 go from `sigma_start` to `sigma_end` on the schedule (paper, Eq. 8).
    """

    match: Pattern = ".*"
    """Selects, by full path, among the eligible norms: those that feed q/k/v or gate/up. Others are never noisy."""

    sigma_start: NonNegative = 1e-2
    """Standard deviation at stage 1, in units of the norm weight."""

    schedule: Literal["exponential", "linear", "cosine", "logarithmic"] = "exponential"
    """How sigma goes from start to end; exponential is geometric (the paper's best, Fig. 9)."""

    sigma_end: NonNegative = Field(default=5e-4, validate_default=True)
    """Standard deviation at the last stage, in units of the norm weight."""

    stages: Annotated[int, Field(strict=True, ge=2, le=10_000)] = 10
    """Number K of stages, the silent stage 0 included."""

    exponent: Literal["released", "paper"] = "released"
    """Which fraction of the way stage k has gone: (k-1)/(K-2), so that the last stage runs at `sigma_end` (the authors'
    code), or (k-1)/(K-1) as equation 8 is printed, which never gets there."""

    enabled: Flag = True
    """`false` leaves the noise out and everything else as it is: the ablation in one field, on any base."""

    in_update: Flag = False
    """Whether the noise also acts in log-prob and gradient forwards; in the paper (Algorithm 1) it does not."""

    @field_validator("sigma_end")
    @classmethod
    def _decays(cls, sigma_end: float, info: ValidationInfo) -> float:
        sigma_start = info.data.get("sigma_start", sigma_end)
        if sigma_end > sigma_start:
            raise ValueError(f"sigma_end <= sigma_start, which is {sigma_start}; {sigma_end}")
        if sigma_start > 0 and sigma_end == 0 and info.data.get("schedule") == "exponential":
            raise ValueError("sigma_end > 0, because an exponential schedule never reaches zero; 0")
        return sigma_end


class TrainConfig(Part):
    """Settings of the reinforcement-learning loop; by default GRPO with the token-mean loss and clip-higher of DAPO."""

    steps: Count = 600
    """Optimizer steps. The paper's GSM8K runs take about 600."""

    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"] = "dapo"
    """Policy loss; each is a file with its equation and source in rl/losses/."""

    advantage_scale: Literal["group", "batch", "none"] = "group"
    """What a centred reward is divided by: the deviation of its group, of the whole batch, or nothing (Dr. GRPO)."""

    updates_per_rollout: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    """Optimizer steps on each rollout. Above 1, the log-probs before the first are stored. Paper: 4 (GSM8K), else 1."""

    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits (bitsandbytes, extra `bnb`): 6 bytes less per trained parameter."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW. Paper: 1e-5 on a quantized base, 5e-6 on a bf16 base. Small models want more."""

    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """Course after the warm-up: `cosine` falls to zero at the last step (the authors' scripts); `constant` stays."""

    warmup_ratio: Fraction = 0.1
    """Fraction of `steps` over which the learning rate rises linearly from zero."""

    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.99)
    """Decay rates of AdamW's first and second moment."""

    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of AdamW, on the LoRA matrices only; trained norms get none."""

    max_grad_norm: Positive = 0.2
    """The global L2 norm of the gradient is clipped to this."""

    prompts_per_step: Count = 16
    """Different prompts per step. 16 prompts x 8 samples = the paper's training batch of 128 sequences."""

    group_size: Annotated[int, Field(strict=True, ge=2, le=4096)] = 8
    """Samples per prompt; advantages are normalised within this group. Paper: 8 (GSM8K), 16 (BigMath)."""

    max_new_tokens: Count = 512
    """Longest completion in tokens. Paper: 4096 (GSM8K), 8192 (BigMath); ours is what one small machine can afford."""

    temperature: Positive = 1.0
    """Sampling temperature of rollouts. Recorded log-probs are of the distribution at this temperature."""

    clip_low: OpenFraction = 0.2
    """The policy ratio is clipped below at `1 - clip_low`."""

    clip_high: NonNegative = 0.28
    """The policy ratio is clipped above at `1 + clip_high` (DAPO's clip-higher keeps rare tokens alive).

    The defaults are for token ratios: `gspo` wants about 3e-4 and 4e-4, `cispo` a `clip_high` of about 4.
    """

    clip_delta: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] | None = None
    """Upper bound of the ratio where the advantage is negative, which clipping leaves open; `null` for none.

    Above `1 + clip_high`.
    """

    @field_validator("clip_delta")
    @classmethod
    def _beyond_clip_high(cls, clip_delta: float | None, info: ValidationInfo) -> float | None:
        highest = 1 + info.data.get("clip_high", 0.0)
        if clip_delta is not None and clip_delta <= highest:
            raise ValueError(f"clip_delta > 1 + clip_high, which is {highest:g}; {clip_delta:g}")
        return clip_delta

    kl_weight: NonNegative = 0.0
    """Weight of the KL divergence (k3 estimate) from the policy to the model without its adapter; 0 for none."""

    kl_unbiased: Flag = True
    """Multiply each token's estimate by its ratio, which makes the gradient that of the KL divergence (TRL 1.16)."""

    reward_weight: NonNegative = 1.0
    """Weight of the policy loss, its KL term included; 0 with `distill_weight` above 0 is distillation alone."""

    distill_weight: NonNegative = Field(default=0.0, validate_default=True)
    """Weight of the KL divergence from the policy to a teacher on the policy's own samples; needs `--teacher`."""

    @field_validator("distill_weight")
    @classmethod
    def _something_is_trained(cls, distill_weight: float, info: ValidationInfo) -> float:
        if distill_weight == 0 and info.data.get("reward_weight") == 0:
            raise ValueError("distill_weight > 0 where reward_weight is 0, or nothing would be trained; 0")
        return distill_weight

    correction: Literal["none", "truncate", "mask"] = "none"
    """What is done about rollouts whose sampler is not exactly the trainer's policy (kernels, noise): `truncate` weighs
    a token by trainer / sampler probability, at most `correction_cap`; `mask` also leaves out tokens beyond it."""

    correction_level: Literal["token", "sequence"] = "token"
    """Whether that ratio is of a token or of a whole completion."""

    correction_cap: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = 3.0
    """Largest ratio; `mask` also leaves out what is below its reciprocal."""

    parity_limit: Positive = 0.5
    """Before step 1, a rollout without noise is compared with the trainer's own log-probs; a mean absolute difference
    above this (nats per token) stops the run: the two would not be the same policy."""

    dynamic_sampling_rounds: Annotated[int, Field(strict=True, ge=0, le=100)] = 0
    """Most extra rounds of prompts in a step to replace groups without signal (DAPO); 0 keeps whatever comes."""

    signal_threshold: NonNegative = 0.0
    """A group has signal if the standard deviation of its rewards is above this."""

    overlong_buffer: CountOrZero = 0
    """The last so many tokens before `max_new_tokens` cost reward, linearly up to `overlong_penalty` (DAPO, eq. 13)."""

    overlong_penalty: NonNegative = 1.0
    """Reward taken from a completion of full length."""

    mask_truncated: Flag = False
    """Leave completions that were cut off out of the loss."""

    seed: Seed = 0
    """Seed of LoRA initialisation, training items, sampling and noise."""

    eval_every: CountOrZero = 50
    """Steps between greedy evaluations with noise off; 0 evaluates only before and after training."""

    checkpoint_every: CountOrZero = 25
    """Steps between checkpoints, from which a run goes on bit by bit; 0 writes none but at SIGTERM and Ctrl-C."""

    checkpoints_kept: Annotated[int, Field(strict=True, ge=1, le=1000)] = 2
    """Newest checkpoints that are kept; the older one is what a damaged newest one falls back to."""

    max_bad_steps: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 3
    """Steps in a row whose loss, gradient or log-probs are not finite, after which the run stops with a dump.

    Such a step changes no parameter, also where an earlier update on its rollout was finite.
    """

    reward_timeout: Positive = 10.0
    """Seconds a reward function may take for one batch before its process is killed; a timeout is not a score of 0."""

    eval_size: Count = 128
    """Number of held-out items in each evaluation. Which items are held out depends on their text, not on a seed."""

    rollout_batch: Count = 64
    """Most sequences generated together in one batch."""

    rollout_memory_gib: Positive | None = None
    """Most memory of the rollouts' key-value cache, in GiB; `null` is half of what is free at the first rollout.

    A smaller cache runs fewer sequences at a time. With `rollout_cache: freed` `null` is 80 %.
    """

    rollout_cache: Literal["kept", "freed"] = "kept"
    """`freed` gives the cache back before each update and makes it anew for the next rollout, which on CUDA captures
    its graphs again; the update then has that memory. Samples are the same."""

    micro_batch_tokens: Count = 4096
    """Most tokens (prompt + completion, padding included) in one forward-backward; a longer sequence goes alone.

    Activations of the layers dominate (`recompute` trades them for time); logits are made 128 MiB at a time.
    """

    recompute: Flag = False
    """Recompute activations in the backward pass: saves memory, costs a third more compute."""
