"""`qerl-compile train MODEL --task TASK -o RUN`: the whole of it, from a bf16 checkpoint to a trained adapter."""

from typing import Annotated

import typer

from qerl_compile.cli.options import Device, Inner, Model, Out, RecipeName, Sets, TrustRemoteCode

Task = Annotated[str, typer.Option(help="rg:NAME[:key=value,…] from reasoning_gym, or FILE.jsonl.")]
Rewards = Annotated[list[str], typer.Option("--reward", help="answer, gsm8k, or FILE.py:FUNCTION; may be repeated.")]
System = Annotated[str | None, typer.Option(help="System message.")]
Question = Annotated[str | None, typer.Option(help="Template of the user message, such as 'What is {expression}?'.")]
Prefix = Annotated[str | None, typer.Option(help="Template that begins the answer, such as '{expression} ='.")]
Extract = Annotated[str | None, typer.Option(help="final, marked, first_number, last_number or text.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter directory to go on from.")]


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
    from qerl_compile.staged_write import refuse_existing

    quiet_libraries()
    refuse_existing(out)
    from transformers import AutoTokenizer

    from qerl_compile.adapter_files import write_adapter
    from qerl_compile.cli.progress import training_progress
    from qerl_compile.cli.runs import Run
    from qerl_compile.loading import load, model_directory
    from qerl_compile.recipe import Recipe
    from qerl_compile.rl.answers import default_extractor
    from qerl_compile.rl.metrics import MetricsWriter
    from qerl_compile.rl.prompts import PromptFormat
    from qerl_compile.rl.rewards import resolve_rewards
    from qerl_compile.rl.tasks import parse_task
    from qerl_compile.rl.trainer import Trainer

    rules = Recipe.resolve(recipe).with_overrides(set_)
    rows = parse_task(task)
    prompt = PromptFormat(system=system, question=question, assistant_prefix=assistant_prefix)
    extractor = extract or default_extractor(assistant_prefix)
    rewards = resolve_rewards(reward, rows, extractor)  # pyright: ignore[reportArgumentType]  # checked inside
    root = model_directory(model)
    tokenizer = AutoTokenizer.from_pretrained(root, padding_side="left")
    prompt.encode(tokenizer, rows.held_out(1)[0])
    policy = load(
        model,
        rules,
        inner=inner,
        device=device,
        adapter=adapter,
        seed=rules.train.seed,
        trust_remote_code=trust_remote_code,
    )
    out.mkdir(parents=True)
    Run(model, task, reward, extractor, system, question, assistant_prefix, inner).write(out, rules)
    with MetricsWriter(out / "metrics.jsonl") as metrics, training_progress(rules.train.steps) as show:

        def report(row: dict[str, float | int]) -> None:
            metrics.write(row)
            show(row)

        trainer = Trainer(policy, tokenizer, rules, rows, rewards, prompt, extractor, report)  # pyright: ignore[reportArgumentType]
        before, after = trainer.train()
    write_adapter(policy, out / "adapter", base_name=model)
    stdout().print(f"held-out accuracy  {before.accuracy}  →  {after.accuracy}", highlight=False)
    wrote(out, "adapter/, metrics.jsonl, recipe.yaml, run.json", then=f"qerl-compile export {out} --target vllm -o OUT")
