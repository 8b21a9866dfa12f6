"""The plan: which module gets what, decided from the recipe and the captured graph before any weight is read.

    recipe rules × module tree  →  sites to quantize, groups to fuse, weights to train or to thin out, adapters, norms

Rules select by full module path (rule_matching.py). What may be selected is a graph fact: linears that a decoder layer
calls, norms that feed them.

A *group* is the quantized linears of one layer that read the same input (q/k/v, gate/up) and are quantized alike. Its
members are quantized with one shared amax, since serving engines fuse them and keep one global scale, and the fuse pass
makes them one GEMM. Linears whose full weights are trained (`weights: trained`) form *trained groups* for the same
reason: an export packs them so. Linears that share an input and are neither are a *dense group*: one GEMM too, but in
rollouts only, where it is worth relaying their weights.

A linear is packed or trained or neither, never both. Full weights and adapters are not trained together: what a run
saves is either an adapter or a model. What a checkpoint holds packed already stays as it is: its full weights are gone,
so nothing can train them or take weights out of them, and what its rules say of scales and rounding is past.

Some rules need sample text (GPTQ, Wanda, AWQ, input and cache scales). They are refused here unless the caller says
that he has it (calibrating/), so that `transform` and `load` never quietly round to nearest instead.

Noise that a recipe switches off (`noise.enabled: false`) has no sites: the graphs then hold no trace of it, and a run
with it off is the run of a recipe that never had it. Its rule is still matched, so that it can be switched on.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor, nn

from qerl_compile.errors import CheckpointError, FormatError, RecipeError
from qerl_compile.expert_stacks import Place, Stack, expert_stacks, places_of
from qerl_compile.formats.nvfp4 import BLOCK
from qerl_compile.graph import leaf_tensor
from qerl_compile.grouped_nodes import stacked_parameters
from qerl_compile.passes import LoraSite, QuantizeSite
from qerl_compile.passes.sparsify import check_fours
from qerl_compile.recipe import Recipe
from qerl_compile.recipe_fields import QuantizeRule
from qerl_compile.regions import LayerFacts, capture
from qerl_compile.rule_matching import first_matches, matching


@dataclass(frozen=True)
class Plan:
    """What transform attaches and rewrites; module paths are full paths.

    Attributes:
        layers: the decoder layers, in order; each is compiled as a region.
        quantize: module path → how it is packed, of every linear to pack.
        groups: tuples of `quantize` paths that share an input and a site, hence one global scale and one GEMM.
        lora: module path → adapter.
        noise: norms that get a noise buffer; 2 per layer on Qwen2 and Llama.
        trained_norms: norms whose weight is trained, by a float32 copy.
        dense_groups: tuples of frozen dense linears that share an input and can be laid into one tensor.
        trained_weights: linears whose full weight is trained, and rounded in the graph.
        trained_groups: tuples of `trained_weights` that share an input, hence one amax.
        sparse: module path → score ("magnitude" or "wanda") of every linear that keeps two weights of four.
        experts: tensor name → stack of experts to pack, and how.
    """

    layers: tuple[str, ...]
    quantize: Mapping[str, QuantizeSite] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    lora: Mapping[str, LoraSite] = field(default_factory=dict)
    noise: tuple[str, ...] = ()
    dense_groups: tuple[tuple[str, ...], ...] = ()
    trained_norms: tuple[str, ...] = ()
    trained_weights: tuple[str, ...] = ()
    trained_groups: tuple[tuple[str, ...], ...] = ()
    sparse: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, tuple[Stack, QuantizeSite]] = field(default_factory=dict)

    @property
    def packs(self) -> bool:
        """Whether anything is packed."""
        return bool(self.quantize or self.experts)

    def places(self) -> dict[str, Place]:
        """Return where the virtual linears of packed experts lie, by path."""
        return places_of({name: stack for name, (stack, _) in self.experts.items()})

    def owners(self) -> tuple[str, ...]:
        """Return the modules whose tensors graphs look up: those of packed or trained weights, adapters and norms."""
        paths = (*self.quantize, *self.trained_weights, *self.lora, *self.noise, *self.trained_norms)
        return tuple(dict.fromkeys(paths))

    def group_of(self, path: str) -> tuple[str, ...]:
        """Return the packed or trained group that `path` belongs to, or `(path,)`."""
        return next((group for group in (*self.groups, *self.trained_groups) if path in group), (path,))

    def adapted(self) -> tuple[tuple[str, ...], ...]:
        """Return the linears whose adapters are stacked: groups with an adapter on some member, and lone sites."""
        groups = [*self.groups, *self.dense_groups]
        grouped = {path for group in groups for path in group}
        lone = [(path,) for path in self.lora if path not in grouped]
        return tuple(group for group in [*groups, *lone] if any(path in self.lora for path in group))

    def regions(self) -> tuple[str, ...]:
        """Return the modules to compile: the layers, and every site that lies outside them (such as an untied head)."""
        outside = [path for path in self.owners() if not any(path.startswith(f"{layer}.") for layer in self.layers)]
        return (*self.layers, *outside)

    def kind(self, region: str) -> tuple[object, ...]:
        """Return what is done inside a region, by relative path: regions that differ here must not share a graph.

        How scales were searched and codes rounded does not show in a graph, nor which weights of a packed or frozen
        linear are zero.
        """

        def inside(paths: Iterable[str]) -> list[str]:
            return [path for path in paths if path == region or path.startswith(f"{region}.")]

        quantized = [(path.removeprefix(region), self.quantize[path].format) for path in inside(self.quantize)]
        quantized += [(name.removeprefix(region), self.experts[name][1].format) for name in inside(self.experts)]
        adapters = [(path.removeprefix(region), self.lora[path]) for path in inside(self.lora)]
        noisy = [path.removeprefix(region) for path in inside(self.noise)]
        trained = [path.removeprefix(region) for path in inside(self.trained_norms)]
        dense = [tuple(path.removeprefix(region) for path in group) for group in self.dense_groups if inside(group)]
        full = [(path.removeprefix(region), path in self.sparse) for path in inside(self.trained_weights)]
        return (tuple(quantized), tuple(adapters), tuple(noisy), tuple(trained), tuple(dense), tuple(full))


def make_plan(
    model: nn.Module,
    recipe: Recipe,
    *,
    packed: frozenset[str] = frozenset(),
    adapters: Mapping[str, LoraSite] | None = None,
    trained_norms: Sequence[str] | None = None,
    calibrating: bool = False,
) -> Plan:
    """Match the recipe against a model on any device, meta included.

    Args:
        model: with its weights still dense, or on meta.
        recipe: the rules.
        packed: linears that a checkpoint holds packed already; they are sites whatever the rules say.
        adapters: adapters that exist already, in place of those that the lora rules describe.
        trained_norms: norms that were trained already, in place of those that `trainable_norms` selects.
        calibrating: whether the caller has sample text, or reads no weight, so that rules which need it are followed.

    Raises:
        RecipeError: a rule selects nothing, or selects what cannot be rewritten, or norms are trained without adapters,
            or full weights with them, or a rule needs sample text, or inputs of trained weights would be measured.
        FormatError: a selected linear's K is no multiple of 16, or of 4 where it is only made sparse.
        GraphError: a decoder layer cannot be captured.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    facts = capture(model)
    called = {path for layer in facts.values() for path in layer.linears}
    called_stacks = {name for layer in facts.values() for name in layer.stacks}
    inside = tuple(f"{layer}." for layer in facts)
    usable = [path for path in linears if path in called or not path.startswith(inside)]

    stacks = {name: stack for name, stack in expert_stacks(model).items() if name in called_stacks}
    quantize, trained_weights, experts = _quantize_sites(model, recipe, usable, linears, packed, stacks)
    _tell_of_dense_experts(model, recipe, stacks, inside)
    sparse = _sparse_sites(model, recipe, usable, linears, packed)
    if not calibrating:
        _refuse_without_text(recipe, quantize, sparse, packed)
    _refuse_input_scales(recipe, trained_weights)
    lora = dict(adapters) if adapters is not None else _lora_sites(recipe, usable, linears)
    _check_adapted(lora, usable, trained_weights)
    return Plan(
        layers=tuple(facts),
        quantize=quantize,
        groups=_groups(facts, quantize),
        lora=lora,
        noise=_noise_sites(facts, recipe),
        dense_groups=_dense_groups(model, facts, {*quantize, *trained_weights}),
        trained_norms=_trained_norms(facts, recipe, lora, trained_norms),
        trained_weights=trained_weights,
        trained_groups=_groups(facts, dict.fromkeys(trained_weights)),
        sparse=sparse,
        experts=experts,
    )


def _quantize_sites(
    model: nn.Module,
    recipe: Recipe,
    usable: Sequence[str],
    linears: Mapping[str, nn.Linear],
    packed: frozenset[str],
    stacks: Mapping[str, Stack],
) -> tuple[dict[str, QuantizeSite], tuple[str, ...], dict[str, tuple[Stack, QuantizeSite]]]:
    """Return the sites to pack, the linears whose full weights are trained, and the stacks of experts to pack."""
    sites = {path: QuantizeSite() for path in usable if path in packed}
    trained: list[str] = []
    of_experts: dict[str, QuantizeRule] = {}
    places = places_of(stacks)
    owners = _weight_owners(model)
    for path, rule in first_matches("quantize", recipe.quantize, [*usable, *places], [*linears, *places]):
        if rule.format == "none":
            continue
        if path in packed and rule.weights == "trained":
            _refuse_packed("quantize: weights", path, "a full-precision weight to train", "Train it from")
        if path in places:
            of_experts[path] = rule
            continue
        _check_packable(path, linears[path], owners)
        if rule.weights == "trained":
            trained.append(path)
        elif path not in packed:
            sites[path] = QuantizeSite(rule.format, rule.scales, rule.rounding)
    of_stacks = {name: _expert_site(stack, of_experts, packed) for name, stack in stacks.items()}
    return sites, tuple(trained), {name: (stacks[name], site) for name, site in of_stacks.items() if site is not None}


def _tell_of_dense_experts(
    model: nn.Module, recipe: Recipe, stacks: Mapping[str, Stack], inside: tuple[str, ...]
) -> None:
    """Warn of experts that no rule can select, since they hold most of a mixture's weights."""
    unknown = [name for name, _ in stacked_parameters(model) if name.startswith(inside) and name not in stacks]
    if unknown and any(rule.format != "none" for rule in recipe.quantize):
        warnings.warn(
            f"{len(unknown)} stacks of experts stay dense, such as {unknown[0]}: only stacks [E, N, K] are packed that "
            "torch's grouped product multiplies with and whose single experts transformers names.",
            stacklevel=3,
        )


def _expert_site(stack: Stack, rules: Mapping[str, QuantizeRule], packed: frozenset[str]) -> QuantizeSite | None:
    """Return how a stack of experts is packed, or None if it stays dense; all its experts are treated alike."""
    there = [path for path in stack.places if path in packed]
    if there:
        if len(there) < len(stack.places):
            raise CheckpointError(
                where=stack.name,
                expected="the experts of a layer all packed or all dense, since one operator computes them",
                got=f"{len(there)} of {len(stack.places)} packed, such as {there[0]}",
                do="Quantize the model again with one rule for all experts.",
            )
        return QuantizeSite()
    sites = {path: rules.get(path) for path in stack.places}
    kinds = {rule and (rule.format, rule.scales, rule.rounding, rule.weights) for rule in sites.values()}
    if len(kinds) > 1:
        apart = next(path for path, rule in sites.items() if rule is None or rule is not next(iter(sites.values())))
        raise RecipeError(
            where=f"quantize: {apart}",
            expected=f"one treatment of all linears in {stack.name}, since one operator computes them",
            got="rules that treat its experts differently",
            do=f"Match them together, such as {re.escape(stack.module)}.*.",
        )
    rule = next(iter(sites.values()))
    if rule is None or rule.format == "none":
        return None
    if rule.weights == "trained" or rule.rounding == "gptq":
        raise RecipeError(
            where=f"quantize: {stack.name}",
            expected="experts that are frozen and rounded to nearest",
            got="weights trained" if rule.weights == "trained" else "rounding gptq",
            do="Give experts a rule of their own without it, before this one.",
        )
    _refuse_columns(next(iter(stack.places)), stack.part_rows, stack.columns)
    return QuantizeSite(rule.format, rule.scales, rule.rounding)


def _sparse_sites(
    model: nn.Module, recipe: Recipe, usable: Sequence[str], linears: Mapping[str, nn.Linear], packed: frozenset[str]
) -> dict[str, str]:
    sites: dict[str, str] = {}
    owners = _weight_owners(model)
    for path, rule in first_matches("sparsify", recipe.sparsify, usable, linears):
        if rule.score == "none":
            continue
        if path in packed:
            _refuse_packed(
                "sparsify",
                path,
                "a full-precision weight to take weights out of",
                "Drop the rule with --set sparsify=[] if the checkpoint was made with it, else start from",
            )
        _check_own_weight(path, linears[path], owners, "sparsify rules")
        check_fours(path, linears[path].weight)
        sites[path] = rule.score
    return sites


def _refuse_packed(where: str, path: str, expected: str, do: str) -> None:
    raise RecipeError(
        where=f"{where}: {path}",
        expected=expected,
        got="a checkpoint that holds it packed in 4 bits",
        do=f"{do} the bf16 checkpoint of this model.",
    )


def _refuse_without_text(
    recipe: Recipe, quantize: Mapping[str, QuantizeSite], sparse: Mapping[str, str], packed: frozenset[str]
) -> None:
    """Refuse what only calibration can do; a linear that came packed was calibrated then, or never will be."""
    wants: list[str] = []
    if any(site.rounding == "gptq" for site in quantize.values()):
        wants.append("rounding gptq")
    if "wanda" in sparse.values():
        wants.append("score wanda")
    measured = recipe.calibration
    if measured is not None and (not packed or any(path not in packed for path in quantize)):
        wants += ["channel_scaling awq"] * (measured.channel_scaling == "awq")
        wants += ["activations true"] * measured.activations
        wants += ["kv_cache fp8"] * (measured.kv_cache == "fp8")
    if wants:
        raise RecipeError(
            where=f"recipe {recipe.name!r}",
            expected="sample text, which the recipe needs",
            got=f"{', '.join(wants)}, and no text",
            do="Run `qerl-compile transform MODEL --recipe R --calibrate-on FILE -o DIR` or call "
            "qerl_compile.calibrate(model, recipe, texts).",
        )


def _refuse_input_scales(recipe: Recipe, trained_weights: Sequence[str]) -> None:
    """Refuse to measure inputs of weights that are trained afterwards: an export would have scales of another model."""
    if trained_weights and recipe.calibration is not None and recipe.calibration.activations:
        raise RecipeError(
            where="calibration.activations",
            expected="packed weights, whose inputs stay what was measured",
            got=f"{len(trained_weights)} linears with `weights: trained`, such as {trained_weights[0]}",
            do="Set calibration.activations to false, or pack these weights.",
        )


def _lora_sites(recipe: Recipe, usable: Sequence[str], linears: Mapping[str, nn.Module]) -> dict[str, LoraSite]:
    matches = first_matches("lora", recipe.lora, usable, linears)
    return {path: LoraSite(rank=rule.rank, alpha=rule.alpha) for path, rule in matches if rule.rank}


def _check_adapted(lora: Mapping[str, LoraSite], usable: Sequence[str], trained_weights: Sequence[str]) -> None:
    unknown = [path for path in lora if path not in usable]
    if unknown:
        raise RecipeError(
            where=unknown[0],
            expected="an adapter on a linear that the model calls",
            got=f"an adapter on {len(unknown)} modules that it does not have as linears",
            do="Load an adapter that was trained on this model.",
        )
    if lora and trained_weights:
        both = [path for path in trained_weights if path in lora]
        raise RecipeError(
            where=(both or list(trained_weights))[0],
            expected="adapters or trained weights, since a run saves an adapter or a model",
            got=f"{len(trained_weights)} linears with `weights: trained` and {len(lora)} with an adapter",
            do="Delete the lora rules, or `weights: trained`.",
        )


def check_columns(path: str, weight: Tensor) -> None:
    """Refuse a weight [N, K] whose K is no multiple of the block size; its values are not looked at.

    Raises:
        FormatError: naming the module.
    """
    _refuse_columns(path, *weight.shape)


def _refuse_columns(path: str, features_out: int, features_in: int) -> None:
    if features_in % BLOCK:
        raise FormatError(
            where=path,
            expected=f"in_features to be a multiple of {BLOCK} (one block scale per {BLOCK} columns)",
            got=f"a weight of shape [{features_out}, {features_in}]",
            do=f"Exclude it with an earlier rule: {{match: {re.escape(path)!r}, format: none}}.",
        )


def _check_packable(path: str, linear: nn.Linear, owners: Mapping[int, Sequence[str]]) -> None:
    check_columns(path, linear.weight)
    _check_own_weight(path, linear, owners, "quantize rules")


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a `weight` → the modules that hold it. One walk for all sites: 448 walks took seconds for 64 layers."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        owners.setdefault(id(leaf_tensor(module, "weight")), []).append(name)
    return owners


def _check_own_weight(path: str, linear: nn.Linear, owners: Mapping[int, Sequence[str]], rules: str) -> None:
    sharers = owners.get(id(linear.weight), ())  # absent if a parametrization computes it
    if len(sharers) > 1:
        raise RecipeError(
            where=path,
            expected="a linear with a weight of its own",
            got=f"a weight tied to {', '.join(name for name in sharers if name != path)}",
            do=f"Exclude the tied head from the {rules}: its embedding must stay as it is.",
        )


def _groups(facts: Mapping[str, LayerFacts], sites: Mapping[str, QuantizeSite | None]) -> tuple[tuple[str, ...], ...]:
    """Return what shares an input and has equal sites."""
    groups: list[tuple[str, ...]] = []
    for layer in facts.values():
        for linears in layer.groups:
            for site in dict.fromkeys(sites[path] for path in linears if path in sites):
                members = tuple(path for path in linears if path in sites and sites[path] == site)
                if len(members) > 1:
                    groups.append(members)
    return tuple(groups)


def _dense_groups(model: nn.Module, facts: Mapping[str, LayerFacts], apart: Set[str]) -> tuple[tuple[str, ...], ...]:
    """Return what shares an input, is not `apart`, and can be rows of one tensor.

    That is weights of one dtype, tied to nothing. Biases must be on all or on none: that is what the fuse pass takes.
    """
    holders = Counter(id(module._parameters.get("weight")) for module in model.modules())
    groups: list[tuple[str, ...]] = []
    for linears in (linears for layer in facts.values() for linears in layer.groups):
        dense = {path: model.get_submodule(path) for path in linears if path not in apart}
        tensors = [(module._parameters["weight"], module._parameters.get("bias")) for module in dense.values()]
        alike = {(weight.dtype, bias is None or bias.dtype) for weight, bias in tensors if weight is not None}
        if len(dense) > 1 and len(alike) == 1 and all(holders[id(weight)] == 1 for weight, _ in tensors):
            groups.append(tuple(dense))
    return tuple(groups)


def _noise_sites(facts: Mapping[str, LayerFacts], recipe: Recipe) -> tuple[str, ...]:
    if recipe.noise is None:
        return ()
    sites = matching("noise.match", recipe.noise.match, _feeding_norms(facts))
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
    sites = matching("trainable_norms", recipe.trainable_norms, eligible)
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
