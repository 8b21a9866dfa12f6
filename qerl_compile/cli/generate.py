"""`qerl-compile generate MODEL|RUN PROMPT…`: hear a model speak, with its adapter if it is a run.

Completions come from the engine of training's rollouts, with the noise off. Of a run its adapter and system message are
taken; the text that begins an answer is not, unless it is given. The inner compiler is eager, since a few answers
are there sooner than compiled graphs would be. The same seed gives the same text.

What it does not do: talk. Each PROMPT is a user message by itself, and nothing is written to disk.
"""

from pathlib import Path
from typing import Annotated

import typer

from qerl_compile.cli.options import Device, Inner, ModelOrRun

Prompts = Annotated[list[str], typer.Argument(help="User messages, one completion each.")]
Tokens = Annotated[int, typer.Option(min=1, help="Longest completion.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
System = Annotated[str | None, typer.Option(help="System message; default: the one that the run was trained with.")]
Prefix = Annotated[str | None, typer.Option(help="Text that begins the answer.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]


def generate(
    model: ModelOrRun,
    prompt: Prompts,
    max_new_tokens: Tokens = 64,
    temperature: Temperature = 0.0,
    system: System = None,
    assistant_prefix: Prefix = None,
    seed: Seed = 0,
    inner: Inner = "eager",
    device: Device = None,
) -> None:
    """Generate completions from a model, a packed directory, or a training run."""
    from qerl_compile.cli.console import quiet_libraries, stdout, wrote_nothing

    quiet_libraries()
    from qerl_compile.cli.hints import export_command, train_command, transform_command
    from qerl_compile.cli.runs import Run, is_run, open_model
    from qerl_compile.rl.prompts import PromptFormat, end_token_ids, pad_token_id
    from qerl_compile.rl.rollout import PagedSampler, Sampling

    policy, tokenizer, base = open_model(model, inner=inner, device=device)
    prefix = None if assistant_prefix is None else assistant_prefix.replace("{", "{{").replace("}", "}}")
    if system is None and is_run(model):
        system = Run.read(Path(model)).system
    layout = PromptFormat(system=system, assistant_prefix=prefix, chat=bool(tokenizer.chat_template))
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompt]
    ids = [layout.encode(tokenizer, row).ids for row in rows]
    ends, pad = end_token_ids(tokenizer, policy.generation_config), pad_token_id(tokenizer, policy.generation_config)
    params = Sampling(max_new_tokens, ends, pad, temperature, seed=(seed, "generate"))
    rollouts = PagedSampler(policy).generate(ids, 1, params)
    for text, rollout in zip(prompt, rollouts, strict=True):
        answer = tokenizer.decode(list(rollout.completion_ids), skip_special_tokens=True)
        stdout().print(f"[bold cyan]{'user':>9}[/] ", end="")
        stdout().print(text, markup=False, highlight=False)
        stdout().print("[bold magenta]assistant[/] ", end="")
        stdout().print((assistant_prefix or "") + answer, markup=False, highlight=False)
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    packed = policy.qerl.plan.packs
    if is_run(model):
        then = export_command(model, packed=packed)
    else:
        then = train_command(model) if packed else transform_command(model)
    wrote_nothing(f"{tokens} tokens from {base}" + (f" with {model}/adapter" if is_run(model) else ""), then=then)
