"""Train a 4-bit model in TRL's GRPOTrainer: python examples/trl_grpo.py BASE --output_dir RUN --max_steps 100 ..."""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

import qerl_compile


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward 1 for a completion whose first word is the sum."""
    return [float(text.split()[:1] == [one]) for text, one in zip(completions, answer, strict=True)]


base, *options = sys.argv[1:]
(args,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(options)
inner = "inductor" if torch.cuda.is_available() else "eager"  # compiling for a CPU takes longer than a short run
model = qerl_compile.load(base, "nvfp4-lora", inner=inner)
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
sums = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10) for b in range(10)]
trainer = GRPOTrainer(model, right, args, train_dataset=Dataset.from_list(sums), processing_class=tokenizer)
trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
trainer.save_model(f"{args.output_dir}/adapter")
