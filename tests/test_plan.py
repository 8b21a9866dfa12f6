"""From rules and graph facts to sites, without a graph: `capture` is given."""

import pytest
import torch
from torch import nn

from qerl_compile.errors import FormatError, RecipeError
from qerl_compile.passes import LoraSite, QuantizeSite
from qerl_compile.plan import Plan, check_columns, make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.regions import LayerFacts

NAMES = ("q", "k", "v", "o", "unused")


class Tiny(nn.Module):
    """Two layers of four called linears and one that is never called; a head outside, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in NAMES}) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.embed = nn.Embedding(8, 16)
        self.head = nn.Linear(16, 8, bias=False)


def facts(index: int) -> LayerFacts:
    path = f"layers.{index}"
    linears = tuple(f"{path}.{name}" for name in "qkvo")
    return LayerFacts(linears, (linears[:3],), (f"{path}.norm1", f"{path}.norm2"))


@pytest.fixture(autouse=True)
def _given_facts(monkeypatch):
    monkeypatch.setattr("qerl_compile.plan.capture", lambda model: {f"layers.{i}": facts(i) for i in range(2)})


def plan(**rules) -> Plan:
    return make_plan(Tiny(), Recipe.resolve(rules))


DENSE = tuple(tuple(f"layers.{i}.{name}" for name in "qkv") for i in range(2))


def test_no_rules_select_nothing():
    """What shares an input is a dense group all the same: rollouts fuse it."""
    assert plan() == Plan(layers=("layers.0", "layers.1"), dense_groups=DENSE)


def test_dense_groups_are_the_rest_of_what_shares_an_input():
    assert plan(quantize=[{"match": r"layers\.0\..*"}]).dense_groups == DENSE[1:]
    assert plan(quantize=[{"match": r".*\.q"}]).dense_groups == tuple(
        (f"layers.{i}.k", f"layers.{i}.v") for i in (0, 1)
    )
    assert plan(quantize=[{"match": r".*\.[qk]"}]).dense_groups == ()


@pytest.mark.parametrize(
    "change, left",
    [
        (lambda layer: layer["k"].to(torch.float64), DENSE[1:]),
        (lambda layer: setattr(layer["k"], "bias", nn.Parameter(torch.zeros(16))), DENSE[1:]),
        (lambda layer: [setattr(m, "bias", nn.Parameter(torch.zeros(16))) for m in layer.values()], DENSE),
        (lambda layer: setattr(layer["k"], "weight", layer["v"].weight), DENSE[1:]),
        (lambda layer: setattr(layer["unused"], "weight", layer["v"].weight), DENSE[1:]),
    ],
)
def test_what_cannot_be_rows_of_one_tensor_is_no_dense_group(change, left):
    model = Tiny()
    change(model.layers[0])
    assert make_plan(model, Recipe()).dense_groups == left


def test_adapters_are_stacked_over_groups_dense_groups_and_lone_linears():
    found = plan(
        quantize=[{"match": r"layers\.0\..*"}],
        lora=[{"match": r"layers\.0\.v|layers\.1\.[qk]|head|.*\.o", "rank": 2}],
    )
    lone = [("layers.0.o",), ("layers.1.o",), ("head",)]
    assert sorted(found.adapted()) == sorted([*DENSE, *lone])
    assert plan(lora=[{"match": "head", "rank": 2}]).adapted() == (("head",),)


def test_what_no_graph_calls_is_no_site():
    found = plan(quantize=[{"match": ".*"}])
    assert set(found.quantize) == {f"layers.{i}.{name}" for i in range(2) for name in "qkvo"} | {"head"}
    assert set(found.quantize.values()) == {QuantizeSite()}


def test_groups_are_the_quantized_part_of_what_shares_an_input():
    assert plan(quantize=[{"match": r"layers\.0\..*"}]).groups == (("layers.0.q", "layers.0.k", "layers.0.v"),)
    assert plan(quantize=[{"match": r"layers\.0\.[qvo]"}]).groups == (("layers.0.q", "layers.0.v"),)
    assert plan(quantize=[{"match": r"layers\.0\.[qo]"}]).groups == ()


def test_members_of_a_group_are_quantized_alike():
    """Unequal sites do not share a scale, but graphs cannot tell them apart."""
    found = plan(quantize=[{"match": r".*\.q", "scales": "mse"}, {"match": r"layers\..*"}])
    assert found.quantize["layers.0.q"] == QuantizeSite(scales="mse")
    assert found.groups == (("layers.0.k", "layers.0.v"), ("layers.1.k", "layers.1.v"))
    one = plan(quantize=[{"match": r"layers\.0\..*", "scales": "mse"}, {"match": r"layers\.1\..*"}])
    assert one.kind("layers.0") == one.kind("layers.1")
    assert len(one.groups) == 2


TRAINED = {"match": r"layers\.0\..*", "weights": "trained"}


def test_trained_weights_are_groups_of_their_own_and_not_dense_ones():
    found = plan(quantize=[TRAINED])
    assert found.quantize == {}
    assert found.trained_weights == tuple(f"layers.0.{name}" for name in "qkvo")
    assert found.trained_groups == (("layers.0.q", "layers.0.k", "layers.0.v"),)
    assert found.groups == ()
    assert found.dense_groups == DENSE[1:]
    assert found.group_of("layers.0.k") == found.trained_groups[0]
    assert set(found.owners()) == set(found.trained_weights)


def test_packed_and_trained_weights_of_one_input_do_not_share_a_scale():
    found = plan(quantize=[{"match": r"layers\.0\.[qk]"}, {"match": r"layers\.0\..*", "weights": "trained"}])
    assert found.groups == (("layers.0.q", "layers.0.k"),)
    assert found.trained_weights == ("layers.0.v", "layers.0.o")
    assert found.trained_groups == ()


def test_a_trained_linear_outside_the_layers_is_a_region_of_its_own():
    assert plan(quantize=[{"match": "head", "weights": "trained"}]).regions() == ("layers.0", "layers.1", "head")


def test_adapters_are_not_trained_together_with_full_weights():
    with pytest.raises(RecipeError, match=r"layers\.0\.q: .*4 linears with `weights: trained` and 2 with an adapter"):
        plan(quantize=[TRAINED], lora=LORA)
    with pytest.raises(RecipeError, match=r"layers\.0\.q: expected adapters or trained weights"):
        plan(quantize=[TRAINED], lora=[{"match": "head", "rank": 2}])


def test_sparse_linears_take_the_score_of_their_first_rule():
    rules = [{"match": r".*\.o", "score": "none"}, {"match": r"layers\.0\..*"}]
    assert plan(sparsify=rules).sparse == {f"layers.0.{name}": "magnitude" for name in "qkv"}
    assert plan(sparsify=rules).regions() == ("layers.0", "layers.1")


def test_only_the_mask_of_a_trained_weight_shows_in_a_graph():
    half = [{"match": r"layers\.0\..*"}]
    everything = {"match": r"layers\..*"}
    for rules in ({"quantize": [everything]}, {}):
        found = plan(sparsify=half, **rules)
        assert found.kind("layers.0")[-1] == found.kind("layers.1")[-1] == ()
    found = plan(sparsify=half, quantize=[{**everything, "weights": "trained"}])
    assert found.kind("layers.0") != found.kind("layers.1")


@pytest.mark.parametrize(
    "rules, where",
    [
        ({"quantize": [TRAINED]}, "quantize: weights: layers.0.q"),
        ({"sparsify": [{"match": r".*\.[qo]"}]}, "sparsify: layers.0.q"),
    ],
)
def test_a_packed_checkpoint_has_no_full_weights_to_train_or_to_thin_out(rules, where):
    with pytest.raises(RecipeError, match="the bf16 checkpoint of this model") as fault:
        make_plan(Tiny(), Recipe.resolve(rules), packed=frozenset({"layers.0.q"}))
    assert fault.value.where == where


def test_a_tied_head_is_not_made_sparse_and_columns_must_be_fours():
    model = Tiny()
    model.head.weight = model.embed.weight
    with pytest.raises(RecipeError, match=r"head: .*tied to embed.*from the sparsify rules"):
        make_plan(model, Recipe.resolve({"sparsify": [{"match": "head"}]}))
    model.layers[0]["o"] = nn.Linear(18, 16)
    with pytest.raises(FormatError, match=r"layers\.0\.o: expected in_features to be a multiple of 4"):
        make_plan(model, Recipe.resolve({"sparsify": [{"match": r".*\.o"}]}))


NEEDS_TEXT = [
    ({"quantize": [{"match": ".*", "rounding": "gptq"}]}, "rounding gptq"),
    ({"sparsify": [{"match": ".*", "score": "wanda"}]}, "score wanda"),
    ({"quantize": [{"match": ".*"}], "calibration": {"channel_scaling": "awq"}}, "channel_scaling awq"),
    ({"quantize": [{"match": ".*"}], "calibration": {"activations": True}}, "activations true"),
    ({"calibration": {"kv_cache": "fp8"}}, "kv_cache fp8"),
]


@pytest.mark.parametrize("rules, named", NEEDS_TEXT, ids=[named for _, named in NEEDS_TEXT])
def test_rules_that_need_sample_text_are_refused_unless_the_caller_has_it(rules, named):
    with pytest.raises(RecipeError, match=rf"got {named}, and no text.*--calibrate-on FILE.*qerl_compile\.calibrate"):
        plan(**rules)
    assert make_plan(Tiny(), Recipe.resolve(rules), calibrating=True).layers == ("layers.0", "layers.1")


def test_a_calibration_that_measures_nothing_needs_no_text():
    assert plan(calibration={"samples": 3}) == plan()


def test_what_came_packed_needs_no_text_any_more():
    """The command line packs with a recipe and then trains the packed directory with the same recipe."""
    rules = {"quantize": [{"match": r".*\.[qk]", "rounding": "gptq"}], "calibration": {"activations": True}}
    names = frozenset(f"layers.{i}.{name}" for i in (0, 1) for name in "qk")
    found = make_plan(Tiny(), Recipe.resolve(rules), packed=names)
    assert set(found.quantize.values()) == {QuantizeSite()}
    with pytest.raises(RecipeError, match="got rounding gptq, activations true, and no text"):
        make_plan(Tiny(), Recipe.resolve(rules), packed=names - {"layers.1.k"})


def test_the_first_matching_rule_wins():
    found = plan(quantize=[{"match": r".*\.q", "format": "none"}, {"match": r"layers\..*"}])
    assert not any(path.endswith(".q") for path in found.quantize)
    assert len(found.quantize) == 6
    assert found.groups == (("layers.0.k", "layers.0.v"), ("layers.1.k", "layers.1.v"))


def test_a_pattern_must_match_the_whole_path():
    with pytest.raises(RecipeError, match=r"quantize\[0\]\.match"):
        plan(quantize=[{"match": "layers"}])


def test_adapters_take_the_rank_of_their_first_rule():
    found = plan(
        lora=[{"match": r"layers\.0\.q", "rank": 4, "alpha": 2.0}, {"match": r".*\.[qv]", "rank": 8, "alpha": 8.0}]
    )
    assert found.lora == {
        "layers.0.q": LoraSite(4, 2.0),
        "layers.0.v": LoraSite(8, 8.0),
        "layers.1.q": LoraSite(8, 8.0),
        "layers.1.v": LoraSite(8, 8.0),
    }


def test_noise_goes_to_the_norms_that_the_graph_shows():
    assert plan(noise={}).noise == tuple(f"layers.{i}.norm{n}" for i in range(2) for n in (1, 2))
    assert plan(noise={"match": r".*\.norm2"}).noise == ("layers.0.norm2", "layers.1.norm2")


def test_noise_that_is_off_has_no_sites_but_its_rule_must_fit():
    assert plan(noise={"enabled": False}) == plan()
    with pytest.raises(RecipeError, match=r"noise\.match"):
        plan(noise={"enabled": False, "match": "norm1"})


LORA = [{"match": r".*\.q", "rank": 2}]


def test_norms_are_trained_only_if_a_recipe_says_which():
    assert plan(lora=LORA, noise={}).trained_norms == ()
    assert plan(lora=LORA, trainable_norms=r".*\.norm2").trained_norms == ("layers.0.norm2", "layers.1.norm2")
    assert plan(lora=LORA, trainable_norms=r".*\.norm2").noise == ()


def test_norms_that_were_trained_already_take_the_place_of_the_rule():
    recipe = Recipe.resolve({"lora": LORA, "trainable_norms": r".*\.norm2"})
    given = make_plan(Tiny(), recipe, trained_norms=["layers.1.norm1", "layers.0.norm2"])
    assert given.trained_norms == ("layers.0.norm2", "layers.1.norm1")  # in the order of the model
    with pytest.raises(RecipeError, match=r"layers\.9\.norm1: expected trained weights of norms .* got .* 1 modules"):
        make_plan(Tiny(), recipe, trained_norms=["layers.0.norm1", "layers.9.norm1"])


def test_norms_are_not_trained_without_adapters_to_save_them_with():
    with pytest.raises(RecipeError, match=r"trainable_norms: expected lora rules as well, .* Add a lora rule"):
        plan(trainable_norms=".*")


@pytest.mark.parametrize(
    "rules, where, words",
    [
        ({"quantize": [{"match": r"layer\.0\.q"}]}, "quantize[0].match", "such as 'layers.0.q'"),
        ({"quantize": [{"match": r"layers\.0\.unused"}]}, "quantize[0].match", "matches none of 11 modules"),
        ({"quantize": [{"match": ".*"}, {"match": "head"}]}, "quantize[1].match", "an earlier rule takes"),
        ({"lora": [{"match": "embed", "rank": 2}]}, "lora[0].match", "'embed'"),
        ({"noise": {"match": "norm1"}}, "noise.match", ".norm1'."),
        ({"lora": LORA, "trainable_norms": r"layers\.0\.norm"}, "trainable_norms", "such as 'layers.0.norm2'"),
    ],
)
def test_a_rule_that_selects_nothing_says_where_and_what_was_near(rules, where, words):
    with pytest.raises(RecipeError) as fault:
        plan(**rules)
    assert fault.value.where == where
    assert words in str(fault.value)


def test_a_model_without_norms_that_feed_linears_says_so(monkeypatch):
    monkeypatch.setattr("qerl_compile.plan.capture", lambda model: {"layers.0": LayerFacts(("layers.0.q",), (), ())})
    with pytest.raises(RecipeError, match=r"noise\.match.*none of 0 modules.*delete the rule"):
        plan(noise={})


def test_linears_that_a_checkpoint_holds_packed_are_sites_whatever_the_rules_say():
    packed = frozenset({"layers.0.q", "layers.0.k"})
    assert make_plan(Tiny(), Recipe(), packed=packed).groups == (("layers.0.q", "layers.0.k"),)
    excluded = Recipe.resolve({"quantize": [{"match": ".*", "format": "none"}]})
    assert set(make_plan(Tiny(), excluded, packed=packed).quantize) == packed


def test_adapters_that_exist_replace_the_rules():
    recipe = Recipe.resolve({"lora": [{"match": ".*", "rank": 64}]})
    given = {"layers.1.o": LoraSite(2, 4.0)}
    assert make_plan(Tiny(), recipe, adapters=given).lora == given
    assert make_plan(Tiny(), recipe, adapters={}).lora == {}


@pytest.mark.parametrize("path", ["layers.0.unused", "layers.7.q", "embed"])
def test_an_adapter_for_what_the_model_does_not_call_is_refused(path):
    with pytest.raises(RecipeError, match=rf"{path}: expected an adapter on a linear that the model calls"):
        make_plan(Tiny(), Recipe(), adapters={path: LoraSite(2, 4.0)})


def test_a_tied_linear_is_refused_with_what_it_is_tied_to():
    model = Tiny()
    model.head.weight = model.embed.weight
    with pytest.raises(RecipeError, match=r"head: .* tied to embed"):
        make_plan(model, Recipe.resolve({"quantize": [{"match": "head"}]}))


@pytest.mark.parametrize("columns", [1, 15, 17, 24])
def test_columns_must_be_whole_blocks(columns):
    with pytest.raises(FormatError) as fault:
        check_columns("a.b", torch.empty(3, columns, device="meta"))
    assert fault.value.where == "a.b"
    assert fault.value.got == f"a weight of shape [3, {columns}]"
    assert r"{match: 'a\\.b', format: none}" in fault.value.do


def test_whole_blocks_pass():
    assert check_columns("a", torch.empty(1, 48, device="meta")) is None


def test_sites_outside_the_layers_are_regions_of_their_own():
    found = plan(quantize=[{"match": r"head|.*\.o"}], lora=[{"match": "head", "rank": 2}])
    assert found.regions() == ("layers.0", "layers.1", "head")


def test_layers_to_which_the_same_is_done_are_of_one_kind():
    same = plan(quantize=[{"match": ".*"}], noise={})
    assert same.kind("layers.0") == same.kind("layers.1")
    assert same.kind("head") != same.kind("layers.0")
    dense = Plan(layers=("layers.0", "layers.1"), dense_groups=DENSE[:1])
    assert dense.kind("layers.0") != dense.kind("layers.1")
    for rules in (
        {"quantize": [{"match": r"layers\.0\.q"}]},
        {"lora": [{"match": r"layers\.0\.q", "rank": 2}]},
        {"lora": [{"match": r"layers\.0\.q", "rank": 2}, {"match": r".*\.q", "rank": 3}]},
        {"noise": {"match": r"layers\.0\..*"}},
        {"lora": LORA, "trainable_norms": r"layers\.0\..*"},
        {"lora": LORA, "noise": {"match": r"layers\.0\..*"}, "trainable_norms": r"layers\.1\..*"},
    ):
        other = plan(**rules)
        assert other.kind("layers.0") != other.kind("layers.1"), rules


def test_a_path_that_begins_like_a_layer_is_not_inside_it():
    found = Plan(layers=("layers.1",), quantize={"layers.1.q": QuantizeSite(), "layers.10.q": QuantizeSite()})
    assert found.regions() == ("layers.1", "layers.10.q")
    assert found.kind("layers.1") == (((".q", "nvfp4"),), (), (), (), (), ())


def test_the_group_of_a_lone_site_is_itself():
    found = plan(quantize=[{"match": ".*"}])
    assert found.group_of("layers.1.k") == ("layers.1.q", "layers.1.k", "layers.1.v")
    assert found.group_of("layers.1.o") == ("layers.1.o",)
