"""From Dynamo's graph to a running function: unlift, passes, bind, inner compiler.

`GraphCompiler` is the torch.compile backend that `transform` gives to every region. `qerl` is the same mechanism as a
named backend for models that we do not own, found by torch through an entry point:

    torch.compile(model, backend="qerl")                                                  built-in quantize rules
    torch.compile(model, backend="qerl", options={"recipe": {...}, "inner": "aot_eager"})

The named backend sees a graph and no module. It can quantize in the graph, with gradients to the ordinary weights,
but it saves no memory and owns no state: rules that need state (lora, noise, sparsity, searched scales) are errors that
name `transform`.

Inner compilers: `inductor` (default), `aot_eager` (AOTAutograd without code generation), `eager` (the FX graph as it
is).

Caches. What Inductor and AOTAutograd make of a graph is kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), and a second
process finds all of it: every node that our passes insert is of a kind that torch calls cacheable. Their key is the
text of the graph, so what else decides goes into it by `lower`, or a process would be handed another's graph with no
word said:
- what stands in a node's metadata. Activation checkpointing is metadata (passes/recompute.py).
- the gradients of our operators, which AOTAutograd writes into the graphs that it keeps. The key has the sources of
  kernels/, where they are defined: a formula that was mended reaches those whose cache is warm.

What this module does not do: decide what is rewritten (plan.py), or where graphs begin and end (region_calls.py).
"""

import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext
from torch.compiler import config as compiler_config

from qerl_compile import kernels
from qerl_compile.errors import RecipeError
from qerl_compile.graph import Program, bind, gather, linear_parts, unlift
from qerl_compile.graphdiff import graph_text
from qerl_compile.passes import FakeQuantize, Fuse, Pass
from qerl_compile.plan import check_columns
from qerl_compile.recipe import Recipe
from qerl_compile.regions import layer_facts

INNER = ("inductor", "aot_eager", "eager")


@dataclass(repr=False)  # torch prints a failing backend's repr, which would be the whole plan
class GraphCompiler:
    """A torch.compile backend that rewrites a graph by passes and hands it to an inner compiler.

    Attributes:
        passes: run in this order.
        names: gives `{id(tensor): checkpoint key}` when a graph arrives; a callable, since tensors may be replaced.
        inner: one of `INNER`.
        record: if set, receives (pass name, graph text) after capture and after each pass.
        graphs: how many graphs this compiler has compiled.
    """

    passes: Sequence[Pass]
    names: Callable[[], dict[int, str]]
    inner: str = "inductor"
    record: Callable[[str, str], None] | None = None
    graphs: int = field(default=0, init=False)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Compile one graph; see torch.compile's backend protocol."""
        self.graphs += 1
        program = unlift(gm, example_inputs, self.names())
        self._tell("capture", program)
        for one in self.passes:
            one(program)
            program.graph.lint()
            self._tell(type(one).__name__.lower(), program)
        return lower(gm, program, example_inputs, self.inner)

    def _tell(self, stage: str, program: Program) -> None:
        if self.record is not None:
            self.record(stage, graph_text(program))


def lower(gm: fx.GraphModule, program: Program, example_inputs: Sequence[Any], inner: str) -> Callable[..., Any]:
    """Bind a rewritten program and compile it; the result takes Dynamo's own inputs."""
    feeds = bind(program)
    module = fx.GraphModule(gm, program.graph)  # gm is the root of Dynamo's constants; its meta must not come along
    if inner == "eager":
        compiled = module.forward
    else:
        known = {id(value) for value in example_inputs}
        fake_mode = TracingContext.get().fake_mode
        # Tensors that Dynamo has not seen would get symbolic sizes without a source; they enter as static fakes.
        inputs: list[Any] = [
            fake_mode.from_tensor(value, static_shapes=True)
            if fake_mode is not None and isinstance(value, Tensor) and id(value) not in known
            else value
            for value in gather(feeds, example_inputs)
        ]
        with _in_cache_keys(program.graph):
            compiled = torch._dynamo.lookup_backend(inner)(module, inputs)
    if all(leaf is None for _, leaf in feeds) and [index for index, _ in feeds] == list(range(len(example_inputs))):
        return compiled
    return lambda *args: compiled(*gather(feeds, args))


def _in_cache_keys(graph: fx.Graph) -> AbstractContextManager[Any]:
    """Let torch's keys of cached graphs tell apart what the text of a graph does not; see the essay."""
    kept = [node for node in graph.nodes if "recompute" in node.meta]
    said = "\n".join(f"{node.name} {node.meta['recompute'].name} {node.meta.get('ac_graph_id')}" for node in kept)
    again = f" recompute {hashlib.sha256(said.encode()).hexdigest()}" if kept else ""
    tag = f"{compiler_config.cache_key_tag}qerl {_operators()}{again}"
    return compiler_config.patch(cache_key_tag=tag)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _operators() -> str:
    """Return a digest of the sources that define our operators and their gradients."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


_MODULE_STEP = re.compile(r"\['([^']+)'\]")


def _source_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """Return `{id(tensor): module path}` read from Dynamo's sources: the bare backend has no model to ask.

    A source reads `L['self']._modules['model']._modules['norm']._parameters['weight']`.
    """
    names: dict[int, str] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        grapharg = node.meta.get("grapharg")
        if grapharg is None or grapharg.source is None:
            continue
        source = grapharg.source.name
        text = str(source() if callable(source) else source)
        if "_parameters[" in text and isinstance(value, Tensor):
            names[id(value)] = ".".join(_MODULE_STEP.findall(text.partition("._modules")[2] or text))
    return names


def qerl(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """Compile a graph of an ordinary model with NVFP4 weights quantized in the graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: one per placeholder.
        options: `recipe` (a Recipe, mapping, name or path; only its quantize rules) and `inner`.

    Raises:
        RecipeError: unknown options, an unknown inner compiler, or a recipe with lora or noise rules.
        FormatError: a selected linear's K is no multiple of 16. torch wraps both in its BackendCompilerFailed.
    """
    given = dict(options or {})
    recipe = _quantize_rules(given.pop("recipe", None))
    inner = check_inner(given.pop("inner", "inductor"))
    if given:
        raise RecipeError(
            where='torch.compile(backend="qerl", options=...)',
            expected="the keys recipe and inner",
            got=", ".join(map(repr, given)),
            do="Remove the unknown keys.",
        )

    def selects(path: str) -> bool:
        rule = next((rule for rule in recipe.quantize if re.fullmatch(rule.match, path)), None)
        return rule is not None and rule.format != "none"

    program = unlift(gm, example_inputs, _source_names(gm, example_inputs))
    linears = [(path, linear_parts(node).weight) for node, path in program.linears()]
    for path, weight in linears:
        if selects(path):
            check_columns(path, weight.meta["example_value"])
    if linears and not any(selects(path) for path, _ in linears):
        warnings.warn(
            f"backend qerl: the recipe selects none of the {len(linears)} linears of this graph, such as "
            f"{linears[0][0]!r}; it stays as it is.",
            stacklevel=2,
        )
    selected = [tuple(path for path in group if selects(path)) for group in layer_facts(program).groups]
    for one in (Fuse(tuple(group for group in selected if len(group) > 1)), FakeQuantize(selects)):
        one(program)
    return lower(gm, program, example_inputs, inner)


def check_inner(inner: str) -> str:
    """Return `inner`, or raise a RecipeError that lists the inner compilers."""
    if inner not in INNER:
        raise RecipeError(
            where="inner",
            expected=f"one of {', '.join(INNER)}",
            got=repr(inner),
            do="Name an inner compiler of this list.",
        )
    return inner


def _quantize_rules(given: Any) -> Recipe:
    if given is None:
        return Recipe.named("qerl-nvfp4-aqn").model_copy(update={"lora": (), "noise": None})
    recipe = Recipe.resolve(given)
    owners = {
        "lora": recipe.lora,
        "noise": recipe.noise,
        "trainable_norms": recipe.trainable_norms,
        "sparsify": recipe.sparsify,
        "calibration": recipe.calibration,
        "scales or rounding": [rule for rule in recipe.quantize if (rule.scales, rule.rounding) != ("amax", "nearest")],
    }
    stateful = [key for key, rules in owners.items() if rules]
    if stateful:
        raise RecipeError(
            where=f"recipe {recipe.name!r}: {stateful[0]}",
            expected="plain quantize rules only, since the bare backend sees a graph and owns no state",
            got=f"{' and '.join(stateful)} rules",
            do="Use qerl_compile.transform(model, recipe), which owns adapters, noise and what is chosen from weights.",
        )
    return recipe
