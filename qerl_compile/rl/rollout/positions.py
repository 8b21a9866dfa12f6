"""How many positions a model has, and the refusal of sequences that need more.

A rotary embedding computes an angle for any position, so a sequence that is longer than the model was made for raises
nothing: it is sampled from, rewarded and trained on, as noise. Hence the sum of prompt and `max_new_tokens` is judged
before anything runs.

    most   max_position_embeddings
           linear, yarn     times the factor that stretches the original positions, if that is more
           longrope         original_max_position_embeddings: as soon as one row of a batch is longer, transformers
                            turns *all* of them by other angles, so a row would depend on its neighbours

What this module does not do: shorten prompts. Which end of a prompt can be spared is for the task to say.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qerl_compile.errors import ModelError


def most_positions(model: Any) -> tuple[int | None, str]:
    """Return the longest sequence that a model is for, in tokens, or None if it does not say; and what says so.

    Args:
        model: a causal LM of transformers.
    """
    config = model.config.get_text_config()
    limits = [(getattr(config, "max_position_embeddings", None), "max_position_embeddings")]
    limits += [_stretched(limits[0][0], rope) for rope in _ropes(config)]
    known = [(limit, name) for limit, name in limits if limit]
    if not known:
        return None, ""
    bound = [(limit, name) for limit, name in known if name == "original_max_position_embeddings"]
    return min(bound) if bound else max(known)


def check_positions(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, where: str = "rollout") -> None:
    """Refuse prompts that leave no room for their completions.

    Args:
        model: a causal LM of transformers.
        prompts: token ids.
        new_tokens: most tokens of a completion.
        where: what the prompts are of.

    Raises:
        ModelError: a prompt and `new_tokens` are longer than the model's positions.
    """
    limit, name = most_positions(model)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]), default=None)
    if limit is None or longest is None or len(prompts[longest]) + new_tokens <= limit:
        return
    class_name = type(model).__name__
    raise ModelError(
        where=f"{where}: prompt {longest}",
        expected=f"at most {limit} tokens with its completion, as many as {class_name} has positions ({name})",
        got=f"{len(prompts[longest])} and up to {new_tokens} new ones",
        do="Lower max_new_tokens, or leave long prompts out of the task.",
    )


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary settings, of which a model may have one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested: Iterable[Any] = [each for each in given.values() if isinstance(each, Mapping)]
    yield from nested or [given]


def _stretched(positions: int | None, rope: Mapping[str, Any]) -> tuple[int | None, str]:
    kind, original = rope.get("rope_type"), rope.get("original_max_position_embeddings")
    if kind == "longrope":
        return original, "original_max_position_embeddings"
    if kind in ("linear", "yarn") and (original or positions):
        return int((original or positions) * rope.get("factor", 1.0)), f"{kind} rope of factor {rope.get('factor')}"
    return None, ""
