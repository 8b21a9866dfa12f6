"""`qerl-compile export RUN|DIR --target vllm -o OUT`: files that a serving engine loads."""

from typing import Annotated

import typer

from qerl_compile.cli.options import Device, ModelOrRun, Out

Target = Annotated[str, typer.Option(help="vllm or sglang (NVFP4 weights), peft (adapter).")]
NormsInBase = Annotated[
    bool, typer.Option("--norms-in-base", help="Write trained norms into the base; its adapter then has none.")
]


def export(
    model: ModelOrRun, out: Out, target: Target, norms_in_base: NormsInBase = False, device: Device = None
) -> None:
    """Write a training run, or a model directory, for another program."""
    from qerl_compile.cli.console import quiet_libraries, wrote
    from qerl_compile.cli.runs import is_run, open_model, refuse_output
    from qerl_compile.exporters import check_target

    quiet_libraries()
    check_target(target)
    refuse_output(out)
    from qerl_compile.adapter_files import adapters_of, trained_norms_of
    from qerl_compile.cli.hints import serve_command
    from qerl_compile.exporters import export as write

    policy, tokenizer, base = open_model(model, inner="eager", device=device)
    write(policy, out, target=target, tokenizer=tokenizer, base_name=base, norms_in_base=norms_in_base)
    rank = max((adapter.rank for adapter in adapters_of(policy).values()), default=0)
    if target == "peft":
        wrote(out, "PEFT adapter", then=serve_command(target, base, out, rank))
    elif is_run(model) and trained_norms_of(policy):
        # vLLM takes no adapter with norms, so the run's own cannot be served with this base
        norms = "with" if norms_in_base else "without"
        wrote(out, f"NVFP4A16 base weights {norms} the trained norms", then=serve_command(target, out))
    elif is_run(model):
        what = "NVFP4A16 base weights; the adapter is not merged and stays where it is"
        wrote(out, what, then=serve_command(target, out, f"{model}/adapter", rank))
    else:
        wrote(out, "NVFP4A16 checkpoint", then=serve_command(target, out))
