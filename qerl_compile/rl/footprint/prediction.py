"""What a run will take of a GPU, before a weight is read: after loading, and at the peaks of rollout and update.

    after load   packed and dense weights + adapters
    rollout      that + stacked adapters + moments + scratch + pages and lines + max(prefill, one step's logits)
    update       after load + stacked adapters + moments + scratch + pages, unless they are freed
                   + gradients + what all layers keep + max(head with its chunks, backward of the dearest layer)
                   or, when the optimizer steps and that is more, gradients + its own intermediates

Peaks are those of a step in the middle of a run, when moments exist; before the first optimizer step they do not. The
figures are what `torch.cuda.max_memory_allocated` counts. The driver's context and the allocator's holes come on top
(`OUTSIDE_BYTES`), and what fits is judged with them; so is what captured decode steps keep of a stack of experts.

Completions are taken to run to `max_new_tokens`. Shorter ones make micro-batches of more rows, up to
`micro_batch_tokens`: `training_most` is the update's peak then.

What this module does not count: a teacher's weights, collectives of several ranks, a reward that uses the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch

from qerl_compile.recipe import Recipe, TrainConfig
from qerl_compile.rl.footprint.layer_graphs import PrefillGraph, TrainingGraphs, prefill_graph, training_graphs
from qerl_compile.rl.footprint.liveness import rounded
from qerl_compile.rl.footprint.resident import Held, LayerKind, skeleton, source_of
from qerl_compile.rl.optimizer import moment_bytes
from qerl_compile.rl.rollout.cache import CacheShape
from qerl_compile.rl.rollout.memory import CACHE_SHARE, Workload
from qerl_compile.rl.rollout.paged import PAGE_TOKENS, PREFILL_TOKENS
from qerl_compile.rl.token_logps import CHUNK_BYTES
from qerl_compile.rl.trainer import TRAINING_SHARE

GIB = 2**30
OUTSIDE_BYTES = 1 * GIB
"""Of the device, what torch's count leaves out: context and modules of the driver, and holes between blocks."""

LIBRARY_BYTES = 64 * 2**20
"""cuBLAS and cuBLASLt each take a workspace of 32 MiB on Hopper, from the same allocator."""

CHUNKS_AT_PEAK = 3
"""A chunk of logits at its peak, in chunks (rl/token_logps.py, measured)."""


@dataclass(frozen=True)
class Footprint:
    """A prediction in bytes; see the module's essay.

    Args:
        model: its class.
        kinds: the decoder layers.
        held: what the model holds.
        after_load: before anything runs.
        rollout_peak: in a rollout.
        training_peak: in an update whose completions have full length.
        training_most: in an update whose micro-batches are full.
        rollout: the rollout's parts, named.
        training: the update's parts, named; of `training_peak`.
        device_bytes: of the GPU; None for no limit.
        pages_wanted: bytes of pages that all rows at full length need.
        pages_least: bytes of pages without which no sample runs.
    """

    model: str
    kinds: tuple[LayerKind, ...]
    held: Held
    after_load: int
    rollout_peak: int
    training_peak: int
    training_most: int
    rollout: dict[str, int]
    training: dict[str, int]
    device_bytes: int | None
    pages_wanted: int
    pages_least: int

    @property
    def peak(self) -> int:
        """The most that torch allocates."""
        return max(self.rollout_peak, self.training_most)

    @property
    def over(self) -> int:
        """Bytes by which the device is too small; 0 if all fits."""
        if self.device_bytes is None:
            return 0
        missing = max(0, self.pages_least - self.rollout["pages"])
        return max(0, self.peak + missing + self.outside - self.device_bytes)

    @property
    def outside(self) -> int:
        """Bytes of the device that torch's count leaves out."""
        return OUTSIDE_BYTES + self.held.captured

    @property
    def phase(self) -> str:
        """Which phase has the peak."""
        return "rollout" if self.rollout_peak >= self.training_most else "update"


def predict(
    model_or_config: Any,
    recipe: Any,
    device_bytes: int | None = None,
    *,
    prompt_tokens: int = 256,
    trust_remote_code: bool = False,
) -> Footprint:
    """Predict the memory of training a model.

    Args:
        model_or_config: a path, hub id or "smollm2"; a transformers config; or a causal LM on meta, which is changed.
        recipe: as for `load`; its `train` settings decide.
        device_bytes: memory of the GPU; None takes that of the present one, or no limit without one.
        prompt_tokens: tokens of a prompt, which no recipe knows.
        trust_remote_code: as for `load`.

    Raises:
        RecipeError, FormatError, GraphError, CheckpointError, ModelError: as `load`.
    """
    predictor = Predictor(model_or_config, Recipe.resolve(recipe), trust_remote_code=trust_remote_code)
    return predictor.footprint(device_bytes, prompt_tokens=prompt_tokens)


class Predictor:
    """A model and a recipe whose graphs are captured once, for predictions under several settings.

    Args:
        model_or_config: as for `predict`.
        recipe: what is done to it.
        adapter: directory of an adapter to start from.
        trust_remote_code: as for `load`.

    Raises:
        RecipeError, FormatError, GraphError, CheckpointError, ModelError: as `load`.
    """

    def __init__(
        self,
        model_or_config: Any,
        recipe: Recipe,
        *,
        adapter: str | PathLike[str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.recipe = recipe
        source = source_of(model_or_config, trust_remote_code=trust_remote_code)
        model, self.lacks_weights = source.model, source.lacks_weights
        self.name = type(model).__name__
        self.shape = CacheShape.of(model, PAGE_TOKENS["cuda"])  # first: its refusals are plainer than a graph's
        self.skeleton = skeleton(source, recipe, adapter)
        config = model.config.get_text_config()
        self.width, self.vocabulary = config.hidden_size, config.vocab_size
        self._graphs: dict[bool, list[TrainingGraphs]] = {}

    def footprint(
        self, device_bytes: int | None = None, *, prompt_tokens: int = 256, train: TrainConfig | None = None
    ) -> Footprint:
        """Predict under the recipe's training settings, or under others."""
        train = train or self.recipe.train
        device_bytes = device_bytes or present_device_bytes()
        held = self.skeleton.held
        moments = self._moments(train)
        common = {
            "packed weights": held.packed,
            "dense weights": held.dense,
            "adapters": held.adapters,
            "stacked adapters": held.stacked,
            "moments": moments,
            "scratch": held.scratch + LIBRARY_BYTES,
        }
        pages, wanted, least = self._pages(train, device_bytes, prompt_tokens)
        rollout = {**common, "pages": pages, "activations": self._rollout_activations(train, prompt_tokens)}
        kept = pages if train.rollout_cache == "kept" else 0
        lines = self._lines(train, prompt_tokens)
        full = prompt_tokens + train.max_new_tokens
        rows = _rows(train, full)
        parts = self._update(train, rows, full)
        training = {**common, "pages": kept + lines, **parts}
        rollout["pages"] += lines
        most = max(
            sum(parts.values()), *(sum(self._update(train, *each).values()) for each in _filled(train, rows, full))
        )
        return Footprint(
            model=self.name,
            kinds=self.skeleton.kinds,
            held=held,
            after_load=held.after_load,
            rollout_peak=sum(rollout.values()),
            training_peak=sum(training.values()),
            training_most=sum(training.values()) - sum(parts.values()) + most,
            rollout=rollout,
            training=training,
            device_bytes=device_bytes,
            pages_wanted=wanted,
            pages_least=least,
        )

    def _moments(self, train: TrainConfig) -> int:
        trained = [parameter.numel() for parameter in self.skeleton.model.parameters() if parameter.requires_grad]
        return moment_bytes(trained, train.optimizer)

    def _pages(self, train: TrainConfig, device_bytes: int | None, prompt_tokens: int) -> tuple[int, int, int]:
        """Return bytes of the pages that a run will have, could use, and cannot do without."""
        one = self.shape.page_bytes
        works = [
            Workload((prompt_tokens,) * prompts, group, train.max_new_tokens, self.shape.page_tokens)
            for prompts, group in ((train.prompts_per_step, train.group_size), (train.eval_size, 1))
        ]
        wanted = max(2, *(work.most_pages(min(train.rollout_batch, work.samples)) for work in works)) * one
        least = max(work.least_pages(0) for work in works) * one
        held = self.skeleton.held
        if train.rollout_memory_gib is not None:
            allowed = int(train.rollout_memory_gib * GIB)
        elif device_bytes is None:
            allowed = wanted
        else:
            # The first rollout decides, when there are no moments yet.
            free = device_bytes - OUTSIDE_BYTES - held.after_load - held.stacked
            allowed = int(max(0, free) * (TRAINING_SHARE if train.rollout_cache == "kept" else CACHE_SHARE))
        return min(wanted, allowed // one * one), wanted, least

    def _lines(self, train: TrainConfig, prompt_tokens: int) -> int:
        """Return the bytes of the decode lines (rl/rollout/decode.py): per token a float64, an int64 and a float32."""
        rows = min(train.rollout_batch, train.prompts_per_step * train.group_size)
        return rows * (20 * train.max_new_tokens + 4 * (prompt_tokens + train.max_new_tokens) // self.shape.page_tokens)

    def _rollout_activations(self, train: TrainConfig, prompt_tokens: int) -> int:
        """Return the larger of a prefill and of a decode step, and the logits that wait for their rows."""
        rows = max(2, min(train.rollout_batch, train.prompts_per_step * train.group_size))
        prompts = max(-(-rows // train.group_size), min(train.rollout_batch, train.eval_size))
        together = max(1, min(PREFILL_TOKENS // prompt_tokens, prompts))
        itemsize = self.shape.dtype.itemsize
        hidden = together * prompt_tokens * self.width * itemsize  # the embeddings, which the decoder holds on to
        layers = max(graph.bytes(max(2, together), prompt_tokens) for graph in self._prefills)
        logits = rows * self.vocabulary
        # A prompt's logits wait in the model's dtype; drawing stacks them, divides and takes probabilities in float32.
        drawing = logits * (2 * itemsize + 4 + 4 * (train.temperature != 1))
        return max(hidden + layers + prompts * self.vocabulary * itemsize, drawing)

    def _update(self, train: TrainConfig, rows: int, positions: int) -> dict[str, int]:
        """Return gradients, kept activations and what lives beside them at the update's peak, in bytes."""
        held = self.skeleton.held
        tokens, itemsize = rows * positions, self.shape.dtype.itemsize
        gradients = rounded(4 * held.trained)
        graphs = self._training(train.recompute)
        kinds = self.skeleton.kinds
        kept = [graph.kept_bytes(rows, positions) for graph in graphs]
        all_kept = sum(kind.count * size for kind, size in zip(kinds, kept, strict=True))
        width = tokens * self.width
        chunk = CHUNKS_AT_PEAK * min(CHUNK_BYTES, 4 * tokens * self.vocabulary)
        head = width * (itemsize + 4) + chunk + 2 * width * itemsize  # final norm in float32; features, their gradient
        backward = max(graph.backward_bytes(rows, positions) - size for graph, size in zip(graphs, kept, strict=True))
        sequences = train.prompts_per_step * train.group_size
        if sequences <= rows and train.updates_per_rollout == 1:
            # One micro-batch: gradients are not there yet where most activations are; they come as these go.
            lowest = gradients + max(kept) + backward
            gradients = max(0, lowest - all_kept - max(head, backward))
        parts = {
            "gradients": gradients,
            "kept activations": all_kept,
            "backward": max(head, backward),
        }
        # The state that an update without finite numbers goes back to.
        copies = gradients + self._moments(train) if train.updates_per_rollout > 1 else 0
        if copies:
            parts["state before"] = copies
        gradients = rounded(4 * held.trained)
        stepping = gradients + copies + (4 * held.trained if train.optimizer == "adamw" else 0)
        if stepping > sum(parts.values()):
            return {"gradients": gradients, "optimizer step": stepping - gradients}
        return parts

    def _training(self, recompute: bool) -> list[TrainingGraphs]:
        if recompute not in self._graphs:
            state = replace(self.skeleton.state, recompute=recompute, compilers=[])
            self._graphs[recompute] = [
                training_graphs(kind.first, kind.call, self.skeleton.model, state) for kind in self.skeleton.kinds
            ]
        return self._graphs[recompute]

    @cached_property
    def _prefills(self) -> list[PrefillGraph]:
        made = self.skeleton
        return [prefill_graph(kind.first, kind.call, made.model, made.state) for kind in made.kinds]


def present_device_bytes() -> int | None:
    """Return the memory of the present GPU, or None."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _rows(train: TrainConfig, positions: int) -> int:
    """Return the rows of a micro-batch of full-length sequences (rl/policy_batch.py)."""
    return max(1, min(train.micro_batch_tokens // positions, train.prompts_per_step * train.group_size))


def _filled(train: TrainConfig, rows: int, positions: int) -> Sequence[tuple[int, int]]:
    """Return rows and positions of the fullest micro-batch: one row more than fits at full length, and shorter."""
    sequences = train.prompts_per_step * train.group_size
    if rows >= sequences or (rows + 1) > train.micro_batch_tokens:
        return [(rows, positions)]
    shorter = min(positions, train.micro_batch_tokens // (rows + 1))
    return [(rows, positions), (rows + 1, shorter)]
