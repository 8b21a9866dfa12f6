"""Recipes: built-in, from files, from mappings, overridden; and what every fault is told as."""

import json
import re
from pathlib import Path

import pytest

from qerl_compile.errors import RecipeError
from qerl_compile.recipe import LoraRule, NoiseConfig, QuantizeRule, Recipe, TrainConfig, builtin_names

PROJECTIONS = [f"model.layers.11.{block}" for block in ("self_attn.q_proj", "mlp.gate_proj", "mlp.experts.3.up_proj")]
NOT_PROJECTIONS = ["lm_head", "model.layers.0.mlp.router", "model.embed_tokens", "visual.merger.out_proj"]


def refusal(text: str, tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(tmp_path / "recipe.yaml")
    return str(caught.value)


def override_refusal(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.named("qerl-nvfp4-aqn").with_overrides(overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "quantized", "noisy", "learning_rate"),
    [
        ("qerl-nvfp4-aqn", True, True, 1e-5),
        ("nvfp4-lora", True, False, 1e-5),
        ("bf16-lora", False, False, 5e-6),
        ("bf16-lora-aqn", False, True, 5e-6),
    ],
)
def test_built_in_recipes_are_the_ablations_of_the_paper(
    name: str, quantized: bool, noisy: bool, learning_rate: float
) -> None:
    recipe = Recipe.named(name)
    assert recipe.name == name
    assert bool(recipe.quantize) == quantized
    assert (recipe.noise is not None) == noisy
    assert recipe.train.learning_rate == learning_rate
    assert (recipe.lora[0].rank, recipe.lora[0].alpha) == (32, 32.0)


def test_there_are_four_built_in_recipes() -> None:
    assert builtin_names() == ["bf16-lora", "bf16-lora-aqn", "nvfp4-lora", "qerl-nvfp4-aqn"]


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_patterns_take_the_linears_of_decoder_layers_only(name: str) -> None:
    recipe = Recipe.named(name)
    for rule in [*recipe.quantize, *recipe.lora]:
        assert all(re.fullmatch(rule.match, path) for path in PROJECTIONS)
        assert not any(re.fullmatch(rule.match, path) for path in NOT_PROJECTIONS)


def test_noise_defaults_are_those_of_the_paper() -> None:
    noise = Recipe.named("qerl-nvfp4-aqn").noise
    assert noise is not None
    assert (noise.sigma_start, noise.sigma_end, noise.stages, noise.in_update) == (1e-2, 5e-4, 10, False)


def test_training_defaults_are_those_of_table_4() -> None:
    train = TrainConfig()
    assert train.prompts_per_step * train.group_size == 128
    assert (train.clip_low, train.clip_high, train.temperature) == (0.2, 0.28, 1.0)


@pytest.mark.parametrize("name", builtin_names())
def test_yaml_of_a_recipe_reads_back_to_an_equal_recipe(name: str, tmp_path: Path) -> None:
    recipe = Recipe.named(name)
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml())
    copy = Recipe.from_file(tmp_path / "copy.yaml")
    assert copy == recipe
    assert copy.sha256 == recipe.sha256


def test_sha256_tells_recipes_apart_and_ignores_how_they_were_written() -> None:
    assert len({Recipe.named(name).sha256 for name in builtin_names()}) == 4
    short = Recipe.from_dict({"noise": {}})
    long = Recipe.from_dict({"noise": {"stages": 10, "sigma_end": 5e-4, "match": ".*"}, "version": 1})
    assert short.sha256 == long.sha256
    assert short.sha256 != short.with_overrides(["noise.stages=9"]).sha256


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.named("bf16-lora").name = "other"  # type: ignore[misc]  # the assignment is the test


def test_a_file_without_a_name_is_called_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1\n")
    assert Recipe.from_file(tmp_path / "mine.yaml").name == "mine"


def test_json_schema_describes_every_field() -> None:
    schema = Recipe.json_schema()
    json.dumps(schema)
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        for field in part["properties"].values():
            assert field["description"]


def test_resolve_takes_whatever_a_caller_has(tmp_path: Path) -> None:
    recipe = Recipe.named("nvfp4-lora")
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    for given in (recipe, "nvfp4-lora", tmp_path / "r.yml", str(tmp_path / "r.yml"), recipe.model_dump()):
        assert Recipe.resolve(given) == recipe


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("qerl-nvfp4-aqm", "Did you mean `qerl-nvfp4-aqn`?"),
        ("", "the name of a built-in recipe"),
        ("x" * 5000, "the name of a built-in recipe"),
        ("absent.yaml", "absent.yaml: expected a readable recipe file; got No such file"),
        ("/", "a readable recipe file; got Is a directory"),
        ("a\0b.yaml", "a\\x00b.yaml: expected a readable recipe file; got embedded null byte"),
        (3, "got 3 of type int"),
        (None, "got None of type NoneType"),
        ([], "got [] of type list"),
    ],
)
def test_resolve_refuses_the_rest(given: object, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.resolve(given)  # type: ignore[arg-type]  # wrong types are the test
    assert words in str(caught.value)


RULE = "match: .*"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantize: [{mach: a}]", "recipe.yaml: quantize[0].mach: expected one of the keys match, format, scales, rounding, weights;"),
        ("quantize: [{mach: a}]", "the unknown key 'mach' with the value 'a' (1 more after this one). Did you mean"),
        ("quantise: []", "recipe.yaml: quantise: expected one of the keys version, name, quantize, sparsify, calibration, lora, noise, train"),
        ("quantise: []", "Did you mean `quantize`?"),
        ("noise: {sigma_strat: 1}", "Did you mean `sigma_start`?"),
        ("train: {lr: 1}", "recipe.yaml: train.lr: expected one of the keys steps, loss"),
        ("env: {LD_PRELOAD: x}", "unknown key 'env'"),
        ("quantize: [{format: nvfp4}]", "recipe.yaml: quantize[0].match: expected the key `match`"),
        (f"quantize: [{{{RULE}, format: nvpf4}}]", "one of 'nvfp4' or 'none'; got 'nvpf4'. Did you mean `nvfp4`?"),
        (f"quantize: [{{{RULE}, format: fp8}}]", "got 'fp8'. Write `nvfp4`."),
        ("quantize: {match: a}", "recipe.yaml: quantize: expected a list; got {'match': 'a'}"),
        ("quantize: [a]", "recipe.yaml: quantize[0]: expected a mapping of keys; got 'a'"),
        ("quantize: [{match: 3}]", "recipe.yaml: quantize[0].match: expected a text; got 3"),
        ("quantize: [{match: '('}]", "a valid regular expression; got '(': missing ), unterminated subpattern"),
        ("lora: [{match: (a+)+}]", "lora[0].match: expected no repetition around a choice"),
        (f"lora: [{{{RULE}, rank: -1}}]", "lora[0].rank: expected a number >= 0; got -1"),
        (f"lora: [{{{RULE}, rank: '32'}}]", "expected an integer; got '32'. Write it without quotation marks."),
        (f"lora: [{{{RULE}, rank: 32.0}}]", "expected an integer; got 32.0"),
        (f"lora: [{{{RULE}, rank: true}}]", "expected an integer; got True"),
        (f"lora: [{{{RULE}, rank: many}}]", "got 'many'. Write a number in its place."),
        (f"lora: [{{{RULE}, alpha: 0}}]", "lora[0].alpha: expected a number > 0.0; got 0"),
        ("noise: {sigma_end: 1}", "noise.sigma_end: expected sigma_end <= sigma_start, which is 0.01; got 1.0"),
        ("noise: {sigma_end: 0}", "an exponential schedule never reaches zero"),
        ("noise: {sigma_start: .nan}", "noise.sigma_start: expected a finite number; got nan"),
        ("noise: {sigma_start: 1e999}", "noise.sigma_start: expected a finite number; got inf"),
        ("noise: {stages: 1}", "noise.stages: expected a number >= 2; got 1"),
        ("noise: {schedule: square}", "noise.schedule: expected one of 'exponential', 'linear', 'cosine' or"),
        ("noise: {sigma_end: 0}", "sigma_end > 0, because an exponential schedule never reaches zero"),
        ("train: {clip_delta: 1.2}", "clip_delta > 1 + clip_high, which is 1.28"),
        ("noise: {in_update: 1}", "noise.in_update: expected true or false; got 1"),
        ("noise: yes please", "noise: expected a mapping of keys; got 'yes please'"),
        ("train: {betas: [0.9]}", "train.betas: expected a list of at least 2 items; got [0.9]"),
        ("train: {betas: [0.9, 0.9, 0.9]}", "train.betas: expected 2 items at most"),
        ("train: {betas: [0.9, 1.0]}", "train.betas[1]: expected a number < 1.0; got 1.0"),
        ("train: {group_size: 1}", "train.group_size: expected a number >= 2; got 1"),
        ("train: {recompute: 1}", "train.recompute: expected true or false; got 1"),
        ("train: null", "train: expected a mapping of keys; got None"),
        ("name: ''", "name: expected a text of 1 characters or more; got ''"),
        ("name: no\nversion: 1", "each key once in a mapping; got 'version' again (first on line 1)"),
        ("3: 4", "expected a word as key; got 3"),
    ],
)
def test_every_fault_is_told_with_its_key_its_value_and_what_to_do(text: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(f"version: 1\n{text}\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x", "recipe.yaml: version: expected `version: 1`; got no version. Add `version: 1` as the first line."),
        ("version: 2", "got 2, which a newer qerl-compile wrote. Upgrade qerl-compile."),
        ("version: 0", "expected version 1; got 0. Write `version: 1`."),
        ("version: '1'", "expected version 1; got '1'"),
        ("version: true", "expected version 1; got True"),
        ("version: 1.0", "expected version 1; got 1.0"),
        ("", "recipe.yaml: expected a mapping with the keys version, name"),
        ("- 1", "recipe.yaml: expected a mapping with the keys version, name"),
    ],
)
def test_the_version_must_be_there_and_be_ours(text: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(text, tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"version: 1 \xff")
    with pytest.raises(RecipeError, match="expected UTF-8 text"):
        Recipe.from_file(tmp_path / "r.yaml")


def test_a_part_built_in_python_raises_the_same_error() -> None:
    with pytest.raises(RecipeError, match=r"QuantizeRule: match: expected a valid regular expression"):
        QuantizeRule(match="(")
    with pytest.raises(RecipeError, match=r"LoraRule: rank: expected a number >= 0; got -1"):
        LoraRule(match=".*", rank=-1)
    with pytest.raises(RecipeError, match=r"NoiseConfig: sigma_end"):
        NoiseConfig(sigma_start=1e-5)
    with pytest.raises(RecipeError, match=r"Recipe: lora: expected a list; got 3"):
        Recipe(lora=3)  # type: ignore[arg-type]  # the wrong type is the test


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=2e-4", lambda r: r.train.learning_rate == 2e-4),
        ("noise.sigma_start = 5e-2", lambda r: r.noise.sigma_start == 5e-2),
        ("noise=null", lambda r: r.noise is None),
        ("quantize[0].format=none", lambda r: r.quantize[0].format == "none"),
        ("lora.0.rank=8", lambda r: r.lora[0].rank == 8),
        ("train.betas=[0.8, 0.95]", lambda r: r.train.betas == (0.8, 0.95)),
        ("quantize=[{match: a, format: none}]", lambda r: r.quantize == (QuantizeRule(match="a", format="none"),)),
        ("name=a=b", lambda r: r.name == "a=b"),
    ],
)
def test_an_override_changes_one_value(override: str, value: object) -> None:
    before = Recipe.named("qerl-nvfp4-aqn")
    after = before.with_overrides([override])
    assert callable(value) and value(after)
    assert before == Recipe.named("qerl-nvfp4-aqn")


def test_an_override_below_a_null_part_creates_it_with_defaults() -> None:
    recipe = Recipe.named("nvfp4-lora").with_overrides(["noise.stages=4"])
    assert recipe.noise == NoiseConfig(stages=4)


def test_overrides_are_judged_together() -> None:
    recipe = Recipe.named("qerl-nvfp4-aqn").with_overrides(["noise.sigma_end=0.1", "noise.sigma_start=0.2"])
    assert recipe.noise is not None and recipe.noise.sigma_end == 0.1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", "--set: train.learning_rat: expected one of the keys steps, loss"),
        ("train.learning_rat=1", "Did you mean `learning_rate`?"),
        ("train.learning_rate=abc", "--set: train.learning_rate: expected a number; got 'abc'"),
        ("train.steps", "expected KEY=VALUE such as train.learning_rate=2e-4; got 'train.steps'"),
        ("=1", "expected KEY=VALUE"),
        ("train..steps=1", "expected KEY=VALUE"),
        ("lora[3].rank=1", "--set: lora[3]: expected an index below 1"),
        ("lora.x=1", "--set: lora.x: expected an index below 1"),
        ("train.steps.x=1", "--set: train.steps.x: expected a key that has keys below it; got `x` of 600"),
        ("train.steps={a: 1, a: 2}", "--set train.steps:1:8: expected each key once in a mapping"),
        ("train.steps=!!python/object:os.system {}", "expected plain YAML without tags"),
        ("version=2", "which a newer qerl-compile wrote"),
    ],
)
def test_a_bad_override_is_told_with_its_key(override: str, words: str) -> None:
    assert words in override_refusal(override)
