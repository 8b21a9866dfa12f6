"""`calibrate`: a dense causal LM and some text go in, a transformed model comes out, rounded by what its layers read.

    rows       texts → token rows of one length                                          samples.py
    calls      the model once per batch, layers replaced by note-takers                   layer_calls.py
    per layer  read its weights if they come from a checkpoint                            dense_weights.py
               run it dense, gather, fold, round                                          layer.py
               run it rounded: what comes out is what the next layer reads                (here)
               measure inputs and cache on the way, if the recipe asks                    served_scales.py
    outside    a packed head is done last, on the hidden states after all layers
    attach     packed weights, adapters, noise, compilation: as `transform` does          attach.py, model.py

The next layer reads the **rounded** outputs and not the dense ones: they are what it will read when served, its
Hessian and scales are then of the right inputs, and GPTQ and AWQ round each layer for what the layers before have
left of the signal. The price is that a layer's target is its dense weight on a slightly wrong input, so errors of
earlier layers are not undone (that would need training).

Costs two forwards of the text per layer, one layer of dense weights, and twice the hidden states of the text in main
memory (128 samples of 512 tokens at 4,096 channels: 1 GB).

With text, `scales: mse` weighs a column's error by E[x_k²]; without (transform, load) all columns count alike.
Weights are rounded from the model's dtype (`dtype`), where `load` rounds from the checkpoint's.

What this module does not do: mixtures of experts (refused), choose text, round within a layer in sequence, train
scales, use several devices. A model in memory is changed in place: if a layer fails, it is lost."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.attach import Attacher
from qerl_compile.calibrating.dense_weights import DenseWeights, opened
from qerl_compile.calibrating.layer import LayerWork
from qerl_compile.calibrating.layer_calls import LayerCalls
from qerl_compile.calibrating.samples import token_rows
from qerl_compile.calibrating.served_scales import LargestValues, input_scale
from qerl_compile.calibrating.statistics import gathering, refuse_not_finite
from qerl_compile.errors import ModelError
from qerl_compile.expert_stacks import expert_stacks
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.plan import Plan, make_plan
from qerl_compile.recipe import CalibrationConfig, Recipe
from qerl_compile.regions import capture
from qerl_compile.transforming import RecipeLike, check_options


@dataclass(frozen=True)
class LayerReport:
    """What calibration has done to one layer.

    Attributes:
        layer: module path.
        number, layers: this one's, from 1, and how many there are.
        tokens: how many were read.
        output_error: Σ (rounded - dense)² / Σ dense² of the layer's output, both on the same (rounded) input.
        folded: modules that took channel factors.
        left_alone: modules that could not, each with the reason.
    """

    layer: str
    number: int
    layers: int
    tokens: int
    output_error: float
    folded: tuple[str, ...]
    left_alone: tuple[str, ...]


def calibrate(
    model_or_path: nn.Module | str | PathLike[str],
    recipe: RecipeLike,
    texts: Iterable[str],
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    inner: str = "inductor",
    decode: str = "regional",
    seed: int = 0,
    trust_remote_code: bool = False,
    listen: Callable[[LayerReport], None] | None = None,
) -> Any:
    """Transform a causal LM with weights that are rounded, and scales that are measured, on sample text.

    Args:
        model_or_path: a dense transformers causal LM on its final device; or a model directory, hub id or "smollm2",
            which is read layer by layer.
        recipe: as `transform`; its `calibration` says how much text is read and what is measured.
        texts: sample text, in the order in which it is read; see samples.py.
        tokenizer: of the model; None is that of the directory. Needed for a model in memory.
        device: where a model from a path will live; None is CUDA if there is one, else the CPU.
        dtype: of a model from a path; None is what config.json says.
        inner: "inductor", "aot_eager" or "eager".
        decode: "regional" or "whole", see `transform`.
        seed: of new adapters' initial values.
        trust_remote_code: allow a directory that holds Python files; the files are still not run.
        listen: called after every layer.

    Returns:
        The transformed model, as `transform` and `load` return it.

    Raises:
        TaskError: too little text.
        NotFiniteError: the text makes a layer compute NaN or Inf.
        ModelError: a model that cannot be calibrated, such as a transformed one; a missing tokenizer.
        GraphError: layers cannot be called one by one.
        RecipeError, FormatError, CheckpointError: as `transform` and `load`.
    """
    recipe = Recipe.resolve(recipe)
    check_options(inner, decode)
    config = recipe.calibration or CalibrationConfig()
    model, tokenizer, weights = opened(model_or_path, tokenizer, device, dtype, trust_remote_code=trust_remote_code)
    plan = make_plan(model, recipe, calibrating=True)
    _refuse_experts(model)
    rows_ST = token_rows(texts, tokenizer, samples=config.samples, tokens=config.tokens)
    was_training = model.training and isinstance(model_or_path, nn.Module)  # one that is built here has no mode yet
    model.eval()
    attacher = Attacher(model, plan, seed=seed)
    with torch.no_grad():
        weights.outside(plan)
        run = _Run(model, plan, config, weights, attacher, rows_ST)
        for report in run.layers():
            if listen is not None:
                listen(report)
        run.outside()
    state = TransformState(recipe, attacher.finish(), inner, decode, recipe.train.recompute, base_name=weights.name)
    model.train(was_training)
    become_qerl(model, state)
    return model


def _refuse_experts(model: nn.Module) -> None:
    """Refuse a mixture of experts: which tokens an expert reads is not gathered here, and files name experts apart."""
    for name in expert_stacks(model):
        raise ModelError(
            where=name,
            expected="a model whose layers are linears, for calibration",
            got="experts stacked into one tensor",
            do="Use transform or load with a recipe that needs no sample text.",
        )


class _Run:
    """One calibration under way."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        config: CalibrationConfig,
        weights: DenseWeights,
        attacher: Attacher,
        rows_ST: Tensor,
    ) -> None:
        self.model, self.plan, self.config = model, plan, config
        self.weights, self.attacher, self.tokens = weights, attacher, rows_ST.numel()
        self.facts = capture(model) if config.channel_scaling == "awq" else {}
        self.calls = LayerCalls(model, plan.layers, rows_ST)

    def layers(self) -> Iterable[LayerReport]:
        """Round layer after layer."""
        for index, path in enumerate(self.plan.layers):
            self.weights.layer(path)
            work = LayerWork.of(self.model, self.plan, path)
            error = self._layer(index, path, work)
            yield LayerReport(
                layer=path,
                number=index + 1,
                layers=len(self.plan.layers),
                tokens=self.tokens,
                output_error=error,
                folded=tuple(work.folded),
                left_alone=tuple(work.left_alone),
            )

    def outside(self) -> None:
        """Round the sites outside the layers, such as an untied head, on the hidden states after the last layer."""
        work, largest = LayerWork.of(self.model, self.plan, None), LargestValues()
        leads = work.leads()
        if leads:
            with gathering(leads, work.hessians(None)) as inputs, largest.watching(self.model, self._measured(work)):
                self.calls.run_rest()
            work.pack(inputs)
            self._attach(work, largest)

    def _layer(self, index: int, path: str, work: LayerWork) -> float:
        facts = self.facts.get(path)
        with gathering(work.leads(), work.hessians(facts)) as inputs:
            dense = [out.cpu() for out in self.calls.outputs(index)]
        if facts is not None:
            work.fold(facts, inputs)
        work.pack(inputs)
        work.place()
        largest, with_cache = LargestValues(), self.config.kv_cache == "fp8"
        with largest.watching(self.model.get_submodule(path), self._measured(work)):
            rounded = [out.cpu() for out in self.calls.outputs(index, largest if with_cache else None)]
        if with_cache:
            largest.keep_cache_scales(path)
        self._attach(work, largest)
        self.calls.hidden = rounded
        error = sum(float((r.float() - d.float()).square().sum()) for r, d in zip(rounded, dense, strict=True))
        if not math.isfinite(error):
            refuse_not_finite(path, "outputs")
        return error / max(sum(float(d.float().square().sum()) for d in dense), torch.finfo(torch.float32).tiny)

    def _measured(self, work: LayerWork) -> dict[str, nn.Module]:
        return work.leads() if self.config.activations else {}

    def _attach(self, work: LayerWork, largest: LargestValues) -> None:
        for path, packed in work.packed.items():
            amax = largest.inputs.get(self.plan.group_of(path)[0])
            dtype = self.model.get_submodule(path).get_parameter("weight").dtype
            measured = None if amax is None else input_scale(amax)
            self.attacher.packed(path, packed, dtype, input_scale=measured)
