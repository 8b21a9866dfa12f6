"""The stages that `diff` shows are those that are compiled, and nothing is read for them."""

import pytest
import torch

from qerl_compile.errors import GraphError, RecipeError
from qerl_compile.inspection import layer_stages
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import transform
from tests.models import tiny_model
from tests.stages import stages


def empty(layers=1, **changes):
    with torch.device("meta"):
        return tiny_model("llama", layers=layers, **changes)


def test_stages_come_in_the_order_of_the_passes():
    assert list(stages("llama")) == ["capture", "noise", "lora", "fuse", "quantize", "recompute"]


def test_every_pass_of_the_papers_recipe_changes_the_layer():
    texts = list(stages("llama").values())
    assert len(set(texts)) == len(texts)


def test_without_rules_nothing_changes():
    texts = [text for _, text in layer_stages(empty(), Recipe())]
    assert len(texts) == 5
    assert len(set(texts)) == 1


def test_recompute_is_a_last_stage_that_tags_every_call_and_changes_nothing_else():
    got = layer_stages(empty(), Recipe.resolve({"lora": [{"match": ".*q_proj", "rank": 4}]}), recompute=True)
    assert got[-1][0] == "recompute"
    before, after = (got[at][1].splitlines() for at in (-2, -1))
    tag = "  # PREFER_RECOMPUTE, region 0"
    assert [line.removesuffix(tag) for line in after] == before
    untagged = [line for line in after if not line.endswith(tag)]
    assert all(line.endswith("= input") or "= weight" in line or line.startswith("return") for line in untagged)


def test_the_text_is_what_a_transformed_model_compiles():
    """Same stages from weights in memory, up to sizes, which the first call of a model may fix."""
    model = transform(tiny_model("llama", layers=1, dtype=torch.bfloat16), "qerl-nvfp4-aqn", inner="eager")
    (compiler,) = model.qerl.compilers
    seen = {}
    compiler.record = seen.__setitem__
    with torch.no_grad():
        model(
            input_ids=torch.zeros(2, 8, dtype=torch.long), attention_mask=torch.ones(2, 1, 8, 8).bool(), use_cache=False
        )
    assert _operations(seen["quantize"]) == _operations(stages("llama")["quantize"])


def _operations(text):
    return [line.partition(" = ")[2].partition("(")[0] for line in text.splitlines() if "(" in line]


def test_a_later_layer_with_other_rules_is_shown_with_its_own():
    recipe = Recipe.resolve({"quantize": [{"match": r"model\.layers\.1\..*up_proj"}]})
    text = dict(layer_stages(empty(layers=2), recipe, 1))["quantize"]
    assert text.count("qerl.quantized_linear(") == 1
    assert "model.layers.1.mlp.up_proj.weight_packed" in text
    assert "model.layers.0" not in text


@pytest.mark.parametrize("layer", [1, 99])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(GraphError, match=f"layer {layer}: expected an index below 1"):
        layer_stages(empty(), Recipe(), layer)


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"quantize\[0\]"):
        layer_stages(empty(), Recipe.resolve({"quantize": [{"match": "nothing"}]}))
