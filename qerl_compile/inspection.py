"""What each pass does to a decoder layer, found on the meta device: no weight is read and nothing is computed.

The model is built without storage, the plan's state is attached as shapes, and the layer is run once through the real
`GraphCompiler` with recording on. What is shown is therefore what is compiled, not a picture of it.
"""

from typing import Any

from qerl_compile.attach import attach_shapes
from qerl_compile.errors import GraphError
from qerl_compile.model import TransformState, become_qerl
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.regions import run_on_meta


def layer_stages(model: Any, recipe: Recipe, layer: int = 0, *, recompute: bool = False) -> list[tuple[str, str]]:
    """Return (stage, graph text) of one decoder layer: "capture", then each pass in order.

    Args:
        model: a causal LM with its parameters on the meta device; it is transformed.
        recipe: what is done to it.
        layer: index of the decoder layer.
        recompute: whether the recompute pass runs too.

    Raises:
        GraphError: there is no such layer.
        RecipeError, FormatError: as `transform`.
    """
    plan = make_plan(model, recipe, calibrating=True)  # sample text would choose numbers, and there are none here
    if layer >= len(plan.layers):
        raise GraphError(
            where=f"layer {layer}",
            expected=f"an index below {len(plan.layers)}",
            got=str(layer),
            do="Name a layer that the model has.",
        )
    model.to("meta")
    attached = attach_shapes(model, plan)
    become_qerl(model, TransformState(recipe, attached, inner="eager", recompute=recompute))
    stages: list[tuple[str, str]] = []
    kinds = [plan.kind(path) for path in plan.regions()]
    compiler = model.qerl.compilers[list(dict.fromkeys(kinds)).index(plan.kind(plan.layers[layer]))]
    compiler.record = lambda stage, text: stages.append((stage, text))
    run_on_meta(model)
    return stages
