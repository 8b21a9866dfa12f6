"""One decoder layer of each family through every pass, as text; computed once per process, on the meta device."""

import functools

import torch

from qerl_compile.graphdiff import diff
from qerl_compile.inspection import layer_stages
from qerl_compile.recipe import Recipe
from tests.models import tiny_model


@functools.cache
def stages(family: str) -> dict[str, str]:
    """`{stage: graph text}` of layer 0 in bf16 under the recipe of the paper, from "capture" to "quantize"."""
    with torch.device("meta"):
        model = tiny_model(family, layers=1, dtype=torch.bfloat16)
    return dict(layer_stages(model, Recipe.named("qerl-nvfp4-aqn")))


def pass_diff(family: str, name: str) -> str:
    """The unified diff of what one pass did to the layer, without context and line numbers."""
    texts = stages(family)
    before = list(texts)[list(texts).index(name) - 1]
    lines = diff(texts[before], texts[name])
    return "".join(f"{'@@' if line.startswith('@@') else line}\n" for line in lines)
