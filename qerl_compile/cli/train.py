"""`qerl-compile train MODEL --task TASK -o RUN`: the whole of it, from a bf16 checkpoint to a trained adapter.

    torchrun --nproc-per-node N -m qerl_compile train …        the same on N GPUs; rank 0 writes and shows
    qerl-compile train … -o RUN --resume                       go on from RUN's newest intact checkpoint

SIGTERM ends a run with a checkpoint and exit code 143; the same command with `--resume` goes on from there. Everything
that can be judged (recipe, task, rewards, templates, tokenizer, sinks) is, before the weights are read and before
anything is made.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from qerl_compile.cli.options import Device, Inner, Model, Out, RecipeName, Sets, TrustRemoteCode

if TYPE_CHECKING:
    import torch

    from qerl_compile.warm_up import Rehearsal

Tasks = Annotated[
    list[str],
    typer.Option(
        "--task", help="rg:NAME[:key=value,…] from reasoning_gym, or FILE.jsonl[:held_out=…]; several are a curriculum."
    ),
]
AdvanceAt = Annotated[float | None, typer.Option(help="Mean reward from which the next of several tasks begins.")]
Rewards = Annotated[
    list[str], typer.Option("--reward", help="answer, gsm8k, math, or FILE.py:FUNCTION; may be repeated.")
]
RewardWeights = Annotated[
    list[float], typer.Option("--reward-weight", help="Factor of each --reward, in their order; default: 1.")
]
System = Annotated[str | None, typer.Option(help="System message.")]
Question = Annotated[str | None, typer.Option(help="Template of the user message, such as 'What is {expression}?'.")]
Prefix = Annotated[str | None, typer.Option(help="Template that begins the answer, such as '{expression} ='.")]
Extract = Annotated[str | None, typer.Option(help="final, marked, first_number, last_number or text.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter directory to go on from.")]
Teacher = Annotated[str | None, typer.Option(help="Model to distill from, with train.distill_weight above 0.")]
Track = Annotated[list[str], typer.Option(help="Also log to tensorboard, trackio or wandb; may be repeated.")]
Plan = Annotated[bool, typer.Option("--plan", help="Only predict what the run will take of the GPU; see `plan`.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in OUT, if there is one.")]


def train(
    model: Model,
    out: Out,
    task: Tasks,
    recipe: RecipeName = "qerl-nvfp4-aqn",
    set_: Sets = [],  # noqa: B006  # typer wants a list literal
    reward: Rewards = ["answer"],  # noqa: B006
    reward_weight: RewardWeights = [],  # noqa: B006
    advance_at: AdvanceAt = None,
    system: System = None,
    question: Question = None,
    assistant_prefix: Prefix = None,
    extract: Extract = None,
    adapter: Adapter = None,
    teacher: Teacher = None,
    track: Track = [],  # noqa: B006
    resume: Resume = False,
    plan: Plan = False,
    inner: Inner = "inductor",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train adapters with RL on a 4-bit or dense base, evaluate before and after, write the adapter."""
    from qerl_compile.cli.console import quiet_libraries, stderr, stdout, wrote
    from qerl_compile.cli.runs import Run, base_name, is_run, open_teacher, open_tokenizer, refuse_output, run_directory

    quiet_libraries()
    refuse_output(out, resume=resume)
    from qerl_compile.adapter_files import write_adapter
    from qerl_compile.cli.hints import export_command
    from qerl_compile.cli.plan import warn_if_too_large
    from qerl_compile.cli.recording import first_accuracy, recording
    from qerl_compile.errors import RecipeError, TaskError
    from qerl_compile.loading import load
    from qerl_compile.recipe import Recipe
    from qerl_compile.rl import checkpoints
    from qerl_compile.rl.answers import Extractor, default_extractor
    from qerl_compile.rl.first_step import rehearse_first_step
    from qerl_compile.rl.optimizer import check_optimizer
    from qerl_compile.rl.prompts import PromptFormat
    from qerl_compile.rl.ranks import Ranks
    from qerl_compile.rl.rewards import close_rewards, resolve_rewards
    from qerl_compile.rl.sinks import check_sink
    from qerl_compile.rl.tasks import parse_task
    from qerl_compile.rl.tasks.curriculum import join_tasks
    from qerl_compile.rl.trainer import Stopped, Trainer

    rules = Recipe.resolve(recipe).with_overrides(set_)
    check_optimizer(rules.train)
    if not rules.lora and adapter is None:
        raise RecipeError(
            where=f"recipe {rules.name}: lora",
            expected="at least one rule, since adapters are what is trained",
            got="none",
            do="Add a lora rule, or go on from an adapter with --adapter.",
        )
    spec = join_tasks(task, advance_at)
    rows = parse_task(spec)
    held_out = rows.held_out(rules.train.eval_size)
    extractor = cast(Extractor, extract or default_extractor(assistant_prefix))
    for kind in track:
        check_sink(kind)
    tokenizer = open_tokenizer(model, trust_remote_code=trust_remote_code)
    prompt = PromptFormat(system, question, assistant_prefix, chat=bool(tokenizer.chat_template))
    for row in held_out:
        prompt.encode(tokenizer, row)
    if reward_weight and len(reward_weight) != len(reward):
        raise TaskError(
            where="--reward-weight",
            expected=f"one for each of the {len(reward)} rewards",
            got=str(len(reward_weight)),
            do="Give as many --reward-weight as --reward, or none.",
        )
    if (teacher is None) != (rules.train.distill_weight == 0):
        raise RecipeError(
            where="train.distill_weight",
            expected="above 0 with --teacher, and 0 without",
            got=f"{rules.train.distill_weight:g} with --teacher {teacher}",
            do="Give --teacher MODEL and --set train.distill_weight=1, or neither.",
        )
    if plan:
        from qerl_compile.cli.plan import show_plan

        if os.environ.get("RANK", "0") != "0":  # under torchrun one process says it for all
            raise typer.Exit(0)
        again = shlex.join(argument for argument in ("qerl-compile", *sys.argv[1:]) if argument != "--plan")
        raise typer.Exit(show_plan(model, rules, then=again, adapter=adapter, trust_remote_code=trust_remote_code))
    base = base_name(model)
    known_as = base if Path(model).is_dir() else model  # a relative path would not survive a change of directory
    about = Run(known_as, spec, reward, extractor, system, question, assistant_prefix, inner, reward_weight, teacher)
    if resume and is_run(out):
        about.refuse_other(out)
    rewards = resolve_rewards(reward, rows, extractor, timeout=rules.train.reward_timeout)
    ranks, interrupt = Ranks.join(), checkpoints.Interrupt()
    rehearsals: list[Rehearsal] = []

    def rehearse(skeleton: Any, what: Any, where: "torch.device") -> None:
        """Kernels are compiled while weights stream in."""
        started = rehearse_first_step(skeleton, what, rules.train, where, ranks=ranks.size)
        rehearsals.extend([started] if started is not None else [])

    try:
        ranks.share(rules.train.prompts_per_step)
        ranks.wait()  # every rank has judged OUT before rank 0 makes it
        if ranks.is_first:
            warn_if_too_large(model, rules, adapter=adapter, trust_remote_code=trust_remote_code)
        policy = load(
            model,
            rules,
            inner=inner,
            device=str(ranks.device) if ranks.device.type == "cuda" else device,
            adapter=adapter,
            seed=rules.train.seed,
            trust_remote_code=trust_remote_code,
            planned=rehearse if inner == "inductor" else None,
        )
        import peft  # noqa: F401  # seconds, which a save after SIGTERM must not take

        identity = checkpoints.identity(policy, rules, base=base, world_size=ranks.size)
        sink_config = {"recipe": rules.model_dump(mode="json"), "task": spec, "model": known_as}
        with (
            run_directory(out, first=ranks.is_first),
            recording(out, rules.train.steps, track=track, config=sink_config, first=ranks.is_first) as recorder,
            interrupt,
        ):
            found, rejected = checkpoints.latest(out) if resume else (None, [])
            if ranks.is_first and found is None:
                about.write(out, rules)

            def save(trainer: Trainer) -> None:
                if ranks.is_first:
                    checkpoints.save(
                        out, identity, trainer.progress, policy, trainer.optimizer, generators=trainer.generators,
                        kept=rules.train.checkpoints_kept,
                    )  # fmt: skip

            trainer = Trainer(
                policy,
                tokenizer,
                rules,
                rows,
                rewards,
                prompt,
                extractor,
                recorder.report,
                record=recorder.record,
                teacher=open_teacher(teacher, policy, tokenizer) if teacher else None,
                ranks=ranks,
                directory=out,
                diagnosed=recorder.diagnosed,
                save=save,
                stop=lambda: interrupt.requested,
                reward_weights=reward_weight or None,
                rehearsal=next(iter(rehearsals), None),
            )
            if found is not None:
                notes = [f"passed over: {each.reason}" for each in rejected]
                changes = checkpoints.version_changes(found.versions)
                notes += [f"not as when the run began, so bits may differ: {', '.join(changes)}"] if changes else []
                for note in notes:
                    stderr().print(note, style="yellow", highlight=False, markup=False)
                trainer.go_on(checkpoints.restore(found, identity, policy, trainer.optimizer))
            last = trainer.train()
            if ranks.is_first:
                write_adapter(policy, out / "adapter", base_name=base)
    except Stopped as request:
        if ranks.is_first:
            text = f"stopped after step {request.step}, which is saved; the same command with --resume goes on"
            stderr().print(text, style="yellow", highlight=False, markup=False)
        raise typer.Exit(interrupt.exit_code or 143) from None  # 143: another rank was asked
    finally:
        close_rewards(rewards)
        for each in rehearsals:
            each.stop()
    if not ranks.is_first:
        return
    stdout().print(f"held-out accuracy  {first_accuracy(out)}  →  {last.accuracy}", highlight=False, markup=False)
    what = "adapter/, metrics.jsonl, samples.jsonl, recipe.yaml, run.json"
    wrote(out, what, then=export_command(out, packed=policy.qerl.plan.packs))
