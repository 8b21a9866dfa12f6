"""Which setting makes a run fit, and the refusal that names it.

Settings are tried one at a time, in the order of what they cost; each from its present value down by halves
(rollout_memory_gib by eighths of what the pages take), and the first value that fits is the answer:

    rollout_batch, rollout_memory_gib   fewer rows at a time: a rollout takes longer. To a quarter at first
    rollout_cache=freed                 pages are given back for the update; graphs are captured anew each step
    recompute=true                      a third more compute in the update
    micro_batch_tokens                  down to one sequence of full length
    rollout_batch, rollout_memory_gib   down to one row
    optimizer=adamw_8bit                moments in 8 bits; needs bitsandbytes
    max_new_tokens                      another task; the last resort, down to 64

Where the pages have no room for one prompt and one completion, rollout_memory_gib is raised to what these take instead.

Where no single one is enough, each is tried together with recompute=true; other pairs are not.

What this module does not do: weigh time against memory. Nothing here knows how long a step takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qerl_compile.errors import ModelError
from qerl_compile.recipe import TrainConfig
from qerl_compile.rl.footprint.prediction import GIB, Footprint, Predictor

LEAST_NEW_TOKENS = 64


@dataclass(frozen=True)
class Fit:
    """What makes a run fit: settings under `train`, and the footprint with them."""

    settings: dict[str, Any]
    footprint: Footprint

    @property
    def overrides(self) -> list[str]:
        """The settings as `--set` takes them."""
        return [
            f"train.{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in self.settings.items()
        ]


def fitting(predictor: Predictor, device_bytes: int, *, prompt_tokens: int = 256) -> Fit | None:
    """Return the first setting of the essay's list with which the run fits, or else a pair, or None.

    Args:
        predictor: of a run that does not fit.
        device_bytes: of the GPU.
        prompt_tokens: tokens of a prompt.
    """
    train = predictor.recipe.train
    now = predictor.footprint(device_bytes, prompt_tokens=prompt_tokens)
    singles = [{key: value} for key, value in candidates(train, now, prompt_tokens)]
    pairs = (
        [] if train.recompute else [{"recompute": True, **single} for single in singles if "recompute" not in single]
    )
    for settings in (*singles, *pairs):
        changed = train.model_copy(update=settings)
        found = predictor.footprint(device_bytes, prompt_tokens=prompt_tokens, train=changed)
        if not found.over:
            return Fit(settings, found)
    return None


def refuse_too_large(predictor: Predictor, footprint: Footprint, *, prompt_tokens: int = 256) -> None:
    """Refuse a run that does not fit its GPU.

    Raises:
        ModelError: which phase needs how much, of how much, by how much too much, and the setting that fits.
    """
    if not footprint.over or footprint.device_bytes is None:
        return
    fit = fitting(predictor, footprint.device_bytes, prompt_tokens=prompt_tokens)
    raise ModelError(
        where=f"plan of {footprint.model}",
        expected=f"a peak within {gib(footprint.device_bytes - footprint.outside)} of a GPU with "
        f"{gib(footprint.device_bytes)}, since {gib(footprint.outside)} stay outside torch's reach",
        got=_shortfall(footprint),
        do=f"Set {' and '.join(fit.overrides)}, with which the peak is {gib(fit.footprint.peak)}."
        if fit
        else _nothing(footprint),
    )


def _shortfall(footprint: Footprint) -> str:
    if footprint.pages_least > footprint.rollout["pages"]:
        wanted = f"{gib(footprint.pages_least)} of pages for one prompt and one completion"
        return f"{wanted}, and room for {gib(footprint.rollout['pages'])}"
    over = gib(footprint.over)
    return f"{gib(footprint.peak)} in the {footprint.phase}, {over} too much"


def _nothing(footprint: Footprint) -> str:
    if footprint.device_bytes is not None and footprint.after_load + footprint.outside > footprint.device_bytes:
        return f"Use a larger GPU, since weights and adapters alone take {gib(footprint.after_load)}."
    return "Use a larger GPU or a smaller model, since no setting and no pair of settings is enough."


def candidates(train: TrainConfig, now: Footprint, prompt_tokens: int) -> Iterator[tuple[str, Any]]:
    """Yield the settings to try, (key under `train`, value), in the order of the essay.

    Args:
        train: present settings.
        now: the footprint with them.
        prompt_tokens: tokens of a prompt.
    """
    rows = min(train.rollout_batch, max(train.prompts_per_step * train.group_size, train.eval_size))
    pages = min(now.rollout["pages"], now.pages_wanted) / GIB
    quarter = max(1, rows // 4)
    if now.pages_least <= now.rollout["pages"]:
        yield from (("rollout_batch", value) for value in _halves(rows, quarter))
        yield from (("rollout_memory_gib", value) for value in _gibs(pages, pages / 4))
    else:
        yield "rollout_memory_gib", -(-now.pages_least * 10 // GIB) / 10
    if train.rollout_cache == "kept":
        yield "rollout_cache", "freed"
    if not train.recompute:
        yield "recompute", True
    full = prompt_tokens + train.max_new_tokens
    yield from (("micro_batch_tokens", value) for value in _halves(train.micro_batch_tokens, full))
    if train.micro_batch_tokens > full:
        yield "micro_batch_tokens", full
    yield from (("rollout_batch", value) for value in _halves(quarter, 1))
    yield from (("rollout_memory_gib", value) for value in _gibs(pages / 4, now.pages_least / GIB))
    if train.optimizer == "adamw":
        yield "optimizer", "adamw_8bit"
    yield from (("max_new_tokens", value) for value in _halves(train.max_new_tokens, LEAST_NEW_TOKENS))


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= max(1, least):
        value //= 2
        yield value


def _gibs(value: float, least: float) -> Iterator[float]:
    """Yield eighths fewer of a number of GiB each time, with one digit after the point."""
    step = value / 8
    while step > 0 and (value := value - step) >= max(least, 0.1):
        yield int(value * 10) / 10 or 0.1


def gib(size_bytes: int) -> str:
    """Say bytes in GiB, or MiB below one."""
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.0f} MiB"
