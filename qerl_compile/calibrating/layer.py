"""One decoder layer: gather what its linears read, fold, round, and put the rounded weights in place.

    gather     run the dense layer on all samples; statistics at the first linear of every group
    fold       channel scaling, if the recipe says so: first linears that are factors (up_proj), then norms, whose
               groups may contain such a linear
    mask       2:4, on what folding left
    pack       per group: block scales by the site's method, weighted by E[x_k²]; codes to nearest or by GPTQ
    place      the linear's dense weight becomes the decoded one, so that the layer can run as it will be served

What this module does not do: run the layer on its way to the next (running.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qerl_compile.calibrating.channel_scaling import best_factors, fold_into_norm
from qerl_compile.calibrating.gptq import gptq_group
from qerl_compile.calibrating.statistics import InputStatistics
from qerl_compile.formats.nvfp4 import PackedNVFP4, dequantize
from qerl_compile.formats.scale_search import search_group
from qerl_compile.passes.sparsify import mask_2_4
from qerl_compile.plan import Plan
from qerl_compile.regions import LayerFacts


@dataclass
class LayerWork:
    """The sites of one region, a decoder layer or all that is outside of them, while they become packed.

    Attributes:
        model: the region's weights are dense and on the device.
        plan: of the whole model.
        groups: packed sites of this region, those of a group together.
        thinned: sites that become sparse and stay dense.
        packed: path → packed weight, once `pack` has run.
        folded: modules that took factors.
        left_alone: why others did not.
    """

    model: nn.Module
    plan: Plan
    groups: list[tuple[str, ...]]
    thinned: list[str]
    packed: dict[str, PackedNVFP4] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    _weights: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, layer: str | None) -> "LayerWork":
        """Return the work in one decoder layer, or with None in everything outside of them."""
        inside = tuple(f"{path}." for path in plan.layers)

        def mine(path: str) -> bool:
            return not path.startswith(inside) if layer is None else path.startswith(f"{layer}.")

        groups = list(dict.fromkeys(plan.group_of(path) for path in plan.quantize if mine(path)))
        thinned = [path for path in plan.sparse if mine(path) and path not in plan.quantize]
        return cls(model, plan, groups, thinned)

    def leads(self) -> dict[str, nn.Module]:
        """Return the linears at which inputs are looked at: one of every group."""
        return {path: self.model.get_submodule(path) for path in [*(group[0] for group in self.groups), *self.thinned]}

    def hessians(self, facts: LayerFacts | None) -> dict[str, bool]:
        """Return which of the leads need a Hessian: GPTQ's, and those that channel scaling may fold (`facts`)."""
        wanted = {group[0] for group in self.groups if self.plan.quantize[group[0]].rounding == "gptq"}
        if facts is not None:
            wanted |= {self._lead(linears[0]) for _, linears in facts.feeds if linears[0] in self.plan.quantize}
        return {path: path in wanted for path in self.leads()}

    def fold(self, facts: LayerFacts, inputs: dict[str, InputStatistics]) -> None:
        """Scale channels where it helps; weights, norms and statistics change together."""
        by_kind = sorted(facts.feeds, key=lambda feed: feed[0] not in facts.linears)
        for source, linears in by_kind:
            reason = self._cannot_fold(source, linears, facts)
            if reason:
                self.left_alone.append(f"{source}: {reason}")
                continue
            seen = inputs[self._lead(linears[0])]
            if seen.tokens == 0:
                continue
            weights = {path: self._weight(path) for path in linears}
            factor_K = best_factors(weights, seen, self._pack_nearest)
            if factor_K is None:
                continue
            if source in facts.linears:
                self._scale_rows(source, factor_K)
            else:
                factor_K = fold_into_norm(self.model.get_submodule(source), factor_K)
                if factor_K is None:
                    self.left_alone.append(f"{source}: a norm of another kind")
                    continue
            self.folded.append(source)
            for path in linears:
                self._weights[path] = self._weight(path).float() * factor_K
            for lead in dict.fromkeys(self._lead(path) for path in linears):
                inputs[lead] = inputs[lead].divided(factor_K)

    def pack(self, inputs: Mapping[str, InputStatistics]) -> None:
        """Fill `packed`, and mask what stays dense."""
        for group in self.groups:
            site, seen = self.plan.quantize[group[0]], inputs[group[0]]
            weights = self._one_dtype({path: self._weight(path) for path in group})
            kept = {path: self._kept(path, w, seen) for path, w in weights.items() if path in self.plan.sparse}
            masked = {path: w * kept[path] if path in kept else w for path, w in weights.items()}
            packed = self._pack_nearest(masked, seen.importance_K())
            if site.rounding == "gptq" and seen.hessian_KK is not None and seen.tokens:
                everything = {path: kept.get(path, torch.ones_like(w, dtype=torch.bool)) for path, w in weights.items()}
                packed = gptq_group(weights, packed, seen.hessian_KK, everything if kept else None)
            self.packed |= packed
        for path in self.thinned:
            weight = self.model.get_submodule(path).get_parameter("weight").data
            weight.masked_fill_(~self._kept(path, weight, inputs[path]), 0.0)

    def place(self) -> None:
        """Let the linears compute with the decoded weights, in the model's dtype."""
        for path, packed in self.packed.items():
            parameter = self.model.get_submodule(path).get_parameter("weight")
            parameter.data = dequantize(packed, parameter.dtype)

    def _lead(self, path: str) -> str:
        return self.plan.group_of(path)[0]

    def _weight(self, path: str) -> Tensor:
        return self._weights.get(path, self.model.get_submodule(path).get_parameter("weight").data)

    def _pack_nearest(self, weights: dict[str, Tensor], importance_K: Tensor | None) -> dict[str, PackedNVFP4]:
        packed: dict[str, PackedNVFP4] = {}
        for group in dict.fromkeys(self.plan.group_of(path) for path in weights):
            members = {path: weights[path] for path in group}
            importance = None if importance_K is None else dict.fromkeys(members, importance_K)
            packed |= search_group(members, self.plan.quantize[group[0]].scales, importance=importance)
        return packed

    def _kept(self, path: str, w_NK: Tensor, seen: InputStatistics) -> Tensor:
        by_norm = self.plan.sparse[path] == "wanda" and seen.tokens > 0
        return mask_2_4(w_NK, seen.norm_K() if by_norm else None)

    def _scale_rows(self, path: str, factor_N: Tensor) -> None:
        self._weights[path] = self._weight(path).float() / factor_N[:, None]
        bias = self.model.get_submodule(path)._parameters.get("bias")
        if bias is not None:
            bias.data.copy_(bias.float() / factor_N)

    def _cannot_fold(self, source: str, linears: tuple[str, ...], facts: LayerFacts) -> str:
        packed = self.plan.quantize
        if any(path not in packed for path in linears):
            return "feeds a linear that is not packed"
        if any(set(self.plan.group_of(path)) - set(linears) for path in linears):
            return "feeds a part of a group"
        if source in facts.linears:
            rows = self.model.get_submodule(source).get_parameter("weight").shape[0]
            columns = self._weight(linears[0]).shape[1]
            if source not in packed or rows != columns:
                return "a linear that is not packed, or no factor per channel"
        return ""

    def _one_dtype(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if len({w.dtype for w in weights.values()}) == 1:
            return weights
        return {path: w.float() for path, w in weights.items()}
