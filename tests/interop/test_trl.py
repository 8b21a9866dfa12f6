"""A transformed model in TRL's GRPOTrainer and in transformers' Trainer, neither of which knows what it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from qerl_compile.adapter_files import adapters_of
from qerl_compile.adapter_reading import read_adapter
from qerl_compile.errors import ModelError
from qerl_compile.plan import make_plan
from qerl_compile.recipe import Recipe
from qerl_compile.transforming import transform
from tests.models import LONG, dequantized_oracle, tiny_model
from tests.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = {"quantize": [{"match": ".*_proj"}], "lora": [{"match": ".*_proj", "rank": 4, "alpha": 8.0}]}
PROMPTS = Dataset.from_list([{"prompt": f"say {i}"} for i in range(8)])
TOKENS_BT = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def base(dtype=torch.float32, **changes):
    return tiny_model("llama", dtype=dtype, vocab_size=259, **changes)


def transformed(recipe=RECIPE, **options):
    return transform(base(**options), recipe, inner="eager")


def variety(completions, **_):
    return [float(len(set(text))) for text in completions]


def grpo(out, model=None, **settings):
    """TRL's defaults (bf16 autocast, gradient checkpointing), but for what makes it small and its steps large."""
    small = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6, "max_steps": 3}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_steps": 1}
    large = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    args = GRPOConfig(str(out), use_cpu=True, **{**small, **quiet, **large, **settings})
    model = transformed() if model is None else model
    return GRPOTrainer(model, variety, args, train_dataset=PROMPTS, processing_class=byte_tokenizer())


def history(trainer):
    timed = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    rows = [row for row in trainer.state.log_history if "reward" in row]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in tensors(item)]


@pytest.mark.parametrize(("beta", "dtype"), [(0.0, torch.bfloat16), (0.04, torch.float32)][0 if LONG else 1 :])
def test_grpo_trains_saves_and_resumes_to_the_same_bits(beta, dtype, tmp_path):
    whole = grpo(tmp_path / "whole", transformed(dtype=dtype), beta=beta)
    assert whole.ref_model is None  # no second copy of the base
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
    files = {file.name for file in (tmp_path / "whole/checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pth"} <= files
    assert not any(name.startswith(("model", "pytorch_model")) for name in files)

    again = grpo(tmp_path / "again", transformed(dtype=dtype), beta=beta)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert again.state.global_step == 3
    assert history(again) == history(whole)
    assert len(history(whole)) == 3
    for theirs, ours in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(theirs, ours)
    moments = [tensors(trainer.optimizer.state_dict()["state"]) for trainer in (again, whole)]
    assert len(moments[0]) == 3 * 2 * len(adapters_of(whole.model))
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*moments, strict=True))


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A run in float32 that starts from an adapter which differs from the base, and that difference."""
    start = transformed()
    with torch.no_grad():
        for adapter in adapters_of(start).values():
            adapter.b_NR.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    from_base = kl_to_base(start)
    trainer = grpo(tmp_path_factory.mktemp("run"), start, beta=0.04, bf16=False)
    trainer.train()
    return trainer, from_base


def kl_to_base(model):
    with torch.no_grad():
        logp = model(TOKENS_BT).logits.log_softmax(-1)
        with model.disable_adapter():
            base_logp = model(TOKENS_BT).logits.log_softmax(-1)
    return float((logp.exp() * (logp - base_logp)).sum(-1).mean())


def test_the_reference_is_the_policy_that_training_started_from(continued):
    trainer, from_base = continued
    kl = [row["kl"] for row in history(trainer)]
    assert from_base > 1e-2  # so that the base would have shown at step 1
    assert kl[0] < 1e-9 < kl[2]
    assert trainer.model.active_adapter == "default"


def test_what_trl_saved_gives_the_same_function_in_peft(continued, tmp_path):
    trainer, _ = continued
    trainer.save_model(str(tmp_path / "adapter"))
    oracle = dequantized_oracle(base(), make_plan(base(), Recipe.resolve(RECIPE)))
    with torch.no_grad():
        plain = oracle(TOKENS_BT).logits
        theirs = PeftModel.from_pretrained(oracle, str(tmp_path / "adapter")).eval()(TOKENS_BT).logits
        ours = trainer.model.eval()(TOKENS_BT).logits
    assert (theirs - plain).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["quantize", "lora"])
def test_a_head_that_trl_would_compute_wrongly_is_refused_before_training(part, tmp_path):
    head = {"match": "lm_head"}
    recipe = {**RECIPE, part: [*RECIPE[part], head]}
    with pytest.raises(ModelError, match=r"get_output_embeddings: expected a head that is a plain linear"):
        grpo(tmp_path, transformed(recipe))


def test_trl_refuses_a_second_adapter(tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        GRPOTrainer(
            transformed(),
            variety,
            args,
            train_dataset=PROMPTS,
            processing_class=byte_tokenizer(),
            peft_config=LoraConfig(),
        )


def test_transformers_trainer_saves_and_loads_the_best_adapter(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in TOKENS_BT.tolist()]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=0.3,  # so large that the first step is the best
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(transformed(), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = losses.index(min(losses)) + 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best < 3
    saved = transformed()
    read_adapter(saved, tmp_path / f"checkpoint-{best}")
    for theirs, ours in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(theirs, ours)


def test_the_example_in_the_documentation_runs_and_goes_on(tmp_path):
    script = (ROOT / "examples/trl_grpo.py").read_text()
    assert f"```python\n{script}```" in (ROOT / "docs/interop.md").read_text()
    base().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = (
        "--num_generations 4 --per_device_train_batch_size 4 --max_completion_length 4 --report_to none --use_cpu"
    )
    runs = 2 if LONG else 1
    for steps in map(str, range(1, runs + 1)):
        command = ["examples/trl_grpo.py", tmp_path / "base", "--output_dir", tmp_path / "run", "--max_steps", steps]
        done = subprocess.run(
            [sys.executable, *command, "--save_steps", "1", *settings.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert {"checkpoint-1", f"checkpoint-{runs}", "adapter"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    state = (tmp_path / f"run/checkpoint-{runs}/trainer_state.json").read_text()
    assert f'"global_step": {runs}' in state
    assert state.count('"reward":') <= runs  # step 1 was not taken again
