"""`qerl-compile train MODEL --task TASK -o RUN`: the whole of it, from a bf16 checkpoint to a trained adapter."""

from pathlib import Path
from typing import Annotated, cast

import typer

from qerl_compile.cli.options import Device, Inner, Model, Out, RecipeName, Sets, TrustRemoteCode

Task = Annotated[str, typer.Option(help="rg:NAME[:key=value,…] from reasoning_gym, or FILE.jsonl.")]
Rewards = Annotated[list[str], typer.Option("--reward", help="answer, gsm8k, or FILE.py:FUNCTION; may be repeated.")]
System = Annotated[str | None, typer.Option(help="System message.")]
Question = Annotated[str | None, typer.Option(help="Template of the user message, such as 'What is {expression}?'.")]
Prefix = Annotated[str | None, typer.Option(help="Template that begins the answer, such as '{expression} ='.")]
Extract = Annotated[str | None, typer.Option(help="final, marked, first_number, last_number or text.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter directory to go on from.")]

SAMPLES = 8
"""Completions of each evaluation that are kept; they are of the same questions every time."""


def train(
    model: Model,
    out: Out,
    task: Task,
    recipe: RecipeName = "qerl-nvfp4-aqn",
    set_: Sets = [],  # noqa: B006  # typer wants a list literal
    reward: Rewards = ["answer"],  # noqa: B006
    system: System = None,
    question: Question = None,
    assistant_prefix: Prefix = None,
    extract: Extract = None,
    adapter: Adapter = None,
    inner: Inner = "inductor",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train adapters with GRPO/DAPO on a 4-bit base, evaluate before and after, write the adapter."""
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote
    from qerl_compile.cli.runs import Run, base_name, open_tokenizer, refuse_output, run_directory

    quiet_libraries()
    refuse_output(out)
    from qerl_compile.adapter_files import write_adapter
    from qerl_compile.cli.hints import export_command
    from qerl_compile.cli.progress import training_progress
    from qerl_compile.errors import RecipeError
    from qerl_compile.loading import load
    from qerl_compile.recipe import Recipe
    from qerl_compile.rl.answers import Extractor, default_extractor
    from qerl_compile.rl.evaluate import Evaluation
    from qerl_compile.rl.metrics import MetricsWriter
    from qerl_compile.rl.prompts import PromptFormat
    from qerl_compile.rl.rewards import resolve_rewards
    from qerl_compile.rl.tasks import parse_task
    from qerl_compile.rl.trainer import Trainer

    rules = Recipe.resolve(recipe).with_overrides(set_)
    if not rules.lora and adapter is None:
        raise RecipeError(
            where=f"recipe {rules.name}: lora",
            expected="at least one rule, since adapters are what is trained",
            got="none",
            do="Add a lora rule, or go on from an adapter with --adapter.",
        )
    rows = parse_task(task)
    held_out = rows.held_out(rules.train.eval_size)
    extractor = cast(Extractor, extract or default_extractor(assistant_prefix))
    rewards = resolve_rewards(reward, rows, extractor)
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    prompt = PromptFormat(system, question, assistant_prefix, chat=bool(tokenizer.chat_template))
    for row in held_out:
        prompt.encode(tokenizer, row)
    policy = load(
        model,
        rules,
        inner=inner,
        device=device,
        adapter=adapter,
        seed=rules.train.seed,
        trust_remote_code=trust_remote_code,
    )
    base = base_name(model)
    with (
        run_directory(out),
        MetricsWriter(out / "metrics.jsonl") as metrics,
        MetricsWriter(out / "samples.jsonl") as samples,
        training_progress(rules.train.steps) as show,
    ):

        def report(row: dict[str, float | int]) -> None:
            metrics.write(row)
            show(row)

        def record(step: int, evaluation: Evaluation) -> None:
            for sample in evaluation.samples(SAMPLES):
                samples.write({"step": step, **sample})

        known_as = base if Path(model).is_dir() else model  # a relative path would not survive a change of directory
        Run(known_as, task, reward, extractor, system, question, assistant_prefix, inner).write(out, rules)
        trainer = Trainer(policy, tokenizer, rules, rows, rewards, prompt, extractor, report, record)
        before, after = trainer.train()
        write_adapter(policy, out / "adapter", base_name=base)
    stdout().print(f"held-out accuracy  {before.accuracy}  →  {after.accuracy}", highlight=False, markup=False)
    what = "adapter/, metrics.jsonl, samples.jsonl, recipe.yaml, run.json"
    wrote(out, what, then=export_command(out, packed=bool(policy.qerl.plan.quantize)))
