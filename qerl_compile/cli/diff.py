"""`qerl-compile diff MODEL`: what each pass does to the graph of a decoder layer, as a coloured diff.

The model is built without storage and transformed, and the layer is captured as training captures it: so no weight is
read, and any model whose config is known can be looked at. A diff is between the texts before and after one pass
(graphdiff.py), as in tests/golden.

What it does not do: passes of rollouts only (adapt, residual, rotary), and what the inner compiler makes of the graph.
"""

from itertools import pairwise
from typing import Annotated

import typer

from qerl_compile.cli.options import Model, RecipeName, Sets

Layer = Annotated[int, typer.Option(min=0, help="Which decoder layer.")]
Context = Annotated[int, typer.Option(min=0, help="Unchanged lines around each change.")]
Pass = Annotated[
    str | None, typer.Option("--pass", help="Only this pass: trainednorms, noise, lora, fuse, quantize or recompute.")
]

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def diff(
    model: Model,
    recipe: RecipeName = "qerl-nvfp4-aqn",
    set_: Sets = [],  # noqa: B006  # typer wants a list literal
    layer: Layer = 0,
    context: Context = 0,
    pass_: Pass = None,
) -> None:
    """Show the graph of one decoder layer before and after each pass. No weight is read."""
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote_nothing

    quiet_libraries()
    from qerl_compile.cli.hints import train_command, transform_command
    from qerl_compile.errors import GraphError
    from qerl_compile.graphdiff import diff as difference
    from qerl_compile.inspection import layer_stages
    from qerl_compile.loading import empty_model
    from qerl_compile.recipe import Recipe

    rules = Recipe.resolve(recipe).with_overrides(set_)
    stages = layer_stages(empty_model(model), rules, layer, recompute=rules.train.recompute)
    passes = [name for name, _ in stages[1:]]
    if pass_ not in (None, *passes):
        do = "Add --set train.recompute=true." if pass_ == "recompute" else "Name one of these."  # noqa: S105
        raise GraphError(where="--pass", expected=f"one of {', '.join(passes)}", got=repr(pass_), do=do)
    for (_, before), (name, after) in pairwise(stages):
        if pass_ not in (None, name):
            continue
        lines = difference(before, after, context=context)
        added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
        stdout().print(f"[bold]{name}[/]  [green]+{added}[/] [red]-{removed}[/]")
        for line in lines:
            stdout().print(line, style=COLOURS.get(line[:1], "dim"), markup=False, highlight=False)
    then = (transform_command if rules.quantize else train_command)(model, recipe, set_)
    wrote_nothing(f"{model}, layer {layer}, recipe {rules.name}", then=then)
