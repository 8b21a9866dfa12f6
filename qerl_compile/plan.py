"""The plan: which module gets what, decided from the recipe and the captured graph before any weight is read.

    recipe rules × module tree  →  sites to quantize, groups to fuse, adapters, noisy and trained norms

Rules select by full module path (`re.fullmatch`), and within a list the first match wins. What may be selected is a
graph fact: linears that a decoder layer calls, norms that feed them. A rule that selects nothing is an error, not a
silent no-op, because that is how noise was never applied in the field (design/method.md, trap 2).

A *group* is the quantized linears of one layer that read the same input (q/k/v, gate/up). Its members are quantized
with one shared amax, since serving engines fuse them and keep one global scale, and the fuse pass makes them one
GEMM. Linears that share an input and stay dense are a *dense group*: one GEMM too, but in rollouts only, where it is
worth relaying their weights.

Noise that a recipe switches off (`noise.enabled: false`) has no sites: the graphs then hold no trace of it, and a run
with it off is the run of a recipe that never had it. Its rule is still matched, so that it can be switched on.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Protocol, TypeVar

from torch import Tensor, nn

from qerl_compile.errors import FormatError, RecipeError
from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.passes import LoraSite
from qerl_compile.recipe import Recipe
from qerl_compile.regions import LayerFacts, capture


@dataclass(frozen=True)
class Plan:
    """What transform attaches and rewrites; module paths are full paths.

    Attributes:
        layers: the decoder layers, in order; each is compiled as a region.
        quantize: module path → format of every linear to pack.
        groups: tuples of `quantize` paths that share an input, hence one amax and one GEMM.
        lora: module path → adapter.
        noise: norms that get a noise buffer; 2 per layer on Qwen2 and Llama.
        trained_norms: norms whose weight is trained, by a float32 copy.
        dense_groups: tuples of dense linears that share an input and can be laid into one tensor.
    """

    layers: tuple[str, ...]
    quantize: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    lora: Mapping[str, LoraSite] = field(default_factory=dict)
    noise: tuple[str, ...] = ()
    dense_groups: tuple[tuple[str, ...], ...] = ()
    trained_norms: tuple[str, ...] = ()

    def group_of(self, path: str) -> tuple[str, ...]:
        """Return the group that `path` belongs to, or `(path,)`."""
        return next((group for group in self.groups if path in group), (path,))

    def adapted(self) -> tuple[tuple[str, ...], ...]:
        """Return the linears whose adapters are stacked: groups with an adapter on some member, and lone sites."""
        groups = [*self.groups, *self.dense_groups]
        grouped = {path for group in groups for path in group}
        lone = [(path,) for path in self.lora if path not in grouped]
        return tuple(group for group in [*groups, *lone] if any(path in self.lora for path in group))

    def regions(self) -> tuple[str, ...]:
        """Return the modules to compile: the layers, and every site that lies outside them (such as an untied head)."""
        sites = dict.fromkeys([*self.quantize, *self.lora, *self.noise, *self.trained_norms])
        outside = [path for path in sites if not any(path.startswith(f"{layer}.") for layer in self.layers)]
        return (*self.layers, *outside)

    def kind(self, region: str) -> tuple[object, ...]:
        """Return what is done inside a region, by relative path: regions that differ here must not share a graph."""

        def inside(paths: Iterable[str]) -> list[str]:
            return [path for path in paths if path == region or path.startswith(f"{region}.")]

        quantized = [(path.removeprefix(region), self.quantize[path]) for path in inside(self.quantize)]
        adapters = [(path.removeprefix(region), self.lora[path]) for path in inside(self.lora)]
        noisy = [path.removeprefix(region) for path in inside(self.noise)]
        trained = [path.removeprefix(region) for path in inside(self.trained_norms)]
        dense = [tuple(path.removeprefix(region) for path in group) for group in self.dense_groups if inside(group)]
        return (tuple(quantized), tuple(adapters), tuple(noisy), tuple(trained), tuple(dense))


def make_plan(
    model: nn.Module,
    recipe: Recipe,
    *,
    packed: frozenset[str] = frozenset(),
    adapters: Mapping[str, LoraSite] | None = None,
    trained_norms: Sequence[str] | None = None,
) -> Plan:
    """Match the recipe against a model on any device, meta included.

    Args:
        model: with its weights still dense, or on meta.
        recipe: the rules.
        packed: linears that a checkpoint holds packed already; they are sites whatever the rules say.
        adapters: adapters that exist already, in place of those that the lora rules describe.
        trained_norms: norms that were trained already, in place of those that `trainable_norms` selects.

    Raises:
        RecipeError: a rule selects nothing, or selects what cannot be rewritten, or norms are trained without adapters.
        FormatError: a selected linear's K is no multiple of 16.
        GraphError: a decoder layer cannot be captured.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    facts = capture(model)
    called = {path for layer in facts.values() for path in layer.linears}
    inside = tuple(f"{layer}." for layer in facts)
    usable = [path for path in linears if path in called or not path.startswith(inside)]

    quantize = {path: "nvfp4" for path in usable if path in packed}
    for path, rule in _first_matches("quantize", recipe.quantize, usable, linears):
        if rule.format != "none":
            _check_packable(model, path, linears[path])
            quantize[path] = rule.format
    lora = dict(adapters) if adapters is not None else _lora_sites(recipe, usable, linears)
    _check_adapted(lora, usable)
    return Plan(
        layers=tuple(facts),
        quantize=quantize,
        groups=_groups(facts, quantize),
        lora=lora,
        noise=_noise_sites(facts, recipe),
        dense_groups=_dense_groups(model, facts, quantize),
        trained_norms=_trained_norms(facts, recipe, lora, trained_norms),
    )


def _lora_sites(recipe: Recipe, usable: Sequence[str], linears: Mapping[str, nn.Module]) -> dict[str, LoraSite]:
    matches = _first_matches("lora", recipe.lora, usable, linears)
    return {path: LoraSite(rank=rule.rank, alpha=rule.alpha) for path, rule in matches if rule.rank}


def _check_adapted(lora: Mapping[str, LoraSite], usable: Sequence[str]) -> None:
    unknown = [path for path in lora if path not in usable]
    if unknown:
        raise RecipeError(
            where=unknown[0],
            expected="an adapter on a linear that the model calls",
            got=f"an adapter on {len(unknown)} modules that it does not have as linears",
            do="Load an adapter that was trained on this model.",
        )


class _Rule(Protocol):
    @property
    def match(self) -> str: ...


RuleT = TypeVar("RuleT", bound=_Rule)


def _first_matches(
    key: str, rules: Sequence[RuleT], paths: Sequence[str], linears: Mapping[str, nn.Module]
) -> list[tuple[str, RuleT]]:
    """Return (path, rule) for each path that a rule selects; refuse a rule that is never the first to match."""
    selected: list[tuple[str, RuleT]] = []
    used = [False] * len(rules)
    for path in paths:
        for index, rule in enumerate(rules):
            if re.fullmatch(rule.match, path):
                selected.append((path, rule))
                used[index] = True
                break
    for index, rule in enumerate(rules):
        if not used[index]:
            matches = [path for path in paths if re.fullmatch(rule.match, path)]
            _refuse_unused(f"{key}[{index}].match", rule.match, list(linears), shadowed=bool(matches))
    return selected


def _refuse_unused(where: str, pattern: str, paths: list[str], *, shadowed: bool) -> None:
    if shadowed:
        got = f"{pattern!r}, all of whose modules an earlier rule takes"
        do = "Move this rule up or delete it: within a list the first match wins."
    else:
        near = get_close_matches(pattern.replace("\\", ""), paths, n=1, cutoff=0.3) or paths[:1]
        got = f"{pattern!r}, which matches none of {len(paths)} modules"
        do = f"Match the full path, such as {near[0]!r}." if near else "The model has no such modules; delete the rule."
    raise RecipeError(where=where, expected="a pattern that selects at least one module", got=got, do=do)


def check_columns(path: str, weight: Tensor) -> None:
    """Refuse a weight [N, K] whose K is no multiple of the block size; its values are not looked at.

    Raises:
        FormatError: naming the module.
    """
    features_out, features_in = weight.shape
    if features_in % BLOCK:
        raise FormatError(
            where=path,
            expected=f"in_features to be a multiple of {BLOCK} (one block scale per {BLOCK} columns)",
            got=f"a weight of shape [{features_out}, {features_in}]",
            do=f"Exclude it with an earlier rule: {{match: {re.escape(path)!r}, format: none}}.",
        )


def _check_packable(model: nn.Module, path: str, linear: nn.Linear) -> None:
    check_columns(path, linear.weight)
    sharers = [name for name, module in model.named_modules() if getattr(module, "weight", None) is linear.weight]
    if len(sharers) > 1:
        raise RecipeError(
            where=path,
            expected="a linear with a weight of its own",
            got=f"a weight tied to {', '.join(name for name in sharers if name != path)}",
            do="Exclude the tied head from the quantize rules: its embedding must stay dense.",
        )


def _groups(facts: Mapping[str, LayerFacts], quantize: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    groups: list[tuple[str, ...]] = []
    for layer in facts.values():
        for linears in layer.groups:
            for number_format in dict.fromkeys(quantize[path] for path in linears if path in quantize):
                members = tuple(path for path in linears if quantize.get(path) == number_format)
                if len(members) > 1:
                    groups.append(members)
    return tuple(groups)


def _dense_groups(
    model: nn.Module, facts: Mapping[str, LayerFacts], quantize: Mapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    """Return what shares an input, is not packed, and can be rows of one tensor: weights of one dtype, tied to nothing.

    Biases must be on all or on none: that is what the fuse pass takes.
    """
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    groups: list[tuple[str, ...]] = []
    for linears in (linears for layer in facts.values() for linears in layer.groups):
        dense = {path: model.get_submodule(path) for path in linears if path not in quantize}
        tensors = [(module._parameters["weight"], module._parameters.get("bias")) for module in dense.values()]
        alike = {(weight.dtype, bias is None or bias.dtype) for weight, bias in tensors if weight is not None}
        if len(dense) > 1 and len(alike) == 1 and all(holders[id(weight)] == 1 for weight, _ in tensors):
            groups.append(tuple(dense))
    return tuple(groups)


def _noise_sites(facts: Mapping[str, LayerFacts], recipe: Recipe) -> tuple[str, ...]:
    if recipe.noise is None:
        return ()
    sites = _matching_norms("noise.match", recipe.noise.match, _feeding_norms(facts))
    return sites if recipe.noise.enabled else ()


def _trained_norms(
    facts: Mapping[str, LayerFacts], recipe: Recipe, lora: Mapping[str, LoraSite], given: Sequence[str] | None
) -> tuple[str, ...]:
    eligible = _feeding_norms(facts)
    if given is not None:
        unknown = [path for path in given if path not in eligible]
        if unknown:
            raise RecipeError(
                where=unknown[0],
                expected="trained weights of norms that feed q/k/v or gate/up",
                got=f"trained weights of {len(unknown)} modules that are no such norms of this model",
                do="Load an adapter that was trained on this model.",
            )
        return tuple(path for path in eligible if path in given)
    if recipe.trainable_norms is None:
        return ()
    sites = _matching_norms("trainable_norms", recipe.trainable_norms, eligible)
    if not lora:
        raise RecipeError(
            where="trainable_norms",
            expected="lora rules as well, since norms are saved in the adapter's files",
            got="a recipe without adapters",
            do="Add a lora rule, or delete trainable_norms.",
        )
    return sites


def _feeding_norms(facts: Mapping[str, LayerFacts]) -> list[str]:
    return [norm for layer in facts.values() for norm in layer.norms]


def _matching_norms(where: str, pattern: str, eligible: list[str]) -> tuple[str, ...]:
    matches: Callable[[str], object] = re.compile(pattern).fullmatch
    sites = tuple(norm for norm in eligible if matches(norm))
    if not sites:
        _refuse_unused(where, pattern, eligible, shadowed=False)
    return sites
