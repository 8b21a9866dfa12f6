"""What each pass does to a decoder layer, found on the meta device: no weight is read and nothing is computed.

The model is built without storage, the plan's state is attached as shapes, and the layer is run once through the real
`GraphCompiler` with recording on. What is shown is therefore what is compiled, not a picture of it.
"""

from typing import Any

import torch

from qerl_compile.attach import Attacher
from qerl_compile.errors import GraphError
from qerl_compile.formats.nvfp4 import BLOCK, PackedNVFP4
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
    attacher = Attacher(model, plan)
    for path in plan.quantize:
        weight = model.get_submodule(path).weight
        attacher.packed(path, _shapes_of_packed(*weight.shape), weight.dtype)
    for stack, _ in plan.experts.values():
        dtype = model.get_parameter(stack.name).dtype
        for path in stack.places:
            attacher.packed(path, _shapes_of_packed(stack.part_rows, stack.columns), dtype)
    model.to("meta")
    become_qerl(model, TransformState(recipe, attacher.finish(), inner="eager", recompute=recompute))
    stages: list[tuple[str, str]] = []
    kinds = [plan.kind(path) for path in plan.regions()]
    compiler = model.qerl.compilers[list(dict.fromkeys(kinds)).index(plan.kind(plan.layers[layer]))]
    compiler.record = lambda stage, text: stages.append((stage, text))
    run_on_meta(model)
    return stages


def _shapes_of_packed(rows: int, columns: int) -> PackedNVFP4:
    with torch.device("meta"):
        return PackedNVFP4(
            torch.empty(rows, columns // 2, dtype=torch.uint8),
            torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn),
            torch.empty(1),
            direction="divisor",
        )
