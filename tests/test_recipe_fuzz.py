"""Anything given as a recipe: a Recipe that survives a round trip, or a RecipeError. `QERL_FUZZ=200` for 10,000."""

import copy
import random
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qerl_compile.errors import RecipeError
from qerl_compile.recipe import Recipe
from tests.attacks.mutate import mutated_bytes, mutated_value

KEYS = st.sampled_from(
    ["version", "name", "quantize", "lora", "noise", "train", "match", "rank", "steps", "betas", "x"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers(), inner, max_size=4),
    max_leaves=10,
)
OVERRIDE = st.tuples(st.from_regex(r"[a-z_.\[\]0-9]{0,20}", fullmatch=True) | KEYS, st.text(max_size=12)).map("=".join)


def read(raw: bytes) -> Recipe | RecipeError:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(raw)
        try:
            return Recipe.from_file(file)
        except RecipeError as refusal:
            assert refusal.where and refusal.expected and refusal.got and refusal.do
            assert len(str(refusal)) < 1500
            return refusal


@given(rng=st.randoms(use_true_random=False))
def test_bent_mappings_are_refused_or_survive_a_round_trip(rng: random.Random) -> None:
    data = mutated_value(rng, Recipe.named("qerl-nvfp4-aqn").model_dump(mode="json"))
    kept = copy.deepcopy(data)
    try:
        recipe = Recipe.resolve(data)
    except RecipeError:
        return
    finally:
        assert repr(data) == repr(kept), "the caller's mapping is left alone"
    assert read(recipe.to_yaml().encode()) == recipe


@given(rng=st.randoms(use_true_random=False))
def test_bent_files_are_refused_or_read(rng: random.Random) -> None:
    outcome = read(mutated_bytes(rng, Recipe.named("qerl-nvfp4-aqn").to_yaml().encode()))
    if isinstance(outcome, Recipe):
        assert read(outcome.to_yaml().encode()) == outcome


@given(raw=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_arbitrary_files_are_refused(raw: bytes) -> None:
    assert isinstance(read(raw), RecipeError)


@given(data=ANYTHING)
def test_arbitrary_values_are_refused_or_read(data: object) -> None:
    try:
        Recipe.resolve(data)  # type: ignore[arg-type]  # wrong types are the test
    except RecipeError as refusal:
        assert len(str(refusal)) < 1500


@given(override=OVERRIDE | st.text(max_size=30))
def test_arbitrary_overrides_are_refused_or_taken(override: str) -> None:
    try:
        Recipe.named("nvfp4-lora").with_overrides([override])
    except RecipeError as refusal:
        assert len(str(refusal)) < 1500
