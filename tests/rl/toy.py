"""A toy world that a random two-layer model learns in 20 steps: sixteen words, and the task to say one of four back.

The right answer is one token, so a completion has one token and a random model guesses right in one of sixteen.
"""

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qerl_compile.recipe import Recipe
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.rewards import AnswerReward
from qerl_compile.rl.tasks import Row, Task
from qerl_compile.rl.trainer import Trainer
from qerl_compile.transforming import resample_noise, transform
from tests.models import tiny_model

COLOURS = ("red", "green", "blue", "grey")
WORDS = ("<pad>", "<eos>", *COLOURS, "say", "now", *(f"word{i}" for i in range(8)))
TRAINING = {
    "train.learning_rate": 5e-3,
    "train.learning_rate_schedule": "constant",
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.prompts_per_step": 4,
    "train.group_size": 16,
    "train.max_new_tokens": 1,
    "train.eval_every": 0,
    "train.eval_size": 4,
}


class Echo(Task):
    """`say red now` is answered by `red`."""

    spec = "echo"

    def train_row(self, seed: int, position: int) -> Row:
        colour = COLOURS[position % len(COLOURS)]
        return {"prompt": f"say {colour} now", "answer": colour}

    def held_out(self, count: int | None = None) -> list[Row]:
        return [self.train_row(0, position) for position in range(count or len(COLOURS))]

    def is_correct(self, answer: str | None, row: Row) -> bool:
        return answer == row["answer"]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    pad, end = WORDS[:2]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=pad))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=pad, padding_side="left")


@cache
def toy_model(name: str = "qerl-nvfp4-aqn") -> Any:
    """A random Llama over the sixteen words under a built-in recipe; its head is sharp enough to answer with certainty.

    It is made once, for compiling is most of a test's time; `toy_trainer` makes its adapters new.
    """
    model = tiny_model("llama", vocab_size=len(WORDS), eos_token_id=1)
    model.lm_head.weight.data.mul_(5)
    model = transform(model.to(torch.bfloat16) if name.startswith("bf16") else model, name, inner="eager")
    model.fresh_state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return model


def toy_recipe(name: str = "qerl-nvfp4-aqn", **changes: Any) -> Recipe:
    """A built-in recipe with settings for the toy; `noise__in_update=True` sets noise.in_update."""
    settings = TRAINING | {key.replace("__", "."): value for key, value in changes.items()}
    return Recipe.named(name).with_overrides(f"{key}={str(value).lower()}" for key, value in settings.items())


def toy_trainer(recipe: Recipe, model: Any = None, **fields: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """A trainer on Echo with untrained adapters and silent noise, and the list that its metrics go to."""
    model = model or toy_model(recipe.name)
    model.load_state_dict(model.fresh_state)
    model.zero_grad()
    resample_noise(model, 0.0)
    task, rows = Echo(), []
    given = {"model": model, "tokenizer": words(), "recipe": recipe, "task": task, "report": rows.append}
    given |= {"rewards": [AnswerReward(task, "text")], "prompt": PromptFormat(), "extractor": "text"}
    return Trainer(**{**given, **fields}), rows
