"""`qerl-compile eval MODEL|RUN --task TASK`: accuracy on held-out items, greedy and over several samples per item.

A run brings its adapter, task, prompt format and the settings of its recipe; every one of them can be overridden. A
model directory or hub id is evaluated as it is, or with `--adapter DIR`, or packed by `--recipe`: so a trained run, its
4-bit base and the bf16 model can be compared on the same items, which depend on the items' text alone.
"""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from qerl_compile.cli.options import Device, Inner, ModelOrRun

Task = Annotated[
    str | None, typer.Option(help="rg:NAME[:key=value,…] or FILE.jsonl; default: the run's. Its held-out side is used.")
]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter directory to evaluate with, in place of the run's.")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="How to pack MODEL first: a built-in recipe or YAML file; not for a run.")
]
Samples = Annotated[int, typer.Option(min=0, help="Also draw so many answers per item, for avg@n and pass@k.")]
Ks = Annotated[str | None, typer.Option("-k", help="The k of pass@k, as 1,8; default: 1 and --samples.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="Of the samples; default: the run's, or 1.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Longest completion; default: the run's, or 512.")]
Size = Annotated[int | None, typer.Option(min=1, help="Held-out items; default: the run's, or 128.")]
System = Annotated[str | None, typer.Option(help="System message; default: the run's.")]
Question = Annotated[str | None, typer.Option(help="Template of the user message; default: the run's.")]
Prefix = Annotated[str | None, typer.Option(help="Template that begins the answer; default: the run's.")]
Extract = Annotated[str | None, typer.Option(help="final, marked, first_number, last_number or text.")]
Seed = Annotated[int, typer.Option(help="Seed of the samples.")]
Result = Annotated[Path | None, typer.Option("-o", "--out", help="JSON file to write; must not exist.")]


def evaluate(
    model: ModelOrRun,
    task: Task = None,
    adapter: Adapter = None,
    recipe: RecipeName = None,
    samples: Samples = 0,
    k: Ks = None,
    temperature: Temperature = None,
    max_new_tokens: Tokens = None,
    size: Size = None,
    system: System = None,
    question: Question = None,
    assistant_prefix: Prefix = None,
    extract: Extract = None,
    seed: Seed = 0,
    out: Result = None,
    inner: Inner = "eager",
    device: Device = None,
) -> None:
    """Measure a model, or a run with its adapter, on held-out items of a task, with intervals."""
    from qerl_compile.cli.console import quiet_libraries, wrote, wrote_nothing
    from qerl_compile.cli.output_file import refuse_file, write_file

    quiet_libraries()
    if out is not None:
        refuse_file(out)
    from qerl_compile.cli.hints import report_command, train_command, transform_command
    from qerl_compile.cli.runs import Run, is_run
    from qerl_compile.errors import TaskError
    from qerl_compile.recipe import Recipe
    from qerl_compile.recipe_fields import TrainConfig
    from qerl_compile.rl.answers import EXTRACTORS, Extractor, default_extractor
    from qerl_compile.rl.evaluate import evaluate as evaluate_greedily
    from qerl_compile.rl.evaluate import evaluate_sampled
    from qerl_compile.rl.prompts import PromptFormat, end_token_ids, pad_token_id
    from qerl_compile.rl.rollout import PagedSampler, Sampling
    from qerl_compile.rl.tasks import parse_task

    run = Run.read(Path(model)) if is_run(model) else None
    settings = TrainConfig() if run is None else Recipe.from_file(Path(model) / "recipe.yaml").train
    task = task or (run.task if run else None)
    if task is None:
        do = "Give --task rg:NAME or --task FILE.jsonl."
        raise TaskError(where="--task", expected="a task, since MODEL is no training run", got="none", do=do)
    if run is not None:
        system = run.system if system is None else system
        question = run.question if question is None else question
        same_prefix = assistant_prefix in (None, run.assistant_prefix)
        assistant_prefix = run.assistant_prefix if assistant_prefix is None else assistant_prefix
        extract = extract or (run.extractor if same_prefix else None)  # another prefix may ask for another rule
    extract = extract or default_extractor(assistant_prefix)
    if extract not in EXTRACTORS:
        do = f"Choose one of {', '.join(EXTRACTORS)}."
        raise TaskError(where="--extract", expected="a known rule", got=repr(extract), do=do)
    temperature = settings.temperature if temperature is None else temperature
    ks = chosen_ks(k, samples)
    if samples and temperature == 0:
        do = "Give a temperature above 0, or leave out --samples: the greedy answer is measured anyway."
        raise TaskError(where="--temperature", expected="above 0 with --samples", got="0", do=do)
    rows = parse_task(task)
    held_out = rows.held_out(size or settings.eval_size)
    policy, tokenizer, base, source = open_for_evaluation(model, recipe, adapter, inner=inner, device=device)
    prompt = PromptFormat(system, question, assistant_prefix, chat=bool(tokenizer.chat_template))
    ends, pad = end_token_ids(tokenizer, policy.generation_config), pad_token_id(tokenizer, policy.generation_config)
    longest = max_new_tokens or settings.max_new_tokens
    given = (policy, PagedSampler(policy), tokenizer, rows, held_out, prompt, cast(Extractor, extract))
    greedy = evaluate_greedily(*given, Sampling(longest, ends, pad, 0.0))
    drawn = None
    if samples:
        how = Sampling(longest, ends, pad, temperature, seed=(seed, "evaluation"))
        drawn = evaluate_sampled(*given, how, samples)
    show(greedy, drawn, ks)
    what = f"{len(held_out)} items of {task}, {base}" + (f" with {source}" if source else ", no adapter")
    packed = policy.qerl.plan.packs
    then = report_command(model) if run else train_command(model) if packed else transform_command(model)
    if out is None:
        wrote_nothing(what, then=then)
        return
    about: dict[str, Any] = {
        **{"model": base, "adapter": source, "task": task, "items": len(held_out), "extractor": extract},
        **{"system": system, "question": question, "assistant_prefix": assistant_prefix},
        **{"max_new_tokens": longest, "samples": samples, "ks": ks, "temperature": temperature, "seed": seed},
    }
    write_file(out, as_json(about, greedy, drawn, ks))
    wrote(out, what, then=then)


def chosen_ks(text: str | None, samples: int) -> list[int]:
    """The k of pass@k in ascending order: what was asked for, or 1 and n.

    Raises:
        TaskError: not whole numbers in 1..samples.
    """
    from qerl_compile.errors import TaskError

    if text is None:
        return sorted({1, samples}) if samples else []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 7 and 1 <= int(word) <= samples for word in words):
        expected = f"whole numbers from 1 to --samples, which is {samples}, as 1,{max(samples, 2)}"
        do = "Raise --samples, or lower k." if samples else "Give --samples N as well."
        raise TaskError(where="-k", expected=expected, got=repr(text), do=do)
    return sorted({int(word) for word in words})


def open_for_evaluation(
    model: str, recipe: str | None, adapter: str | None, *, inner: str, device: str | None
) -> tuple[Any, Any, str, str | None]:
    """Load what is to be evaluated, and make sure that its adapter changes something.

    Returns:
        (transformed model, tokenizer, name of the base, the adapter's directory or None).

    Raises:
        RecipeError: a recipe was given for a run, which has its own.
        CheckpointError: see `runs.open_model`; or the adapter is all zeros, so that this would be the base model.
    """
    from qerl_compile.cli.runs import Run, base_name, is_run, open_model, open_tokenizer
    from qerl_compile.errors import CheckpointError, RecipeError
    from qerl_compile.loading import load
    from qerl_compile.recipe import Recipe
    from qerl_compile.rl.evaluate import largest_update

    if is_run(model) and recipe is not None:
        do = "Leave it out, or evaluate the base model with --recipe and --adapter."
        raise RecipeError(where="--recipe", expected="none for a run, which has its own", got=repr(recipe), do=do)
    if adapter is None and recipe is None:
        policy, tokenizer, base = open_model(model, inner=inner, device=device)
        adapter = str(Path(model) / "adapter") if is_run(model) else None
    else:
        rules = None if recipe is None else Recipe.resolve(recipe)
        if is_run(model):
            rules, model = Recipe.from_file(Path(model) / "recipe.yaml"), Run.read(Path(model)).model
        tokenizer, base = open_tokenizer(model), base_name(model)
        policy = load(model, rules, adapter=adapter, inner=inner, device=device)
    if adapter is not None and largest_update(policy) == 0:
        raise CheckpointError(
            where=adapter,
            expected="an adapter that changes the model",
            got="one whose lora_B are all zero, as before training",
            do="Evaluate the base model without --adapter; the numbers are the same.",
        )
    return policy, tokenizer, base, adapter


def show(greedy: Any, drawn: Any, ks: list[int]) -> None:
    """Print the table of results."""
    from rich.table import Table

    from qerl_compile.cli.console import stdout

    metrics = all_metrics(greedy, drawn, ks)
    table = Table(box=None, pad_edge=False)
    table.add_column("measure")
    for column in ("value", "95 % interval"):
        table.add_column(column, justify="right")
    for name, value in metrics.items():
        if f"{name}_low" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            label = "accuracy, greedy" if name == "eval/accuracy" else name.removeprefix("eval/")
            table.add_row(label, f"{100 * value:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}")
    table.add_row("completion length", f"{metrics['eval/mean_length']:.1f}", "")
    failed = sum(reward is None for each in (greedy, drawn) if each is not None for reward in each.rewards)
    if failed:
        table.add_row("judge failed on", str(failed), "counted as wrong")
    stdout().print(table)


def all_metrics(greedy: Any, drawn: Any, ks: list[int]) -> dict[str, float]:
    """The numbers of both evaluations under their metric names."""
    return {**greedy.metrics(), **({} if drawn is None else drawn.metrics(ks))}


def as_json(about: dict[str, Any], greedy: Any, drawn: Any, ks: list[int]) -> str:
    """The whole result: what was evaluated how, the metrics, and each item's prompt and answers with their rewards."""
    import json

    from qerl_compile import __version__

    items = []
    for i, sample in enumerate(greedy.samples(len(greedy.prompts))):
        item: dict[str, Any] = {"prompt": sample["prompt"]}
        item["greedy"] = {"completion": sample["completion"], "reward": sample["reward"]}
        if drawn is not None:
            part = slice(i * drawn.samples, (i + 1) * drawn.samples)
            pairs = zip(drawn.completions[part], drawn.rewards[part], strict=True)
            item["right"] = drawn.right_I[i]
            item["samples"] = [{"completion": text, "reward": reward} for text, reward in pairs]
        items.append(item)
    result = {"format_version": 1, "qerl_compile": __version__, **about}
    result |= {"metrics": all_metrics(greedy, drawn, ks), "rows": items}
    return json.dumps(result, ensure_ascii=True, allow_nan=False, indent=1) + "\n"
