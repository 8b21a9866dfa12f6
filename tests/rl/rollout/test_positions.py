"""Sequences that are longer than a model has positions are refused before anything is sampled."""

import pytest
import torch
import transformers

from qerl_compile.errors import GraphError, ModelError
from qerl_compile.rl.rollout import PagedSampler, Sampling
from qerl_compile.rl.rollout.positions import check_positions, most_positions
from qerl_compile.transforming import transform
from tests.models import tiny_model
from tests.rl.toy import Echo, toy_model, toy_recipe, toy_trainer

HALF = 8  # of the head dimension of a tiny model
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * HALF,
    "long_factor": [3.0] * HALF, "original_max_position_embeddings": 64,
}  # fmt: skip


def limit_of(family="llama", **changes):
    with torch.device("meta"):
        return most_positions(tiny_model(family, layers=1, **changes))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        (LONGROPE, 64),
    ],
    ids=["default", "linear", "yarn", "yarn that is in the config already", "longrope"],
)
def test_the_limit_is_what_the_rotary_embedding_was_made_for(rope, limit):
    assert limit_of(rope_parameters=rope)[0] == limit


def test_a_model_with_an_embedding_for_each_kind_of_layer_has_a_limit():
    assert limit_of("gemma3") == (256, "max_position_embeddings")


def test_a_model_that_says_nothing_is_refused_nothing():
    class Silent:
        config = transformers.PretrainedConfig()

    assert most_positions(Silent()) == (None, "")
    check_positions(Silent(), [(1,) * 10_000], 10_000)


def test_the_engine_refuses_the_longest_prompt_and_takes_one_that_just_fits():
    engine = PagedSampler(tiny_model("llama", layers=1), rows=2)
    params = Sampling(6, (2,), 0, 1.0)
    with pytest.raises(ModelError, match=r"prompt 1.*256 tokens.*251 and up to 6 new"):
        engine.generate([(5,) * 250, (5,) * 251], 1, params)
    assert len(engine.generate([(5,) * 250], 1, params)) == 1


def test_a_row_under_longrope_cannot_be_changed_by_a_neighbour():
    """transformers turns short rows by other angles as soon as one is past the original positions."""
    engine = PagedSampler(tiny_model("llama", layers=1, rope_parameters=LONGROPE), rows=2)
    with pytest.raises(ModelError, match="original_max_position_embeddings"):
        engine.generate([(5, 6, 7), (5,) * 60], 1, Sampling(5, (2,), 0, 1.0))


class Long(Echo):
    """Prompts that grow beyond a model's positions."""

    def __init__(self, held_out: int, trained: int) -> None:
        self.lengths = held_out, trained

    def held_out(self, count):
        return [self.row(self.lengths[0])] * count

    def train_row(self, seed, position):
        return self.row(self.lengths[1])

    @staticmethod
    def row(length):
        return {"prompt": " ".join(["say"] * length), "answer": "red"}


def test_a_run_is_refused_for_held_out_prompts_when_it_is_made_and_for_others_when_they_are_drawn():
    rules = toy_recipe("nvfp4-lora", train__steps=1)
    model = toy_model(rules.name)
    limit, _ = most_positions(model)
    with pytest.raises(ModelError, match="held-out rows: prompt 0"):
        toy_trainer(rules, task=Long(limit, 2))
    trainer, _ = toy_trainer(rules, task=Long(2, limit))
    with pytest.raises(ModelError, match="training rows 0 to"):
        trainer.step(1)


def test_a_rotary_embedding_that_looks_at_the_batch_is_refused_in_words():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(GraphError, match="rope_type"):
        transform(tiny_model("llama", layers=1, rope_parameters=dynamic), "qerl-nvfp4-aqn")


def test_keys_that_are_wider_than_values_are_refused_when_the_engine_is_made():
    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16}
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1,
        topk_group=1, **sizes,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config)
    with pytest.raises(ModelError, match="keys of 32 and values of 16"):
        PagedSampler(model)
